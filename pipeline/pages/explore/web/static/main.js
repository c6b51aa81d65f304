// The frame of the page: which view the address names, colors, the keyboard, images that are dropped anywhere.

import { append, empty, fill, h, icon } from "./dom.js";
import { loadRun, onRedraw, sayError, undo } from "./state.js";
import { clustersView } from "./clusters.js";
import { clusterView } from "./cluster.js";
import { imageView } from "./image.js";
import { lookupView, useFile } from "./lookup.js";
import { mapView } from "./map.js";
import { duplicatesView, outliersView } from "./review.js";

const VIEWS = {
  clusters: { title: "Clusters", open: clustersView },
  map: { title: "Map", open: mapView },
  search: { title: "Search", open: lookupView },
  duplicates: { title: "Duplicates", open: duplicatesView },
  outliers: { title: "Outliers", open: outliersView },
  cluster: { title: "Cluster", open: clusterView, under: "clusters" },
  image: { title: "Image", open: imageView, under: "search" },
};
const THEMES = ["auto", "light", "dark"];
const THEME_ICONS = { auto: "auto", light: "sun", dark: "moon" };

let open = null;
const scrolled = new Map(); // where each address was left, to come back to

function route() {
  const [path, words = ""] = (location.hash.slice(2) || "clusters").split("?");
  try {
    const [name, ...rest] = path.split("/").map(decodeURIComponent);
    return { name, rest, given: Object.fromEntries(new URLSearchParams(words)) };
  } catch {
    return { name: "", rest: [], given: {} }; // an address that nobody has written
  }
}

let shownHash = null;
async function show({ keep = false } = {}) {
  const { name, rest, given } = route();
  const view = VIEWS[name];
  const main = document.getElementById("main");
  open?.destroy?.();
  open = null;
  fill(main);
  main.className = `view view-${name}`;
  for (const tab of document.querySelectorAll("#tabs a")) {
    const here = tab.dataset.view === (view?.under ?? name);
    if (here) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  if (!view) {
    main.append(empty("There is no such view", "Choose one above."));
    return;
  }
  const moved = shownHash !== null && shownHash !== location.hash;
  shownHash = location.hash;
  try {
    open = (await view.open(main, rest, given)) ?? null;
  } catch (error) {
    if (error.status) fill(main, empty("This cannot be shown", error.message));
    else throw error;
  }
  if (moved && !keep) {
    const place = scrolled.get(location.hash) ?? 0;
    requestAnimationFrame(() => window.scrollTo(0, place));
    main.focus({ preventScroll: true });
  }
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  const button = document.getElementById("theme");
  fill(button, icon(THEME_ICONS[name]));
  button.setAttribute("aria-label", `Colors: ${name}`);
  button.title = `Colors: ${name}`;
  try {
    localStorage.setItem("grappa-theme", name);
  } catch {
    // private windows may keep nothing
  }
  window.dispatchEvent(new Event("themechange"));
}

function knownTheme() {
  try {
    return THEMES.includes(localStorage.getItem("grappa-theme")) ? localStorage.getItem("grappa-theme") : "auto";
  } catch {
    return "auto";
  }
}

function watchDrops() {
  const hint = document.getElementById("drop-hint");
  let depth = 0;
  const holdsFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  window.addEventListener("dragenter", (event) => {
    if (!holdsFile(event)) return;
    depth += 1;
    hint.hidden = false;
  });
  window.addEventListener("dragleave", () => {
    depth = Math.max(0, depth - 1);
    hint.hidden = depth === 0;
  });
  window.addEventListener("dragover", (event) => holdsFile(event) && event.preventDefault());
  window.addEventListener("drop", (event) => {
    depth = 0;
    hint.hidden = true;
    const file = event.dataTransfer?.files?.[0];
    if (!file) return;
    event.preventDefault();
    take(file);
  });
  window.addEventListener("paste", (event) => {
    const file = event.clipboardData?.files?.[0];
    if (file) take(file);
  });
}

function take(file) {
  useFile(file);
  if (location.hash === "#/search") show();
  else location.hash = "#/search";
}

function watchKeys() {
  window.addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input, textarea, select, dialog");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const tabs = ["clusters", "map", "search", "duplicates", "outliers"];
    const number = Number(event.key) - 1;
    if (number in tabs) location.hash = `#/${tabs[number]}`;
    else if (event.key === "/") {
      const field = document.querySelector("main input[type=search]");
      if (!field) return;
      field.focus();
      event.preventDefault();
    }
  });
}

async function start() {
  setTheme(knownTheme());
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
  });
  document.getElementById("undo").addEventListener("click", undo);
  const tabs = Object.entries(VIEWS).filter(([, view]) => !view.under);
  append(document.getElementById("tabs"), tabs.map(([name, { title }]) => h("a", { href: `#/${name}`, "data-view": name }, title)));
  onRedraw(() => show({ keep: true }));
  watchDrops();
  watchKeys();
  history.scrollRestoration = "manual";
  window.addEventListener("scroll", () => shownHash === location.hash && scrolled.set(location.hash, window.scrollY), { passive: true });
  try {
    await loadRun();
  } catch (error) {
    fill(document.getElementById("main"), empty("The run cannot be shown", error.message));
    return;
  }
  window.addEventListener("hashchange", () => show().catch(sayError));
  await show();
  setInterval(() => document.visibilityState === "visible" && loadRun().catch(() => {}), 60000);
}

start();
