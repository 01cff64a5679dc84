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
}

export function button(text, action) {
  return make("button", { type: "button", textContent: text, onclick: action });
}

/** An image of a few pixels is shown by its pixels, not smoothed. */
export function picture(properties = {}) {
  const image = make("img", { decoding: "async", ...properties });
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth <= 192));
  return image;
}

/** Run something, and say above all views what went wrong. */
export async function tried(work) {
  try {
    await work();
    byId("problem").textContent = "";
  } catch (error) {
    byId("problem").textContent = error.message;
  }
}
