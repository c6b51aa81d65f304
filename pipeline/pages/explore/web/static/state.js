// What all views share: the run, colors of domains, messages, edits.

import { fill, h, icon } from "./dom.js";
import { getJson, postJson } from "./net.js";

export const state = { run: null };

const PALETTE = ["#4c78d6", "#e5803a", "#2fa36b", "#c94f8f", "#8a63d2", "#c7a21c", "#2aa5b5", "#d6503f", "#7d8b2e", "#a3714f", "#5f9ee6", "#b05ac0"];

export function hue(position) {
  if (position < PALETTE.length) return PALETTE[position];
  return `hsl(${(position * 137.508) % 360} 58% ${position % 2 ? 48 : 60}%)`;
}

export const thumbnail = (row) => `/thumbnails/${row}?v=${state.run.version}`;
export const picture = (row) => `/pictures/${row}?v=${state.run.version}`;
export const original = (row) => `/originals/${row}?v=${state.run.version}`;
export const clusterTitle = (cluster) => cluster.name || `Cluster ${cluster.group}`;
export const imageLink = (row) => `#/image/${row}`;
export const clusterLink = (cluster) => `#/cluster/${cluster.granularity}/${cluster.group}`;

export async function loadRun() {
  state.run = await getJson("/api/run");
  const { run } = state;
  document.title = `${run.name} · Grappa`;
  document.getElementById("run-name").textContent = run.name;
  document.getElementById("undo").hidden = !run.can_undo;
  const notices = run.notices.map((text) => h("p", {}, text));
  fill(document.getElementById("notices"), notices);
}

export function say(text, { kind = "info", action = null, label = "" } = {}) {
  const toast = h("div", { class: `toast ${kind}` }, h("p", {}, text));
  for (const older of document.querySelectorAll(".toast.info")) older.remove(); // an older Undo would take back this one
  const remove = () => toast.remove();
  if (action) toast.append(h("button", { type: "button", onclick: () => (remove(), action()) }, label));
  toast.append(h("button", { type: "button", class: "icon", "aria-label": "Close", onclick: remove }, icon("close")));
  document.getElementById("toasts").append(toast);
  setTimeout(remove, kind === "error" ? 12000 : 6000);
}

export const sayError = (error) => error.name !== "AbortError" && say(error.message, { kind: "error" });

let redraw = () => {};
export const onRedraw = (call) => (redraw = call);

export async function edit(path, content, done) {
  const before = state.run.read_only;
  if (before) return say(before, { kind: "error" });
  try {
    const answer = await postJson(path, content);
    await loadRun();
    say(done, { action: undo, label: "Undo" });
    return answer;
  } catch (error) {
    sayError(error);
  }
}

export async function undo() {
  try {
    const { granularity } = await postJson("/api/undo", {});
    await loadRun();
    say(granularity ? `Took the last change of ${granularity} back.` : "There is nothing to take back.");
    redraw();
  } catch (error) {
    sayError(error);
  }
}
