// All pictures of the output folder: searched by words, model and date, a page at a time.

import { byId, make, options } from "./dom.js";
import { get } from "./api.js";
import { figure } from "./actions.js";

const COUNT = 48;
let last = null; // the place of the oldest picture that is shown
let asked = 0; // the number of the latest search: answers of older ones are dropped

export async function search() {
  last = null;
  await load(true);
}

export async function more() {
  await load(false);
}

async function load(isNew) {
  const number = ++asked;
  const query = new URLSearchParams({ count: COUNT });
  const fields = { words: "words", model: "by-model", since: "since", until: "until" };
  for (const [name, id] of Object.entries(fields)) if (byId(id).value) query.set(name, byId(id).value);
  if (last) query.set("before", last);
  const { pictures, models } = await get(`/api/history?${query}`);
  if (number !== asked) return;
  options(byId("by-model"), [["", "any"], ...models.map((name) => [name, name])], byId("by-model").value);
  const figures = pictures.map(({ name, record }) => make("figure", {}, ...figure(name, record)));
  if (isNew) byId("found").replaceChildren(...figures);
  else byId("found").append(...figures);
  if (isNew && figures.length === 0)
    byId("found").append(make("p", { className: "empty", textContent: "No pictures are here, or none that fit." }));
  last = pictures.at(-1)?.place ?? last;
  byId("more").hidden = pictures.length < COUNT;
}
