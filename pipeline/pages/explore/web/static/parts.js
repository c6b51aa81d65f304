// Pieces that several views are made of: pictures of images, cards of clusters, bars of domains, attention.

import { append, cosine, count, h, percent, plural } from "./dom.js";
import { clusterLink, clusterTitle, hue, imageLink, original, picture, state, thumbnail } from "./state.js";

export function describe(image) {
  return [image.domain, image.label].filter(Boolean).join(", ");
}

export const nameOf = (image) => image.label ?? image.path.split("/").pop();

export function photo(row, alt, { large = false } = {}) {
  const source = large ? picture(row) : thumbnail(row);
  const element = h("img", { src: source, alt, loading: "lazy", decoding: "async", draggable: false });
  element.addEventListener("error", () => element.classList.add("broken"), { once: true });
  return element;
}

export function fullPhoto({ row, original: there }, alt) {
  // the decoded image at once, the original in its place when it has come, if it is still there
  const element = photo(row, alt, { large: true });
  element.loading = "eager";
  if (!there) return element;
  const better = new Image();
  better.addEventListener("load", () => better.naturalWidth > element.naturalWidth && (element.src = better.src));
  better.src = original(row);
  return element;
}

export function swatch(position) {
  return h("span", { class: "swatch", style: { background: hue(position) }, "aria-hidden": "true" });
}

export function domainBar(domains, size) {
  const names = state.run.domains;
  const words = domains.map(([code, number]) => `${names[code].name} ${percent(number / size)}`).join(", ");
  const parts = domains.map(([code, number]) => h("span", { style: { background: hue(code), flexGrow: number } }));
  return h("div", { class: "mix", role: "img", "aria-label": words, title: words }, parts);
}

export function domainWords(domains, size, most = 3) {
  const names = state.run.domains;
  const shown = domains.slice(0, most).map(([code, number]) =>
    h("span", { class: "key" }, swatch(code), `${names[code].name} ${percent(number / size)}`));
  if (domains.length > most) shown.push(h("span", { class: "key" }, `and ${domains.length - most} more`));
  return h("div", { class: "keys" }, shown);
}

export function domainLegend() {
  const keys = state.run.domains.map(({ name, count: number }, code) =>
    h("span", { class: "key" }, swatch(code), name, h("small", {}, count(number))));
  return h("div", { class: "keys" }, keys);
}

export function purityWords(cluster) {
  if (cluster.purity === null) return null;
  const label = cluster.label.split("/").pop();
  const title = `${percent(cluster.purity)} of its ${plural(cluster.labelled, "labelled image")} are ${cluster.label}`;
  const of = cluster.labelled < cluster.size ? ` of ${count(cluster.labelled)} labelled:` : "";
  return h("span", { class: "purity", title }, `${percent(cluster.purity)}${of} ${label}`);
}

export function mosaic(cluster, most = 6) {
  return h("div", { class: `mosaic of-${Math.min(most, cluster.medoids.length)}` }, cluster.medoids.slice(0, most).map((row) => photo(row, "")));
}

export function clusterCard(cluster, { note = null, selected = null } = {}) {
  const text = h("div", { class: "card-text" },
    h("div", { class: "card-title" }, h("strong", { title: clusterTitle(cluster) }, clusterTitle(cluster)), h("span", { class: "number" }, count(cluster.size))),
    domainBar(cluster.domains, cluster.size),
    h("div", { class: "card-note" }, note ?? purityWords(cluster) ?? domainName(cluster)));
  const link = h("a", { class: "card", href: clusterLink(cluster), "aria-label": `${clusterTitle(cluster)}, ${plural(cluster.size, "image")}` }, mosaic(cluster), text);
  if (selected) {
    link.setAttribute("aria-pressed", String(selected.has(cluster.group)));
    link.classList.toggle("chosen", selected.has(cluster.group));
  }
  return link;
}

const domainName = (cluster) => state.run.domains[cluster.domains[0][0]].name;

export function clusterStrip(title, clusters, note, more = () => null) {
  if (!clusters.length) return null;
  const cards = clusters.map((cluster) => h("div", { class: "strip-item" }, clusterCard(cluster, { note: note(cluster) }), more(cluster)));
  return h("section", { class: "strip" }, h("h2", {}, title), h("div", { class: "strip-row", tabindex: "0", role: "group", "aria-label": title }, cards));
}

export function imageTile(image, { note = null, mark = null, href = imageLink(image.row) } = {}) {
  const code = state.run.domains.findIndex(({ name }) => name === image.domain);
  return h("a", { class: `tile ${mark ?? ""}`, href, title: image.path, "data-row": image.row },
    photo(image.row, describe(image)),
    h("span", { class: "tile-text" }, swatch(code), h("span", { class: "tile-name" }, nameOf(image)), note !== null && h("span", { class: "number" }, note)));
}

export function attention(found) {
  const { granularities, mean, blocks } = found;
  const rows = granularities.map((name, g) =>
    h("div", { class: "attention-row" }, h("span", {}, name),
      h("div", { class: "track" }, h("div", { class: "level", style: { width: `${mean[g] * 100}%` } })), h("span", { class: "number" }, percent(mean[g]))));
  const heads = granularities.map((name) => h("th", { scope: "col" }, name));
  const lines = blocks.map((values, block) =>
    h("tr", {}, h("th", { scope: "row" }, block + 1), values.map((value) => {
      const cell = h("td", {}, value.toFixed(2));
      cell.style.setProperty("--level", `${Math.round(value * 60)}%`);
      return cell;
    })));
  return h("section", { class: "attention" }, h("h2", {}, "Attention over the granularities"), rows,
    h("details", {}, h("summary", {}, "By block"), h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Block"), heads)), h("tbody", {}, lines))));
}

export function comparison(found, reference) {
  // the nearest images before and after, rank by rank; a mark tells which have the label of the query
  const { models, meanings } = state.run;
  const before = new Set(found.zero_shot.map(({ row }) => row));
  const side = (title, model, images, others) =>
    h("section", { class: "side", "aria-label": `${title}: ${model}` },
      h("header", {}, h("h2", {}, title), h("p", { title: meanings[model] ?? "" }, model, score(images, reference))),
      images.length ? h("div", { class: "tiles" }, images.map((image) => {
        const tile = imageTile(image, { note: cosine(image.similarity), mark: mark(image, reference) });
        if (others && !others.has(image.row)) tile.append(h("span", { class: "badge" }, "new"));
        return tile;
      })) : h("p", { class: "muted" }, "No image of this kind can be found."));
  return h("div", { class: "sides" },
    side("Before", models.before, found.zero_shot, null),
    side("After", models.after, found.results, before));
}

const mark = (image, reference) => {
  if (!reference?.label || !image.label) return null;
  return image.label === reference.label && image.domain === reference.domain ? "right" : "wrong";
};

function score(images, reference) {
  const known = images.filter((image) => mark(image, reference));
  if (!known.length) return null;
  const right = known.filter((image) => mark(image, reference) === "right").length;
  return h("span", { class: "score" }, `${right} of ${known.length} with its label`);
}

export function facts(pairs) {
  const list = h("dl", { class: "facts" });
  for (const [name, value] of pairs) if (value !== null && value !== undefined && value !== "" && value !== false) append(list, [h("dt", {}, name), h("dd", {}, value)]);
  return list;
}
