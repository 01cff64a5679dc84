// The picture to start from, and the mask that is painted over it: by pointer, or with arrow keys and space.

import { byId, byPixels, make } from "./dom.js";
import { base64 } from "./api.js";

const STEP = 0.02; // of the width, which an arrow key moves the brush
const MOST = 2048 * 2048; // pixels that the server takes
const READABLE = ["png", "jpeg", "webp", "gif", "bmp", "avif"].map((kind) => `image/${kind}`); // by the server too
const state = { blob: null, canvas: null, last: null, brush: [0.5, 0.5], ring: null };
const NOTHING = { blob: null, image: null, note: "" };
let latest = 0; // the number of the latest choice: an older one that ends later is dropped

/** Start from a picture; null removes it. Returns a sentence if the picture was changed, else ""; null if another one
 * was chosen meanwhile. A file that is no picture changes nothing. Strength and soft edge are reset only when the
 * picture is removed. */
export async function start(file) {
  const number = ++latest;
  const choice = file === null ? NOTHING : await prepared(file);
  if (number !== latest) {
    if (choice.image) URL.revokeObjectURL(choice.image.src);
    return null;
  }
  const { blob, image, note } = choice;
  URL.revokeObjectURL(byId("paper").querySelector("img")?.src ?? "");
  Object.assign(state, { blob, canvas: null, ring: null });
  byId("start").hidden = blob === null;
  byId("paper").replaceChildren();
  for (const field of ["left", "top", "right", "bottom"]) byId(field).value = 0;
  if (blob === null) Object.assign(byId("strength"), { value: "" });
  if (blob === null) Object.assign(byId("mask_blur"), { value: 0 });
  if (blob !== null) show(image);
  return note;
}

/** Whether drawing starts from a picture. */
export const isThere = () => state.blob !== null;

/** Whether the server can read this file as it is. Without a type the browser itself knows it by its content. */
export const isReadable = (blob) => blob.type === "" || READABLE.includes(blob.type);

