// A finished picture: how it is shown, and what can be done with it.

import { button, byId, byPixels, make, picture, tried } from "./dom.js";
import * as live from "./live.js";
import * as paper from "./paper.js";
import * as settings from "./settings.js";
import { base64, file } from "./api.js";
import { draw, show } from "./draw.js";

const VARIATIONS = { num_images: 4, variation_strength: 0.3 };

/** Draw what a request asks for, and show each picture with what can be done with it. body: or a promise of it. */
export function go(body) {
  return draw(body, figure);
}

/** A picture's address. When a file is removed, its name may be used again: the time keeps a cached picture out. */
const address = (name) => `/pictures/${name}?${Date.now()}`;

/** The content of a picture's figure: the picture, which opens larger, buttons, the prompt. */
export function figure(name, record) {
  const [width, height] = record.size;
  const image = picture({ src: address(name), alt: record.settings.prompt, loading: "lazy", width, height });
  const frame = make("button", { type: "button", className: "frame", onclick: () => open(name, record) }, image);
  frame.ariaLabel = `Open: ${record.settings.prompt}`;
  const { prompt } = record.settings;
  const buttons = make("div", { className: "actions" }, ...actions(name, record));
  return [frame, buttons, make("figcaption", { textContent: prompt, title: prompt })];
}

/** Show a picture with its facts. */
export function open(name, record) {
  const image = byId("large-image");
  image.src = address(name);
  image.alt = record.settings.prompt;
  byId("large-actions").replaceChildren(...actions(name, record));
  const { prompt, negative_prompt: negative, seed } = record.settings;
  const facts = {
    Prompt: prompt,
    "Negative prompt": negative,
    Model: record.model,
    Size: record.size.join(" × "),
    Seed: seed,
    Steps: record.settings.num_inference_steps,
    Guidance: record.settings.guidance_scale,
    Sampler: record.settings.sampler,
    Adapters: record.adapters.map((each) => `${each.name}: ${each.weight}`).join(", "),
    File: name,
  };
  const entries = Object.entries(facts).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  byId("large-facts").replaceChildren(
    ...entries.flatMap(([key, value]) => [make("dt", { textContent: key }), make("dd", { textContent: value })]),
  );
  if (!byId("large").open) byId("large").showModal();
}

function actions(name, record) {
  return [
    button("Vary", () => tried(() => toForm().then(() => void go(vary(name, record))))),
    button("Larger", () => tried(() => toForm().then(() => void go(enlarge(name, record))))),
    button("Settings", () => tried(() => reuse(record))),
    button("Start from it", () => tried(() => startFrom(name))),
    make("a", { href: `/pictures/${name}`, download: name, textContent: "Save" }),
  ];
}

/** Whether the picture was drawn from a seed's noise alone: then that noise can be varied, or drawn larger. */
function isPlain({ settings: { variation_seed: variation, hires_scale: hires }, from_picture: from }) {
  return variation === null && hires === null && !from;
}

async function vary(name, record) {
  const variation_seed = String(Math.floor(Math.random() * 2 ** 32));
  if (isPlain(record)) return settings.requestOf(record, { ...VARIATIONS, variation_seed });
  return over(name, record, { num_images: 4, strength: 0.5, seed: variation_seed });
}

async function enlarge(name, record) {
  if (isPlain(record)) return settings.requestOf(record, { hires_scale: 2 });
  const multiple = await settings.multipleOf(record.model);
  const [width, height] = record.size.map((side) => Math.round((2 * side) / multiple) * multiple);
  return over(name, record, { strength: 0.4, width, height });
}

/** A request that draws over a picture. */
async function over(name, record, changed) {
  const image = await base64(await file(address(name)));
  const none = {
    variation_seed: null, variation_strength: 0, hires_scale: null, hires_strength: null, mask_blur: 0,
    padding_mask_crop: null, width: null, height: null,
  };
  return { ...settings.requestOf(record, { ...none, ...changed }), image };
}

/** Put a record's settings into the form. */
export async function reuse(record) {
  await toForm();
  await paper.start(null);
  const notes = await settings.fill(record);
  live.offer(); // the model may be another one
  if (record.from_picture)
    notes.push("It was drawn over another picture: choose that one under “From a picture”, and set its mask and margins again. Until then strength and soft edge have no effect.");
  show(["Its settings are in the form.", ...notes].join(" "));
}

async function startFrom(name) {
  const blob = await file(address(name));
  await toForm();
  await paper.start(blob);
}

/** Show the form, with the focus on the prompt. */
async function toForm() {
  byId("large").close();
  if (byId("draw").hidden) {
    const moved = new Promise((resolve) => addEventListener("hashchange", resolve, { once: true }));
    location.hash = "#draw";
    await moved;
  }
  if (matchMedia("(pointer: fine)").matches) byId("prompt").focus(); // elsewhere a keyboard would cover the page
}

byPixels(byId("large-image"));
