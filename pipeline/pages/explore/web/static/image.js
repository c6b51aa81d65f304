// One image of the run: what it is, the nearest images before and after, its attention.

import { count, field, fill, h, option, plural } from "./dom.js";
import { getJson, query } from "./net.js";
import { attention, comparison, facts, fullPhoto, imageTile, describe, nameOf } from "./parts.js";
import { clusterLink, clusterTitle, sayError, state } from "./state.js";

export const asked = { k: 12, domain: "" }; // what is asked for stays, from image to image

export async function imageView(main, [row]) {
  const image = await getJson(`/api/images/${encodeURIComponent(row)}`);
  const found = h("div", { class: "found" });
  const load = async () => {
    try {
      fill(found, comparison(await getJson(`/api/images/${image.row}/neighbors?${query(asked)}`), image));
    } catch (error) {
      sayError(error);
    }
  };
  const same = image.same.length ? await Promise.all(image.same.slice(0, 6).map((other) => getJson(`/api/images/${other}`))) : [];
  main.append(h("div", { class: "query" },
    h("div", { class: "query-image" },
      h("div", { class: "frame" }, fullPhoto(image, describe(image))),
      h("h1", {}, nameOf(image))),
    h("aside", { class: "query-about" },
      facts([
        ["Domain", image.domain],
        ["Split", image.split],
        ["Size", `${count(image.width)} × ${count(image.height)} px`],
        ["File", h("span", { class: "path" }, image.file)],
        ["Id", h("code", {}, image.image_id)],
        ["Clusters", image.clusters.length > 0 && image.clusters.map((cluster) => h("a", { href: clusterLink(cluster), title: `distance ${cluster.distance.toFixed(2)} to its centre` }, `${clusterTitle(cluster)} `, h("small", {}, cluster.granularity)))],
        ["Original", image.original ? null : "not there any more"],
        ["Index", image.indexed ? null : "not indexed: searches do not find it"],
      ]),
      same.length > 0 && h("section", {}, h("h2", {}, `${plural(image.same.length, "file")} with the same bytes`), h("div", { class: "tiles" }, same.map((each) => imageTile(each)))),
      image.attention && attention(image.attention)),
    h("div", { class: "query-found" }, controls(load), found)));
  await load();
  return null;
}

export function controls(load) {
  const change = (name) => (event) => {
    asked[name] = event.target.value;
    load();
  };
  return h("div", { class: "toolbar" },
    h("h2", {}, "Nearest images"),
    field("Show", h("select", { onchange: change("k") }, [6, 12, 24, 48, 96].map((k) => option(k, String(k), Number(asked.k))))),
    state.run.domains.length > 1 && field("Of domain", h("select", { onchange: change("domain") }, option("", "all", asked.domain), state.run.domains.map(({ name }) => option(name, name, asked.domain)))));
}
