// Drawing: one request, its progress, its previews, its pictures.

import { byId, complain, make, picture } from "./dom.js";
import { lines } from "./api.js";

const MOST = 64; // pictures of a request
const running = new Set();

/** Draw what a request asks for, with previews in the gallery. body: or a promise of it. content: makes the content of a finished figure. */
export async function draw(body, content) {
  const abort = new AbortController();
  running.add(abort);
  const began = performance.now();
  let figures = [];
  complain("");
  show("Waiting", 0);
  try {
    const order = await body;
    figures = waiting(Math.min(order.settings.num_images ?? 1, MOST));
    const notes = new Set();
    for await (const event of lines("/api/draw", order, abort.signal)) {
      if (event.kind === "progress") showProgress(event);
      if (event.kind === "preview") figures[event.number].querySelector("img").src = event.image;
      if (event.kind === "picture") {
        figures[event.number].classList.remove("waiting");
        figures[event.number].replaceChildren(...content(event.name, event.record));
        event.notes.forEach((note) => notes.add(note));
      }
      if (event.kind === "error") throw new Error(event.message);
    }
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    show([`${figures.length} ${figures.length === 1 ? "picture" : "pictures"} in ${seconds} s`, ...notes].join("\n"));
  } catch (error) {
    show(abort.signal.aborted ? "Cancelled" : "");
    if (!abort.signal.aborted) complain(error.message); // it stays, whatever else is being drawn
  } finally {
    for (const figure of figures.filter((each) => each.classList.contains("waiting"))) figure.remove();
    running.delete(abort);
    byId("cancel").hidden = running.size === 0;
  }
}

export function cancel() {
  for (const abort of running) abort.abort();
  byId("go").focus(); // the button that had the focus goes
}

/** Show text under the prompt. share: of the work that is done, not read out by screen readers; null hides the bar. */
export function show(text, share = null) {
  byId("state").textContent = share === null ? text : "";
  byId("steps").textContent = share === null ? "" : text;
  byId("progress").hidden = share === null;
  byId("progress").value = share ?? 0;
  byId("cancel").hidden = running.size === 0;
}

function showProgress({ done, steps, seconds, ahead }) {
  if (ahead > 0) return show(`${ahead} ${ahead === 1 ? "picture" : "pictures"} before yours`, 0);
  const left = seconds === null ? "" : `, ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s left`;
  return show(`${done} of ${steps} steps${left}`, steps ? done / steps : 0);
}

function waiting(count) {
  const figures = Array.from({ length: count }, () => {
    const frame = make("button", { type: "button", className: "frame", disabled: true }, picture({ alt: "" }));
    return make("figure", { className: "waiting" }, frame);
  });
  byId("gallery").prepend(...figures);
  return figures;
}
