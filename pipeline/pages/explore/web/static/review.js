// Images that are the same or nearly the same, and images that are like no other.

import { empty, field, fill, h, option, plural, progressBar, debounce } from "./dom.js";
import { getJson, query } from "./net.js";
import { Grid } from "./grid.js";
import { imageTile, photo, describe } from "./parts.js";
import { imageLink, state } from "./state.js";

const left = { kind: "files", threshold: 0.95, domain: "" };

// Call ``done`` when the server knows the neighbours of all images; show how far it is until then.
function whenReady(area, path, done) {
  let stopped = false;
  const bar = progressBar("Comparing every image with every other …");
  const ask = async () => {
    try {
      const found = await getJson(path);
      if (stopped) return;
      if (found.status !== 202) return done();
      if (!bar.isConnected) fill(area, bar);
      bar.set(found.progress);
      setTimeout(ask, 500);
    } catch (error) {
      if (!stopped) fill(area, empty("This cannot be shown", error.message));
    }
  };
  ask();
  return () => (stopped = true);
}

export function duplicatesView(main) {
  const area = h("div", {});
  let stop = () => {};
  let grid = null;
  const total = h("p", { class: "muted push", role: "status" });
  const path = (offset, limit) => `/api/duplicates?${query({ kind: left.kind, threshold: left.threshold, offset, limit })}`;
  const threshold = h("input", { type: "range", min: 0.8, max: 0.999, step: 0.001, value: left.threshold, oninput: () => (shown.textContent = Number(threshold.value).toFixed(3)) });
  const shown = h("output", {}, Number(left.threshold).toFixed(3));
  threshold.addEventListener("input", debounce(() => ((left.threshold = threshold.value), grid?.reset()), 250));
  const slider = h("label", { class: "field" }, h("span", {}, "Similarity at least"), h("span", { class: "slider" }, threshold, shown));
  const kinds = { files: "The same file", near: "Nearly the same" };
  const segments = h("div", { class: "segments", role: "group", "aria-label": "Kind" }, Object.entries(kinds).map(([kind, text]) =>
    h("button", { type: "button", "data-kind": kind, onclick: () => ((left.kind = kind), open()) }, text)));

  function open() {
    stop();
    grid?.destroy();
    total.textContent = "";
    slider.hidden = left.kind !== "near";
    for (const button of segments.children) button.setAttribute("aria-pressed", String(button.dataset.kind === left.kind));
    stop = whenReady(area, path(0, 1), () => {
      grid = new Grid({
        load: (offset, limit) => getJson(path(offset, limit)),
        render: group,
        minWidth: 300,
        height: () => 178,
        gap: 14,
        onTotal: (number) => (total.textContent = plural(number, "group")),
        none: () => left.kind === "files"
          ? empty("No file is there twice", "All images have different bytes. Look for those that are nearly the same.")
          : empty("Nothing is so similar", "Lower the similarity to see more."),
      });
      fill(area, grid.element);
    });
  }
  main.append(h("div", { class: "head" }, h("div", {}, h("h1", {}, "Duplicates"),
    h("p", { class: "muted" }, "Copies make results look better than they are, above all where one is in train and one in test."))),
    h("div", { class: "toolbar" }, segments, slider, total), area);
  open();
  return { destroy: () => (stop(), grid?.destroy()) };
}

function group(found) {
  const splits = [...new Set(found.images.map(({ split }) => split).filter(Boolean))];
  const title = [plural(found.size, "image"), found.similarity < 1 ? `similarity ${found.similarity.toFixed(3)}` : null].filter(Boolean).join(" · ");
  return h("section", { class: "panel dup" },
    h("header", {}, h("strong", {}, title), splits.length > 1 && h("span", { class: "badge warn" }, "in train and test")),
    h("div", { class: "dup-row" }, found.images.map((image) => h("a", { href: imageLink(image.row), title: image.path, "aria-label": describe(image) }, photo(image.row, describe(image))))));
}

export function outliersView(main) {
  const area = h("div", {});
  const path = (offset, limit) => `/api/outliers?${query({ domain: left.domain, offset, limit })}`;
  let grid = null;
  const domain = h("select", { onchange: () => ((left.domain = domain.value), grid?.reset()) }, option("", "all", left.domain), state.run.domains.map(({ name }) => option(name, name, left.domain)));
  const stop = whenReady(area, path(0, 1), () => {
    grid = new Grid({
      load: (offset, limit) => getJson(path(offset, limit)),
      render: (image) => imageTile(image, { note: image.loneliness.toFixed(2) }),
      minWidth: window.innerWidth < 500 ? 100 : 140,
      height: (width) => width + 30,
      gap: window.innerWidth < 500 ? 8 : 12,
      none: () => empty("No images", "This domain has none."),
    });
    fill(area, grid.element);
  });
  main.append(h("div", { class: "head" }, h("div", {}, h("h1", {}, "Outliers"),
    h("p", { class: "muted" }, "Images that are least like their ten nearest images, by the deployed model: often wrong, broken, or rare. The number is 1 minus the mean similarity."))),
    h("div", { class: "toolbar" }, state.run.domains.length > 1 && field("Of domain", domain)), area);
  return { destroy: () => (stop(), grid?.destroy()) };
}

