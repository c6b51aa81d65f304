// One cluster: its images, what lies near it, what it is made of at the finer granularity; naming and splitting it.

import { count, empty, field, fill, h, icon, option, percent, plural } from "./dom.js";
import { getJson, query } from "./net.js";
import { Grid } from "./grid.js";
import { clusterStrip, domainBar, domainWords, imageTile, mosaic } from "./parts.js";
import { clusterLink, clusterTitle, edit, state } from "./state.js";

export async function clusterView(main, [granularity, group]) {
  const path = `/api/clusters/${encodeURIComponent(granularity)}`;
  const cluster = await getJson(`${path}/${encodeURIComponent(group)}`);
  const editable = !state.run.read_only;
  let selected = null;

  const order = h("select", { onchange: () => images.reset() }, option("typical", "Most typical first", "typical"), option("atypical", "Least typical first", "typical"));
  const images = new Grid({
    load: (offset, limit) => getJson(`${path}/${group}/images?${query({ order: order.value, offset, limit })}`),
    render: (image) => {
      const tile = imageTile(image);
      if (selected) {
        tile.classList.toggle("chosen", selected.has(image.row));
        tile.setAttribute("aria-pressed", String(selected.has(image.row)));
        tile.addEventListener("click", (event) => (event.preventDefault(), toggle(image.row, tile)));
      }
      return tile;
    },
    minWidth: window.innerWidth < 500 ? 100 : 132,
    height: (width) => width + 30,
    gap: window.innerWidth < 500 ? 8 : 12,
    none: () => empty("No images", "This cluster is empty."),
  });

  const bar = h("div", { class: "selection-bar", hidden: true });
  const choose = h("button", { type: "button", "aria-pressed": "false", onclick: () => setSelecting(!selected) }, "Select images");
  function setSelecting(on) {
    selected = on ? new Set() : null;
    choose.setAttribute("aria-pressed", String(on));
    showBar();
    images.refresh();
  }
  function toggle(row, tile) {
    const on = !selected.delete(row);
    if (on) selected.add(row);
    tile.classList.toggle("chosen", on);
    tile.setAttribute("aria-pressed", String(on));
    showBar();
  }
  function showBar() {
    bar.hidden = !selected;
    if (!selected) return;
    fill(bar, h("span", {}, selected.size ? `${plural(selected.size, "image")} selected` : "Choose the images that do not belong here"),
      h("button", { type: "button", class: "main", disabled: !selected.size || selected.size === cluster.size, onclick: splitOff }, "Make a cluster of them"),
      h("button", { type: "button", class: "quiet", onclick: () => setSelecting(false) }, "Cancel"));
  }
  async function splitOff() {
    const made = await edit(`${path}/split_off`, { rows: [...selected] }, `Made a cluster of ${plural(selected.size, "image")}.`);
    if (made) location.hash = clusterLink({ granularity, group: made.groups[0] });
  }

  async function split(parts) {
    const made = await edit(`${path}/split`, { group: cluster.group, parts }, `Split into ${parts}.`);
    if (made) window.dispatchEvent(new HashChangeEvent("hashchange"));
  }
  async function merge(other) {
    if (await edit(`${path}/merge`, { groups: [cluster.group, other.group] }, `Merged ${clusterTitle(other)} into it.`)) {
      window.dispatchEvent(new HashChangeEvent("hashchange"));
    }
  }

  main.append(
    h("a", { class: "back", href: `#/clusters/${granularity}` }, icon("back"), `All clusters of ${granularity}`),
    h("div", { class: "cluster-head" },
      h("div", { class: "cluster-face" }, mosaic(cluster)),
      h("div", { class: "cluster-text" },
        title(cluster, editable, path),
        h("p", { class: "lead" }, plural(cluster.size, "image"), purity(cluster)),
        domainBar(cluster.domains, cluster.size), domainWords(cluster.domains, cluster.size, 6),
        h("div", { class: "actions" },
          h("a", { class: "button", href: `#/map?color=${granularity}&show=${cluster.group}` }, "Show on the map"),
          editable && cluster.size > 1 && splitter(cluster, split)))),
    ...[
      clusterStrip(`Finer: what it is at ${finer(granularity)}`, cluster.children, (child) => `${plural(child.overlap, "image")} of it`),
      clusterStrip("Nearest clusters", cluster.neighbors, (other) => `similarity ${other.similarity.toFixed(2)}`,
        (other) => editable && h("button", { type: "button", class: "small", onclick: () => merge(other) }, "Merge into this")),
      clusterStrip("Coarser: where it belongs", cluster.parents, (parent) => `${plural(parent.overlap, "image")} of it`),
    ].filter(Boolean),
    h("div", { class: "toolbar" }, h("h2", {}, "Images"), field("Order", order), h("div", { class: "push" }, editable && choose)),
    bar, images.element);
  return { destroy: () => images.destroy() };
}

function finer(granularity) {
  const names = state.run.granularities.map(({ name }) => name);
  return names[names.indexOf(granularity) + 1] ?? "";
}

function title(cluster, editable, path) {
  const heading = h("h1", {}, clusterTitle(cluster));
  if (!editable) return heading;
  const button = h("button", { type: "button", class: "quiet", onclick: () => open() }, cluster.name ? "Rename" : "Name it");
  const line = h("div", { class: "title-line" }, heading, button);
  function close() {
    fill(line, heading, button);
    button.focus();
  }
  function open() {
    const input = h("input", { type: "text", maxLength: 100, value: cluster.name, placeholder: `Cluster ${cluster.group}`, "aria-label": "Name of the cluster" });
    input.addEventListener("keydown", (event) => event.key === "Escape" && close());
    const form = h("form", { class: "naming" }, input, h("button", { type: "submit", class: "main" }, "Save"), h("button", { type: "button", class: "quiet", onclick: close }, "Cancel"));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const name = input.value.trim();
      const done = name ? `Named “${name}”.` : "Took the name away.";
      if (await edit(`${path}/name`, { group: cluster.group, name }, done)) {
        cluster.name = name;
        heading.textContent = clusterTitle(cluster);
        button.textContent = name ? "Rename" : "Name it";
        close();
      }
    });
    fill(line, form);
    input.select();
  }
  return line;
}

function splitter(cluster, split) {
  const most = Math.min(8, cluster.size);
  const parts = h("select", { "aria-label": "Number of parts" }, Array.from({ length: most - 1 }, (_, number) => option(number + 2, `in ${number + 2}`, 2)));
  return h("span", { class: "joined" }, h("button", { type: "button", onclick: () => split(Number(parts.value)) }, "Split"), parts);
}

function purity(cluster) {
  if (cluster.purity === null) return null;
  return ` · ${percent(cluster.purity)} of ${count(cluster.labelled)} labelled are ${cluster.label}`;
}

