// All clusters of a granularity, as pictures.

import { count, debounce, empty, field, fill, h, option, plural } from "./dom.js";
import { getJson, query } from "./net.js";
import { Grid } from "./grid.js";
import { clusterCard, domainLegend } from "./parts.js";
import { edit, state } from "./state.js";

const SORTS = { size: "Largest first", purity: "Purest first", mixed: "Most mixed domains first", domain: "By domain", number: "By number" };
const left = { sort: "size", q: "" }; // as it was left, for the way back

export function clustersView(main, [wanted]) {
  const { run } = state;
  if (!run.granularities.length) {
    main.append(empty("This run has no clusters", "Its adaptors are trained on labels. The map and the search show its images."));
    return null;
  }
  const granularity = run.granularities.find(({ name }) => name === wanted)?.name ?? left.granularity ?? run.granularities[0].name;
  left.granularity = granularity;
  let selected = null;
  const total = h("p", { class: "muted", role: "status" });

  const grid = new Grid({
    load: (offset, limit) => getJson(`/api/clusters/${granularity}?${query({ ...left, granularity: "", offset, limit })}`),
    render: (cluster) => {
      const card = clusterCard(cluster, { selected });
      if (selected) card.addEventListener("click", (event) => (event.preventDefault(), toggle(cluster.group)));
      return card;
    },
    minWidth: window.innerWidth < 500 ? 150 : 215,
    height: (width) => width + (window.innerWidth < 500 ? 76 : 84),
    gap: window.innerWidth < 500 ? 12 : 18,
    onTotal: (number) => (total.textContent = plural(number, "cluster")),
    none: () => empty("No cluster is called so", "Names, numbers, domains and the most frequent labels are looked through."),
  });

  const sort = h("select", { onchange: () => ((left.sort = sort.value), grid.reset()) },
    Object.entries(SORTS).filter(([key]) => key !== "purity" || run.num_labels).map(([key, text]) => option(key, text, left.sort)));
  const find = h("input", { type: "search", value: left.q, placeholder: "Name, label or domain", oninput: debounce(() => ((left.q = find.value), grid.reset()), 200) });

  const merging = h("div", { class: "selection-bar", hidden: true });
  const choose = h("button", { type: "button", "aria-pressed": "false", onclick: () => setSelecting(!selected) }, "Select to merge");
  function setSelecting(on) {
    selected = on ? new Set() : null;
    choose.setAttribute("aria-pressed", String(on));
    showSelection();
    grid.refresh();
  }
  function toggle(group) {
    if (!selected.delete(group)) selected.add(group);
    showSelection();
    for (const card of grid.element.querySelectorAll("a.card")) {
      const on = selected.has(Number(card.getAttribute("href").split("/").pop()));
      card.classList.toggle("chosen", on);
      card.setAttribute("aria-pressed", String(on));
    }
  }
  function showSelection() {
    merging.hidden = !selected;
    if (!selected) return;
    const number = selected.size;
    fill(merging, h("span", {}, number ? `${plural(number, "cluster")} selected` : "Choose the clusters that are one"),
      h("button", { type: "button", class: "main", disabled: number < 2, onclick: merge }, "Merge"),
      h("button", { type: "button", class: "quiet", onclick: () => setSelecting(false) }, "Cancel"));
  }
  async function merge() {
    const groups = [...selected];
    if (await edit(`/api/clusters/${granularity}/merge`, { groups }, `Merged ${groups.length} clusters.`)) {
      setSelecting(false);
      grid.reset();
    }
  }

  const levels = run.granularities.map(({ name, num_groups: number }) =>
    h("a", { href: `#/clusters/${name}`, "aria-current": name === granularity ? "true" : null, title: name }, count(number)));
  main.append(
    h("div", { class: "head" },
      h("div", {}, h("h1", {}, "Clusters"), h("p", { class: "muted" }, `${plural(run.num_images, "image")}, grouped without labels at ${plural(run.granularities.length, "granularity", "granularities")}.`)),
      domainLegend()),
    h("div", { class: "toolbar" },
      h("div", { class: "field" }, h("span", { id: "level-label" }, "Clusters"), h("nav", { class: "segments", "aria-labelledby": "level-label" }, levels)),
      field("Order", sort), field("Find", find),
      h("div", { class: "push" }, total, !run.read_only && choose)),
    merging, grid.element);
  if (run.verdict) main.querySelector(".head > div").append(h("details", { class: "verdict" }, h("summary", {}, `Adaptation: ${run.verdict.split(".")[0]}`), h("p", {}, run.verdict)));
  return { destroy: () => grid.destroy() };
}
