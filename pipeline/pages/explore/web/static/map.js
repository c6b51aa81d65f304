// The map: every image a point, near what its embedding is near to.

import { count, debounce, field, fill, h, icon, option, plural, progressBar } from "./dom.js";
import { getJson, getNumbers, postJson, query } from "./net.js";
import { Grid } from "./grid.js";
import { describe, domainBar, imageTile, photo } from "./parts.js";
import { Plot } from "./plot.js";
import { edit, hue, imageLink, say, sayError, state } from "./state.js";

const left = { space: "after", method: "pca", color: "domain", view: null, selection: [] }; // as it was left
const kept = new Map(); // positions by space and method: they do not change

export async function mapView(main, _, given) {
  const { run } = state;
  if (given.color) Object.assign(left, { color: given.color, shown: given.show === undefined ? null : Number(given.show) });
  let codes = new Int32Array(0);
  let legend = [];
  let hidden = new Set();
  let alive = true;

  const canvas = h("canvas", {});
  const overlay = h("canvas", { class: "overlay", tabindex: "0", role: "application", "aria-label": "Map of the images. Arrow keys move it, plus and minus zoom, Enter opens the image in the middle." });
  const tip = h("div", { class: "tip", hidden: true });
  const note = h("div", { class: "map-note" });
  let lasso = null;
  const stage = h("div", { class: "stage" }, canvas, overlay, note, tip, buttons());
  const side = h("aside", { class: "map-side" });
  const keys = h("div", { class: "legend" });
  const plot = new Plot(canvas, overlay, { hover: showTip, click: (row) => (location.hash = imageLink(row)), select });
  if (left.view) Object.assign(plot.view, left.view);

  function buttons() {
    const button = (name, label, call) => h("button", { type: "button", class: "icon", title: label, "aria-label": label, onclick: call }, icon(name));
    lasso = button("lasso", "Lasso: draw around images to select them (or hold Shift)", () => setLasso(!plot.lassoing));
    lasso.setAttribute("aria-pressed", "false");
    return h("div", { class: "map-buttons" }, button("plus", "Zoom in", () => plot.zoom(1.5)), button("minus", "Zoom out", () => plot.zoom(1 / 1.5)), button("fit", "Show all", () => plot.fit()), lasso);
  }
  function setLasso(on) {
    plot.lassoing = on;
    lasso.setAttribute("aria-pressed", String(on));
    stage.classList.toggle("lassoing", on);
  }

  // ------------------------------------------------------------ the picture under the pointer

  const details = new Map();
  const fetchDetails = debounce(async (row) => {
    if (!details.has(row)) details.set(row, (await postJson("/api/images", { rows: [row] })).items[0]);
    if (plot.hovered === row && alive) tipText.textContent = describe(details.get(row));
  }, 90);
  const tipText = h("p", {});
  function showTip(row, x, y) {
    tip.hidden = row < 0;
    if (row < 0) return;
    if (tip.dataset.row !== String(row)) {
      tip.dataset.row = row;
      tipText.textContent = legend[codes[row]]?.name ?? "";
      fill(tip, photo(row, ""), h("div", {}, tipText, h("a", { href: imageLink(row) }, "Nearest images")));
      fetchDetails(row);
    }
    const box = stage.getBoundingClientRect();
    const [width, height] = [tip.offsetWidth, tip.offsetHeight];
    const tx = Math.min(Math.max(8, x - box.left + 16), box.width - width - 8);
    const below = y - box.top + 18;
    const ty = below + height > box.height ? y - box.top - height - 14 : below;
    Object.assign(tip.style, { left: `${Math.max(8, tx)}px`, top: `${Math.max(8, ty)}px` });
  }

  // ------------------------------------------------------------ colors and what is dimmed

  function paintColors() {
    const unknown = packed(getComputedStyle(stage).getPropertyValue("--unknown").trim() || "#999");
    const table = legend.map((_, code) => packed(hue(code)));
    const colors = new Uint32Array(codes.length);
    for (let i = 0; i < codes.length; i += 1) colors[i] = codes[i] < 0 ? unknown : table[codes[i]];
    plot.setColors(colors);
    paintStrong();
  }
  function paintStrong() {
    const chosen = left.selection.length ? new Set(left.selection) : null;
    if (!hidden.size && !chosen) return plot.setStrong(null);
    const strong = new Uint8Array(codes.length);
    for (let i = 0; i < codes.length; i += 1) strong[i] = !hidden.has(codes[i]) && (!chosen || chosen.has(i)) ? 1 : 0;
    plot.setStrong(strong);
  }
  async function loadColors() {
    const name = encodeURIComponent(left.color);
    const [numbers, words] = await Promise.all([getNumbers(`/api/columns/${name}`, Int32Array), getJson(`/api/legends/${name}`)]);
    if (!alive) return;
    [codes, legend, hidden] = [numbers, words.items, new Set()];
    if (left.shown !== null && left.shown !== undefined) {
      const wanted = legend.findIndex(({ key }) => key === left.shown);
      if (wanted >= 0) hidden = new Set([-1, ...legend.keys()].filter((code) => code !== wanted));
      left.shown = null;
    }
    paintColors();
    showLegend(words.unknown);
  }
  function showLegend(unknown) {
    const most = 60;
    const only = (code) => {
      const all = [-1, ...legend.keys()];
      const alone = hidden.size === all.length - 1 && !hidden.has(code);
      hidden = alone ? new Set() : new Set(all.filter((other) => other !== code));
      paintStrong();
      mark();
    };
    const items = [...legend.keys()].sort((a, b) => legend[b].count - legend[a].count).slice(0, most);
    const shownFirst = items.find((code) => hidden.size && !hidden.has(code)) === undefined ? [...legend.keys()].filter((code) => hidden.size && !hidden.has(code)) : [];
    const buttons = [...shownFirst, ...items].map((code) => h("button", { type: "button", class: "key", "data-code": code, onclick: () => only(code) },
      h("span", { class: "swatch", style: { background: hue(code) } }), h("span", { class: "key-name" }, legend[code].name), h("small", {}, count(legend[code].count))));
    const mark = () => {
      for (const button of buttons) button.setAttribute("aria-pressed", String(!hidden.has(Number(button.dataset.code))));
    };
    mark();
    fill(keys, buttons, legend.length > most && h("p", { class: "muted" }, `and ${count(legend.length - most)} more`), unknown > 0 && h("p", { class: "muted" }, `${plural(unknown, "image")} without`));
  }

  // ------------------------------------------------------------ positions

  async function loadPositions() {
    const { space, method } = left;
    const key = `${space} ${method}`;
    fill(note);
    try {
      if (!kept.has(key) && method === "tsne" && !(await computed(space))) return;
      if (!kept.has(key)) kept.set(key, await getNumbers(`/api/positions?${query({ space, method })}`, Float32Array));
      if (alive && left.space === space && left.method === method) plot.setPositions(kept.get(key));
    } catch (error) {
      sayError(error);
    }
  }
  async function computed(space) {
    const bar = progressBar("t-SNE …");
    let job = await postJson("/api/tsne", { space });
    while (job.state === "running") {
      if (!alive || left.space !== space || left.method !== "tsne") return false;
      if (!bar.isConnected) fill(note, bar);
      bar.set(job.progress);
      await new Promise((done) => setTimeout(done, 500));
      job = await getJson(`/api/tsne?${query({ space })}`);
    }
    fill(note);
    if (job.state !== "done") throw new Error(job.error);
    return true;
  }

  // ------------------------------------------------------------ what is selected

  let grid = null;
  function select(rows) {
    left.selection = rows;
    setLasso(false);
    paintStrong();
    showSide();
    if (!rows.length) say("No image lies within the lasso.");
  }
  function showSide() {
    grid?.destroy();
    grid = null;
    const rows = left.selection;
    stage.parentElement?.classList.toggle("selecting", rows.length > 0);
    if (!rows.length) {
      fill(side, h("h2", {}, "Legend"), h("p", { class: "muted" }, "Choose one to see it alone."), keys);
      return;
    }
    const scroller = h("div", { class: "side-scroll" });
    grid = new Grid({
      load: async (offset, limit) => ({ total: rows.length, items: (await postJson("/api/images", { rows: rows.slice(offset, offset + limit) })).items }),
      render: (image) => imageTile(image),
      minWidth: 84, height: (width) => width + 26, gap: 8, scroller,
    });
    scroller.append(grid.element);
    fill(side, h("div", { class: "side-head" }, h("h2", {}, `${plural(rows.length, "image")} selected`), h("button", { type: "button", class: "icon", "aria-label": "Select none", onclick: () => select0() }, icon("close"))),
      mix(rows), !run.read_only && run.granularities.length > 0 && maker(rows), scroller);
  }
  function select0() {
    left.selection = [];
    paintStrong();
    showSide();
    overlay.focus();
  }
  function mix(rows) {
    const box = h("div", {});
    getNumbers("/api/columns/domain", Int32Array).then((domains) => {
      const counts = new Map();
      for (const row of rows) counts.set(domains[row], (counts.get(domains[row]) ?? 0) + 1);
      box.append(domainBar([...counts].sort((a, b) => b[1] - a[1]), rows.length));
    }, sayError);
    return box;
  }
  function maker(rows) {
    const own = run.granularities.some(({ name }) => name === left.color) ? left.color : run.granularities[0].name;
    const level = h("select", { "aria-label": "Granularity" }, run.granularities.map(({ name }) => option(name, name, own)));
    const name = h("input", { type: "text", maxLength: 100, placeholder: "Name of a new cluster", "aria-label": "Name of the new cluster" });
    const form = h("form", { class: "maker" }, name, h("div", { class: "joined" }, level, h("button", { type: "submit" }, "Make it")));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const made = await edit(`/api/clusters/${level.value}/split_off`, { rows, name: name.value }, `Made a cluster of ${plural(rows.length, "image")}.`);
      if (made) location.hash = `#/cluster/${level.value}/${made.groups[0]}`;
    });
    return form;
  }

  // ------------------------------------------------------------ the view

  const choices = [["domain", "domain"], ...(run.num_labels ? [["label", "label"]] : []), ...(run.splits.length ? [["split", "split"]] : []), ...run.granularities.map(({ name }) => [name, `cluster (${name})`])];
  if (!choices.some(([name]) => name === left.color)) left.color = "domain";
  const segments = (name, words, call) => {
    const group = h("div", { class: "segments", role: "group" }, words.map(([value, text, title]) =>
      h("button", { type: "button", title, "aria-pressed": String(left[name] === value), onclick: () => {
        left[name] = value;
        for (const button of group.children) button.setAttribute("aria-pressed", String(button.dataset.value === value));
        call();
      }, "data-value": value }, text)));
    return group;
  };
  main.append(
    h("div", { class: "toolbar map-bar" }, h("h1", {}, "Map"),
      segments("space", [["before", "Before", run.models.before], ["after", "After", run.models.after]], loadPositions),
      segments("method", [["pca", "PCA", "The two directions of largest variance"], ["tsne", "t-SNE", "Neighbourhoods; computed when it is asked for"]], loadPositions),
      field("Color", h("select", { onchange: (event) => ((left.color = event.target.value), loadColors().catch(sayError)) }, choices.map(([value, text]) => option(value, text, left.color))))),
    h("div", { class: "map" }, stage, side));
  showSide();
  const recolor = () => paintColors();
  window.addEventListener("themechange", recolor);
  await Promise.all([loadColors(), loadPositions()]);
  return {
    destroy: () => {
      alive = false;
      left.view = { ...plot.view };
      plot.destroy();
      grid?.destroy();
      window.removeEventListener("themechange", recolor);
    },
  };
}

// A CSS color as a word of canvas pixels.
const painter = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function packed(color) {
  painter.clearRect(0, 0, 1, 1);
  painter.fillStyle = color;
  painter.fillRect(0, 0, 1, 1);
  const [red, green, blue] = painter.getImageData(0, 0, 1, 1).data;
  return (red | (green << 8) | (blue << 16) | (0xff << 24)) >>> 0;
}
