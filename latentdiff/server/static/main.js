// The page: its views, and what is done with its forms and with pictures that are dropped on it.

import { base64, post } from "./api.js";
import { button, byId, tried } from "./dom.js";
import { cancel, show } from "./draw.js";
import { go, reuse } from "./actions.js";
import * as history from "./history.js";
import * as live from "./live.js";
import * as paper from "./paper.js";
import * as runs from "./runs.js";
import * as settings from "./settings.js";

const VIEWS = ["draw", "history", "runs"];
const places = {}; // how far down each view was
let current = "draw";

function view() {
  const name = VIEWS.find((each) => `#${each}` === location.hash) ?? "draw";
  places[current] = scrollY; // before the page becomes shorter
  for (const each of VIEWS) {
    byId(each).hidden = each !== name;
    const link = document.querySelector(`nav a[href="#${each}"]`);
    if (each === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${name[0].toUpperCase()}${name.slice(1)} · latentdiff`;
  byId("large").close();
  current = name;
  if (name === "history") tried(() => history.refresh().then(() => scrollTo(0, places.history ?? 0)));
  else scrollTo(0, 0);
  if (name === "runs") runs.look();
}

async function request() {
  const [drawing, start] = [settings.request(paper.isThere()), await paper.request()];
  return { ...drawing, ...start };
}

/** A picture of the user's: to start from, or to read its settings. */
async function take(file) {
  const note = await paper.start(file);
  if (note === null) return; // another one was chosen meanwhile
  location.hash = "#draw";
  show(`Drawing starts from this picture. ${note}`.trim());
  if (!paper.isReadable(file)) return;
  const { record, parameters } = await post("/api/read", { image: await base64(file) });
  if (!record && parameters) show(`Settings recorded by another program:\n${parameters}`);
  if (record) byId("state").append(" ", button("Use its settings instead", () => tried(() => instead(record))));
}

async function instead(record) {
  await paper.start(null);
  await reuse(record);
}

function listen() {
  addEventListener("hashchange", view);
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    go(request());
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat) byId("form").requestSubmit();
  });
  byId("cancel").addEventListener("click", cancel);
  for (const name of ["live", "prompt", "seed", "width", "height"]) byId(name).addEventListener("input", live.sketch);
  byId("model").addEventListener("change", ({ target }) => {
    show(`Loading ${target.value}`);
    tried(() => settings.chooseModel(target.value).finally(() => show("")).then(live.offer));
  });
  byId("file").addEventListener("change", ({ target }) => {
    const file = target.files[0];
    target.value = ""; // so that the same file can be chosen again
    if (file) tried(() => take(file));
  });
  byId("without").addEventListener("click", () => {
    byId("file").focus(); // the button goes
    tried(() => paper.start(null));
  });
  byId("clear").addEventListener("click", paper.clear);
  byId("painting").addEventListener("change", ({ target }) => paper.painting(target.checked));
  byId("search").addEventListener("submit", (event) => event.preventDefault());
  byId("search").addEventListener("input", () => tried(history.searchSoon));
  byId("more").addEventListener("click", () => tried(history.more));
  const hasFile = (event) => event.dataTransfer.types.includes("Files"); // text may be dragged between fields
  addEventListener("dragover", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", () => document.body.classList.remove("dropping"));
  addEventListener("drop", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    document.body.classList.remove("dropping");
    const file = event.dataTransfer.files[0];
    if (file) tried(() => take(file));
  });
}

listen();
view();
tried(() => settings.load().then(live.offer));
