// Training runs: their states, curves, and the pictures of their validations as they come.

import { byId, complain, make, picture } from "./dom.js";
import { get } from "./api.js";

const EVERY = 5000; // milliseconds between two looks
const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, EDGE] = [360, 200, 34];
const TIMES = ["seconds"]; // of a log, which no curve shows
let chosen = null;
let timer = null;
let latest = null; // what the view shows, as text

/** Show the runs, and look again from time to time. */
export function look() {
  return watch().catch((error) => complain(error.message, "runs"));
}

async function watch() {
  clearTimeout(timer);
  if (byId("runs").hidden) return complain("", "runs");
  try {
    const runs = await get("/api/runs");
    if (!runs.some((run) => run.name === chosen)) chosen = null; // it is gone
    chosen ??= (runs.find((run) => run.state === "running") ?? runs[0])?.name ?? null;
    const run = chosen ? await get(`/api/runs/${encodeURIComponent(chosen)}`) : null;
    complain("", "runs");
    const now = JSON.stringify([runs, run]);
    if (now === latest) return; // nothing flickers, and the focus stays
    latest = now;
    const focused = byId("run-list").contains(document.activeElement) ? document.activeElement.textContent : null;
    list(runs);
    if (focused !== null) buttons().find((each) => each.textContent === focused)?.focus();
    if (run) detail(run);
    else byId("run").replaceChildren();
  } finally {
    timer = setTimeout(look, EVERY);
  }
}

const buttons = () => [...byId("run-list").querySelectorAll("button")];

function list(runs) {
  if (runs.length === 0)
    return byId("run-list").replaceChildren(make("p", { className: "empty", textContent: "No training runs are here." }));
  const rows = runs.map((run) => {
    const link = make("button", { type: "button", textContent: run.name, onclick: () => ((chosen = run.name), look()) });
    if (run.name === chosen) link.ariaCurrent = "true";
    const stages = Object.entries(run.stages).map(([name, [step, end]]) => `${name} ${step}/${end}`).join(", ");
    const loss = run.loss === null ? "" : run.loss.toFixed(4);
    return make("tr", {}, make("td", {}, link), ...[run.state, stages, loss, run.last ?? "never"].map((text) => make("td", { textContent: text })));
  });
  const head = make("tr", {}, ...["Run", "State", "Steps", "Loss", "Last"].map((text) => make("th", { textContent: text })));
  return byId("run-list").replaceChildren(make("div", { className: "scroll" }, make("table", {}, head, ...rows)));
}

function detail(run) {
  const parts = [make("h2", { textContent: run.name })];
  if (run.why) parts.push(make("p", { className: "empty", textContent: run.why }));
  for (const [stage, { curves, samples }] of Object.entries(run.details)) {
    const series = Object.entries(curves).filter(([name]) => !TIMES.includes(name));
    if (series.length === 0) continue;
    parts.push(make("h3", { textContent: stage }));
    parts.push(make("div", { className: "curves" }, ...series.map(([name, points]) => plot(name, points))));
    const path = `/api/runs/${encodeURIComponent(run.name)}/${encodeURIComponent(stage)}`;
    const latest = samples.slice(-6).reverse().map((file) => {
      const image = picture({ src: `${path}/${file}`, alt: `Validation pictures, ${file}` });
      return make("figure", {}, image, make("figcaption", { textContent: file }));
    });
    parts.push(make("div", { className: "grid" }, ...latest));
  }
  byId("run").replaceChildren(...parts);
}

/** A line over steps with the ends of its axes written at them. */
function plot(name, points) {
  const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const across = (x) => EDGE + ((x - left) / (right - left || 1)) * (WIDTH - EDGE - 8);
  const up = (y) => HEIGHT - 22 - ((y - low) / (high - low || 1)) * (HEIGHT - 46);
  const line = points.map(([x, y], place) => `${place ? "L" : "M"}${across(x).toFixed(1)} ${up(y).toFixed(1)}`).join("");
  const svg = svgElement("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${name}, now ${short(ys.at(-1))}` });
  svg.append(
    svgElement("path", { d: points.length === 1 ? `${line}h1` : line }),
    text(EDGE, 14, `${name.replaceAll("_", " ")}: ${short(ys.at(-1))}`),
    text(2, up(high) + 4, short(high)), text(2, up(low) + 4, short(low)),
    text(EDGE, HEIGHT - 6, `step ${Math.round(left)}`), text(WIDTH - 8, HEIGHT - 6, Math.round(right), "end"),
  );
  return svg;
}

function svgElement(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function text(x, y, content, anchor = "start") {
  const element = svgElement("text", { x, y, "text-anchor": anchor });
  element.textContent = content;
  return element;
}

const short = (number) => (number === 0 || (Math.abs(number) >= 0.01 && Math.abs(number) < 10000) ? String(+number.toPrecision(3)) : number.toExponential(1));
