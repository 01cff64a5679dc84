// All pictures of the output folder: searched by words, model and date, a page at a time.

import { byId, make, options } from "./dom.js";
import { get } from "./api.js";
import { figure } from "./actions.js";

const COUNT = 48;
const MOST = 200; // of one answer
const PAUSE = 250; // milliseconds
let last = null; // the place of the oldest picture that is shown
let latest = 0; // the number of the latest search: answers of older ones are dropped
let waiting = null;
let figures = new Map(); // by place and name: what is shown already is not fetched again

/** Search, once nothing has been typed for a moment. */
export function searchSoon() {
  clearTimeout(waiting);
  return new Promise((resolve, reject) => (waiting = setTimeout(() => search().then(resolve, reject), PAUSE)));
}

export async function search() {
  await load(null, COUNT);
}

/** What is new, with as many pictures as are shown. */
export async function refresh() {
  await load(null, Math.min(Math.max(figures.size, COUNT), MOST));
}

export async function more() {
  const [before, count] = [last, figures.size];
  await load(before, COUNT);
  byId("found").children[count]?.querySelector("button")?.focus(); // the button “More” may be gone
}

/** How many pictures are shown, for screen readers too. */
function counted(count, areMore) {
  if (count === 0) return "No pictures found.";
  return `${areMore ? "The latest " : ""}${count} ${count === 1 ? "picture" : "pictures"}`;
}

async function load(before, count) {
  const number = ++latest;
  const query = new URLSearchParams({ count });
  const fields = { words: "words", model: "by-model", since: "since", until: "until" };
  for (const [name, id] of Object.entries(fields)) if (byId(id).value) query.set(name, byId(id).value);
  if (before) query.set("before", before);
  const { pictures, models } = await get(`/api/history?${query}`);
  if (number !== latest) return;
  options(byId("by-model"), [["", "any"], ...models.map((name) => [name, name])], byId("by-model").value);
  const entries = pictures.map(({ name, place, record }) => {
    const key = `${place} ${name}`;
    return [key, figures.get(key) ?? make("figure", {}, ...figure(name, record))];
  });
  figures = new Map([...(before ? figures : []), ...entries]);
  byId("found").replaceChildren(...figures.values());
  last = pictures.at(-1)?.place ?? before;
  byId("more").hidden = pictures.length < count;
  byId("count").textContent = counted(figures.size, !byId("more").hidden);
}