/** A picture as the server takes it: of a size and a kind that it knows. */
async function prepared(blob) {
  const image = await opened(blob);
  const isLarge = image.naturalWidth * image.naturalHeight > MOST;
  if (!isLarge && isReadable(blob)) return { blob, image, note: "" };
  try {
    const copy = await redrawn(image);
    const made = await opened(copy);
    const size = `${made.naturalWidth} × ${made.naturalHeight}`;
    return { blob: copy, image: made, note: isLarge ? `It was reduced to ${size}.` : `It was converted to PNG, ${size}.` };
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

async function opened(blob) {
  const image = byPixels(make("img", { src: URL.createObjectURL(blob), alt: "The picture to start from" }));
  const isOpen = await image.decode().then(() => image.naturalWidth * image.naturalHeight > 0, () => false);
  if (isOpen) return image;
  URL.revokeObjectURL(image.src);
  throw new Error("The browser cannot open this file as a picture.");
}

/** A PNG of a picture, in a size that the server takes. */
async function redrawn(image) {
  const scale = Math.min(1, Math.sqrt(MOST / (image.naturalWidth * image.naturalHeight)));
  const [width, height] = [image.naturalWidth, image.naturalHeight].map((side) => Math.floor(side * scale));
  const copy = make("canvas", { width, height });
  copy.getContext("2d").drawImage(image, 0, 0, width, height);
  return new Promise((resolve) => copy.toBlob(resolve, "image/png"));
}

function show(image) {
  state.canvas = make("canvas", { width: image.naturalWidth, height: image.naturalHeight, tabIndex: 0 });
  state.canvas.getContext("2d", { willReadFrequently: true }); // to see whether anything is painted
  state.canvas.setAttribute("role", "application");
  state.canvas.setAttribute("aria-label", "Mask: arrow keys move the brush, space paints, shift and space erases");
  state.ring = make("div", { className: "brush", hidden: true });
  byId("paper").append(image, state.canvas, state.ring);
  byId("picture-fold").open = true;
  listen(state.canvas);
}

/** Whether the pointer paints; otherwise it scrolls. */
export function painting(isOn) {
  byId("painting").checked = isOn;
  byId("paper").classList.toggle("painting", isOn);
}

/** The part of a request that is about the picture; empty without one. */
export async function request() {
  if (state.blob === null) return {};
  const margins = ["left", "top", "right", "bottom"].map((side) => Number(byId(side).value) || 0);
  const image = await base64(state.blob);
  return { image, mask: isPainted() ? await mask() : null, margins };
}

export function clear() {
  state.canvas?.getContext("2d").clearRect(0, 0, state.canvas.width, state.canvas.height);
}

/** Whether anything is painted: all may have been erased, but for faint edges. */
function isPainted() {
  const { width, height } = state.canvas;
  const values = state.canvas.getContext("2d").getImageData(0, 0, width, height).data;
  return values.some((value, place) => place % 4 === 3 && value > 127);
}

/** The painted part in white on black, a PNG in base64. */
async function mask() {
  const { width, height } = state.canvas;
  const copy = make("canvas", { width, height });
  const pen = copy.getContext("2d");
  pen.drawImage(state.canvas, 0, 0);
  pen.globalCompositeOperation = "source-in";
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, height);
  pen.globalCompositeOperation = "destination-over";
  pen.fillStyle = "#000";
  pen.fillRect(0, 0, width, height);
  return base64(await new Promise((resolve) => copy.toBlob(resolve, "image/png")));
}

function listen(canvas) {
  canvas.addEventListener("pointerdown", (event) => {
    if (!byId("painting").checked || event.button !== 0) return;
    state.ring.hidden = true;
    canvas.setPointerCapture(event.pointerId);
    state.last = place(event);
    stroke(state.last, erases(event));
  });
  canvas.addEventListener("pointermove", (event) => {
    if (state.last) stroke(place(event), erases(event));
  });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => (state.last = null));
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] }[event.key];
    if (!way) return;
    event.preventDefault();
    painting(true);
    state.brush = state.brush.map((at, axis) => Math.min(1, Math.max(0, at + way[axis] * STEP)));
    state.last = [state.brush[0] * canvas.width, state.brush[1] * canvas.height];
    if (event.key === " ") stroke(state.last, erases(event));
    showRing();
    canvas.title = `Brush at ${state.brush.map((at) => `${Math.round(at * 100)}%`).join(", ")}`;
    state.last = null;
  });
}

/** The outline of the brush that keys move. */
function showRing() {
  const size = Number(byId("brush").value);
  const share = state.canvas.width / state.canvas.height;
  const [x, y] = state.brush.map((at) => 100 * at);
  Object.assign(state.ring, { hidden: false });
  Object.assign(state.ring.style, {
    left: `${x - size / 2}%`, top: `${y - (size * share) / 2}%`, width: `${size}%`, height: `${size * share}%`,
  });
}

const erases = (event) => event.shiftKey || byId("erasing").checked;

function place(event) {
  const box = state.canvas.getBoundingClientRect();
  const { width, height } = state.canvas;
  return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
}

/** A line of the brush's width from where it was last. */
function stroke(to, isErased) {
  const pen = state.canvas.getContext("2d");
  pen.globalCompositeOperation = isErased ? "destination-out" : "source-over";
  Object.assign(pen, { lineCap: "round", strokeStyle: "#e5007a", fillStyle: "#e5007a" });
  pen.lineWidth = Math.max(1, (Number(byId("brush").value) / 100) * state.canvas.width);
  pen.beginPath();
  if (to.every((at, axis) => at === state.last[axis])) {  // a line without length is not drawn, whatever its ends
    pen.arc(...to, pen.lineWidth / 2, 0, 2 * Math.PI);
    pen.fill();
  } else {
    pen.moveTo(...state.last);
    pen.lineTo(...to);
    pen.stroke();
  }
  state.last = to;
}
