// Drawing while the prompt is typed: one picture in few steps, from the same noise, which is not kept.

import { post } from "./api.js";
import { byId, complain } from "./dom.js";
import * as settings from "./settings.js";

let drawing = false;
let again = false; // something was typed meanwhile

/** Offer sketches if the model has a student of few steps. */
export function offer() {
  byId("live-choice").hidden = !settings.isLive();
  sketch();
}

/** Whether a sketch is wanted, and there is a prompt for it. */
const wanted = () => byId("live").checked && settings.isLive() && byId("prompt").value.trim() !== "";

/** Draw what the form says now. While a picture is being drawn, only the latest request waits. */
export async function sketch() {
  if (!wanted()) {
    byId("sketch").hidden = true;
    complain("", "sketch");
    return;
  }
  if (drawing) {
    again = true;
    return;
  }
  drawing = true;
  const body = settings.liveRequest();
  try {
    const { image } = await post("/api/live", body);
    if (!wanted()) return;
    Object.assign(byId("sketch"), { src: image, alt: `A sketch of: ${body.prompt}`, hidden: false });
    complain("", "sketch");
  } catch (error) {
    complain(error.message, "sketch");
  } finally {
    drawing = false;
    if (again) {
      again = false;
      sketch();
    }
  }
}
