// Drawing: one request, its progress, its previews, its pictures.

import { byId, complain, make, picture } from "./dom.js";
import { lines } from "./api.js";

const MOST = 64; // pictures of a request
const AT_ONCE = 4; // requests: a browser has six connections to a host, and the page requires some itself
const running = new Set();
const turns = []; // of requests that wait for others to end
let begun = 0;

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
    for await (const event of inTurn(() => lines("/api/draw", order, abort.signal))) {
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
    offerCancel();
  }
}

export function cancel() {
  for (const abort of running) abort.abort();
}

/** What `begin` yields, once fewer than AT_ONCE others are being drawn. */
async function* inTurn(begin) {
  if (begun >= AT_ONCE) await new Promise((resolve) => turns.push(resolve));
  else begun += 1;
  try {
    yield* begin();
  } finally {
    if (turns.length > 0) turns.shift()(); // its place goes to the next
    else begun -= 1;
  }
}

/** Show the button while something is being drawn. When it goes, it leaves the focus to the button beside it. */
function offerCancel() {
  const hadFocus = document.activeElement === byId("cancel");
  byId("cancel").hidden = running.size === 0;
  if (hadFocus && running.size === 0) byId("go").focus();
}

/** Show text under the prompt. share: of the work that is done, not read out by screen readers; null hides the bar. */
export function show(text, share = null) {
  byId("state").textContent = share === null ? text : "";
  byId("steps").textContent = share === null ? "" : text;
  byId("progress").hidden = share === null;
  byId("progress").value = share ?? 0;
  offerCancel();
}

function showProgress({ done, steps, seconds, ahead }) {
  if (ahead > 0) return show(`${ahead} ${ahead === 1 ? "picture" : "pictures"} before yours`, 0);
  const left = seconds === null ? "" : `, ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s left`;
  return show(`${done} of ${steps} steps${left}`, steps ? done / steps : 0);
}

function waiting(count) {
  const figures = Array.from({ length: count }, () => {
    const frame = make("button", { type: "button", className: "frame", disabled: true }, picture({ alt: "" }));
    frame.ariaLabel = "A picture that is being drawn";
    return make("figure", { className: "waiting" }, frame);
  });
  byId("gallery").prepend(...figures);
  return figures;
}
