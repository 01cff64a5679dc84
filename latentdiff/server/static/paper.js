// The picture to start from, and the mask that is painted over it: by pointer, or with arrow keys and space.

import { byId, make } from "./dom.js";
import { base64 } from "./api.js";

const STEP = 0.02; // of the width, which an arrow key moves the brush
const state = { blob: null, canvas: null, last: null, painted: false, brush: [0.5, 0.5] };

/** Start from a picture; null is from none. */
export async function start(blob) {
  URL.revokeObjectURL(byId("paper").querySelector("img")?.src ?? "");
  Object.assign(state, { blob, canvas: null, painted: false });
  byId("start").hidden = blob === null;
  byId("paper").replaceChildren();
  for (const field of ["left", "top", "right", "bottom", "mask_blur"]) byId(field).value = 0;
  if (blob === null) byId("strength").value = "";
  if (blob === null) return;
  const image = make("img", { src: URL.createObjectURL(blob), alt: "The picture to start from" });
  try {
    await image.decode();
  } catch {
    Object.assign(state, { blob: null });
    byId("start").hidden = true;
    throw new Error("This file is not a picture.");
  }
  state.canvas = make("canvas", { width: image.naturalWidth, height: image.naturalHeight, tabIndex: 0 });
  state.canvas.setAttribute("aria-label", "Mask: arrow keys move the brush, space paints, shift erases");
  byId("paper").append(image, state.canvas);
  byId("picture-fold").open = true;
  listen(state.canvas);
}

/** The part of a request that is about the picture; empty without one. */
export async function request() {
  if (state.blob === null) return {};
  const margins = ["left", "top", "right", "bottom"].map((side) => Number(byId(side).value) || 0);
  const image = await base64(state.blob);
  return { image, mask: state.painted ? await mask() : null, margins };
}

export function clear() {
  state.canvas?.getContext("2d").clearRect(0, 0, state.canvas.width, state.canvas.height);
  state.painted = false;
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
    if (!byId("painting").checked) return;
    canvas.setPointerCapture(event.pointerId);
    state.last = place(event);
    stroke(state.last, event.shiftKey);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (state.last) stroke(place(event), event.shiftKey);
  });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => (state.last = null));
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] }[event.key];
    if (!way) return;
    event.preventDefault();
    byId("painting").checked = true;
    state.brush = state.brush.map((at, axis) => Math.min(1, Math.max(0, at + way[axis] * STEP)));
    state.last = [state.brush[0] * canvas.width, state.brush[1] * canvas.height];
    if (event.key === " ") stroke(state.last, event.shiftKey);
    canvas.title = `Brush at ${state.brush.map((at) => `${Math.round(at * 100)}%`).join(", ")}`;
    state.last = null;
  });
}

function place(event) {
  const box = state.canvas.getBoundingClientRect();
  const { width, height } = state.canvas;
  return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
}

/** A line of the brush's width from where it was last. */
function stroke(to, erases) {
  const pen = state.canvas.getContext("2d");
  pen.globalCompositeOperation = erases ? "destination-out" : "source-over";
  Object.assign(pen, { lineCap: "round", strokeStyle: "#e5007a" });
  pen.lineWidth = Math.max(1, (Number(byId("brush").value) / 100) * state.canvas.width);
  pen.beginPath();
  pen.moveTo(...state.last);
  pen.lineTo(...to);
  pen.stroke();
  state.last = to;
  state.painted = true;
}
