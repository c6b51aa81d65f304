// Search with an image of one's own: chosen, dropped or pasted; or look an image of the run up.

import { count, debounce, empty, fill, h, icon, plural } from "./dom.js";
import { getJson, postImage, query } from "./net.js";
import { Grid } from "./grid.js";
import { asked, controls } from "./image.js";
import { attention, comparison, facts, imageTile } from "./parts.js";
import { sayError, state } from "./state.js";

let file = null;
let address = null;
const left = { q: "" };

export function useFile(chosen) {
  if (address) URL.revokeObjectURL(address);
  file = chosen;
  address = URL.createObjectURL(chosen);
}

export function lookupView(main) {
  const picker = h("input", { type: "file", accept: "image/*,.heic,.heif,.tif,.tiff,.jp2,.avif", class: "hidden-input", id: "picker", onchange: () => picker.files[0] && (useFile(picker.files[0]), open()) });
  const area = h("div", {});
  const total = h("p", { class: "muted push", role: "status" });
  const grid = new Grid({
    load: (offset, limit) => getJson(`/api/images?${query({ ...left, offset, limit })}`),
    render: (image) => imageTile(image),
    minWidth: window.innerWidth < 500 ? 100 : 120,
    height: (width) => width + 30,
    gap: window.innerWidth < 500 ? 8 : 12,
    onTotal: (number) => (total.textContent = plural(number, "image")),
    none: () => empty("No image is called so", "Paths, ids, labels and domains are looked through."),
  });
  const find = h("input", { type: "search", value: left.q, placeholder: "Path, label, domain or id", "aria-label": "Find images", oninput: debounce(() => ((left.q = find.value), grid.reset()), 200) });

  function open() {
    fill(area, file ? result() : dropzone());
  }
  function dropzone() {
    return h("label", { class: "dropzone", htmlFor: "picker" }, icon("upload"),
      h("strong", {}, "Drop a photograph here, paste it, or choose a file"),
      h("span", { class: "muted" }, `It stays on this machine, and its nearest images are found with both models. At most ${state.run.limits.bytes / 2 ** 20} MiB.`));
  }
  function result() {
    const found = h("div", { class: "found" }, h("div", { class: "working" }, h("p", {}, "Embedding the image …"), h("progress", {})));
    const about = h("aside", { class: "query-about" });
    const load = () => search(found, about);
    const preview = h("img", { src: address, alt: "The image that is searched with" });
    preview.addEventListener("error", () => preview.replaceWith(h("p", { class: "muted" }, "The browser cannot show this format.")));
    const view = h("div", { class: "query" },
      h("div", { class: "query-image" }, h("div", { class: "frame" }, preview), h("h1", {}, file.name),
        h("label", { class: "button", htmlFor: "picker" }, "Another image")),
      about,
      h("div", { class: "query-found" }, controls(load), found));
    load();
    return view;
  }

  main.append(h("div", { class: "head" }, h("h1", {}, "Search")), picker, area,
    h("div", { class: "toolbar" }, h("h2", {}, "Images of the run"), h("div", { class: "field" }, find), total), grid.element);
  open();
  return { destroy: () => grid.destroy() };
}

async function search(found, about) {
  const { bytes } = state.run.limits;
  if (file.size > bytes) {
    fill(found, empty("The file is too large", `It has ${count(Math.ceil(file.size / 2 ** 20))} MiB; ${bytes / 2 ** 20} MiB are taken at most.`));
    return;
  }
  try {
    const answer = await postImage(`/search?${query({ ...asked, compare: "1" })}`, file);
    fill(found, comparison(answer, null));
    const { width, height, same_file: same, attention: seen } = answer.query;
    fill(about, facts([["Size", `${count(width)} × ${count(height)} px`], ["In the run", same.length ? "this very file; it is left out" : "no"]]), seen && attention(seen));
  } catch (error) {
    fill(found, empty("The image cannot be searched with", error.message));
    if (!error.status) sayError(error);
  }
}

