// Elements of the page: found by id, and made with properties and children. Text is always text, never HTML.

export const byId = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function options(select, values, chosen = "") {
  select.replaceChildren(...values.map(([value, text]) => make("option", { value, textContent: text })));
  select.value = chosen;
  if (select.selectedIndex < 0) select.selectedIndex = 0; // a choice that is gone
}

export function button(text, action) {
  return make("button", { type: "button", textContent: text, onclick: action });
}

export function picture(properties = {}) {
  return byPixels(make("img", { decoding: "async", ...properties }));
}

/** An image of a few pixels is shown by its pixels, not smoothed. */
export function byPixels(image) {
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth <= 192));
  return image;
}

/** Run something, and show above all views what went wrong. */
export async function tried(work) {
  try {
    await work();
    complain("");
  } catch (error) {
    complain(error.message);
  }
}

/** Show what went wrong. Empty text removes the message, if it came from the same source. */
export function complain(text, source = "user") {
  const problem = byId("problem");
  if (text === "" && problem.dataset.source !== source) return;
  problem.textContent = text;
  problem.dataset.source = source;
}
