// The settings of drawing: from the form to a request, and from a picture's record back into the form.
//
// An empty field leaves a setting to the model. Seeds stay text, since numbers of a browser have 53 bits.

import { byId, make, options } from "./dom.js";
import { get } from "./api.js";

const TEXTS = ["prompt", "negative_prompt", "seed", "sampler", "spacing", "variation_seed"];
const NUMBERS = [
  "num_images", "width", "height", "num_inference_steps", "guidance_scale", "hires_scale", "variation_strength",
  "strength", "mask_blur",
];
const FIELDS = [...TEXTS, ...NUMBERS];
const OF_PICTURE = ["strength", "mask_blur"]; // have an effect with a picture to start from
const UNASKED = { num_images: 4, mask_blur: 0 };

let choices = { models: [], adapters: [], samplers: [], spacings: [] };
let defaults = {};
let model = null;
let latest = 0; // the number of the latest choice of a model: answers of older ones are dropped

/** Ask what may be chosen, and choose the server's model. */
export async function load() {
  choices = await get("/api/choices");
  options(byId("model"), choices.models.map((name) => [name, name]), choices.model);
  byId("adapters-fold").hidden = choices.adapters.length === 0;
  byId("adapters").replaceChildren(...choices.adapters.map(adapterField));
  await chooseModel(choices.model);
}

/** Choose a model: empty fields show its settings. If it does not load, the choice stays as it was. */
export async function chooseModel(name) {
  const number = ++latest;
  try {
    const answer = await get(`/api/models/${encodeURIComponent(name)}`);
    if (number !== latest) return;
    model = answer;
  } catch (error) {
    if (number === latest && model) byId("model").value = model.name;
    else if (number === latest && name !== choices.model) await chooseModel(choices.model); // the first answer was dropped
    throw error;
  }
  defaults = model.settings;
  byId("model").value = name;
  for (const name of FIELDS) {
    const hint = { width: model.width, height: model.height, strength: "of the model" }[name] ?? defaults[name];
    if (!["prompt", "negative_prompt", "seed", "num_images"].includes(name)) byId(name).placeholder = hint ?? "off";
  }
  for (const name of ["width", "height"]) byId(name).step = model.multiple;
  const label = (name) => choices.samplers.find((row) => row.name === name)?.label ?? name;
  const samplers = choices.samplers.map((row) => [row.name, row.label]);
  options(byId("sampler"), [["", `${label(defaults.sampler)} (the model's)`], ...samplers], byId("sampler").value);
  const spacings = choices.spacings.map((name) => [name, name]);
  options(byId("spacing"), [["", `${defaults.spacing} (the model's)`], ...spacings], byId("spacing").value);
}

/** The body of a request for what the form says. hasPicture: whether drawing starts from one. */
export function request(hasPicture) {
  const settings = furtherSettings();
  for (const name of FIELDS.filter((each) => hasPicture || !OF_PICTURE.includes(each))) {
    const text = name === "prompt" ? byId(name).value : byId(name).value.trim();
    if (byId(name).validity.badInput) throw new Error(`${name} must be a number`);
    if (name === "prompt" || (text.trim() !== "" && !(name === "mask_blur" && Number(text) === 0)))
      settings[name] = NUMBERS.includes(name) ? Number(text) : text;
  }
  return { settings, model: byId("model").value, adapters: chosenAdapters(), previews: previews() };
}

/** The body of a request that draws a recorded picture with some settings changed, by the same model and adapters. */
export function requestOf(record, changed) {
  if (!choices.models.includes(record.model)) throw new Error(`It was drawn by ${record.model}, which is not served here.`);
  const adapters = knownAdapters(record);
  if (adapters.length < record.adapters.length) throw new Error("It was drawn with an adapter that is not served here.");
  const settings = { ...record.settings, ...changed };
  return { settings, model: record.model, hash: record.hash || null, adapters, previews: previews() };
}

/** Whether the model has a student of few steps, which draws while the prompt is typed. */
export const isLive = () => Boolean(model?.live);

/** The body of a request for a sketch. */
export function liveRequest() {
  const body = { prompt: byId("prompt").value, model: byId("model").value };
  if (/^\d{1,20}$/.test(byId("seed").value.trim())) body.seed = byId("seed").value.trim();
  for (const side of ["width", "height"]) if (byId(side).value) body[side] = Number(byId(side).value);
  return body;
}

/** The multiple that the sides of a model's pictures must have. */
export async function multipleOf(name) {
  return (name === model?.name ? model : await get(`/api/models/${encodeURIComponent(name)}`)).multiple;
}

const previews = () => Number(byId("previews").value) || 0;

/** Put a record's settings into the form. Returns sentences about what could not be taken over. */
export async function fill(record) {
  const notes = [];
  if (choices.models.includes(record.model)) await chooseModel(record.model);
  else notes.push(`It was drawn by ${record.model}, which is not served here.`);
  if (record.hash && model.name === record.model && record.hash !== model.hash)
    notes.push("It was drawn by another model of this name.");
  const settings = { ...record.settings };
  const further = [];
  for (const [name, value] of Object.entries(settings)) {
    const isDefault = JSON.stringify(value) === JSON.stringify(defaults[name]);
    if (FIELDS.includes(name)) {
      const text = isDefault && !["num_images", "prompt"].includes(name) ? UNASKED[name] ?? "" : value ?? "";
      byId(name).value = text;
    } else if (!isDefault) further.push(`${name} = ${JSON.stringify(value)}`);
  }
  byId("further").value = further.join("\n");
  const adapters = knownAdapters(record);
  for (const name of choices.adapters) {
    const chosen = adapters.find((each) => each.name === name);
    byId(`use-${name}`).checked = chosen !== undefined;
    byId(`weight-${name}`).value = chosen?.weight ?? 1;
  }
  if (adapters.length < record.adapters.length) notes.push("One of its adapters is not served here.");
  return notes;
}

function furtherSettings() {
  const settings = {};
  for (const line of byId("further").value.split("\n").filter((text) => text.trim() !== "")) {
    const at = line.indexOf("=");
    if (at < 0) throw new Error(`A further setting must be name = value (got ${line.trim()})`);
    const [name, text] = [line.slice(0, at).trim(), line.slice(at + 1).trim()];
    if (FIELDS.includes(name)) throw new Error(`${name} has a field of its own`);
    try {
      settings[name] = JSON.parse(text);
    } catch {
      settings[name] = text;
    }
  }
  return settings;
}

function adapterField(name) {
  return make(
    "label", {},
    make("input", { type: "checkbox", id: `use-${name}` }), ` ${name}`,
    make("input", { type: "number", id: `weight-${name}`, value: 1, min: -10, max: 10, step: "any", ariaLabel: `Weight of ${name}` }),
  );
}

function chosenAdapters() {
  const used = choices.adapters.filter((name) => byId(`use-${name}`).checked);
  return used.map((name) => ({ name, weight: Number(byId(`weight-${name}`).value || 1) }));
}

/** The adapters of a record that are served here: a record has file names, a choice has none of their suffixes. */
function knownAdapters(record) {
  const named = record.adapters.map(({ name, weight }) => {
    const file = name.split("/").pop().replace(/\.safetensors$/i, "");
    return { name: file, weight };
  });
  return named.filter(({ name }) => choices.adapters.includes(name));
}
