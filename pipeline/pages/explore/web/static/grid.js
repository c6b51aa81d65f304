// A grid of any length of which only the visible part is in the document; its items are fetched by pages.

import { h } from "./dom.js";
import { sayError } from "./state.js";

const PAGE = 60;
const MARGIN = 600;

export class Grid {
  // load(offset, limit) -> {total, items}; render(item, index) -> element; height(width) -> pixels
  constructor({ load, render, minWidth, height, gap = 12, columns = 0, scroller = null, onTotal = () => {}, none = null }) {
    Object.assign(this, { load, render, minWidth, height, gap, fixed: columns, scroller, onTotal, none });
    this.element = h("div", { class: "grid", role: "list" });
    this.shown = new Map();
    this.controller = new AbortController();
    const options = { passive: true, signal: this.controller.signal };
    (scroller ?? window).addEventListener("scroll", () => this.schedule(), options);
    this.observer = new ResizeObserver(() => this.measure());
    this.observer.observe(this.element);
    this.reset();
  }

  reset() {
    this.items = new Map();
    this.waiting = new Set();
    this.total = null;
    this.generation = (this.generation ?? 0) + 1;
    this.element.querySelector(".empty")?.remove();
    this.element.classList.remove("is-empty");
    this.clear();
    this.fetchPage(0);
  }

  destroy() {
    this.controller.abort();
    this.observer.disconnect();
    this.generation += 1;
  }

  clear() {
    for (const element of this.shown.values()) element.remove();
    this.shown.clear();
  }

  measure() {
    const width = this.element.clientWidth;
    if (!width) return;
    const fitting = Math.floor((width + this.gap) / (this.minWidth + this.gap));
    this.columns = this.fixed || Math.max(1, fitting);
    this.width = (width - this.gap * (this.columns - 1)) / this.columns;
    this.rowHeight = Math.round(this.height(this.width)) + this.gap;
    this.clear();
    this.update();
  }

  schedule() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = 0;
      this.update();
    });
  }

  update() {
    if (!this.columns) return;
    const number = this.total ?? this.columns * 3;
    const rows = Math.ceil(number / this.columns);
    this.element.style.height = `${Math.max(0, rows * this.rowHeight - this.gap)}px`;
    const box = this.element.getBoundingClientRect();
    const view = this.scroller ? this.scroller.getBoundingClientRect() : { top: 0, bottom: window.innerHeight };
    const first = Math.max(0, Math.floor((view.top - MARGIN - box.top) / this.rowHeight)) * this.columns;
    const last = Math.min(number, (Math.floor((view.bottom + MARGIN - box.top) / this.rowHeight) + 1) * this.columns);
    for (const [index, element] of this.shown) {
      if (index < first || index >= last) {
        if (element.contains(document.activeElement)) continue; // the keyboard is there
        element.remove();
        this.shown.delete(index);
      }
    }
    for (let index = first; index < last; index += 1) this.show(index);
  }

  show(index) {
    const known = this.shown.get(index);
    const item = this.items.get(index);
    if (known && (known.dataset.ready || !item)) return;
    if (!item && this.total !== null) this.fetchPage(Math.floor(index / PAGE) * PAGE);
    const element = item ? this.render(item, index) : h("div", { class: "skeleton" });
    if (item) element.dataset.ready = "1";
    element.dataset.index = index;
    element.setAttribute("role", "listitem");
    const [row, column] = [Math.floor(index / this.columns), index % this.columns];
    Object.assign(element.style, {
      transform: `translate(${column * (this.width + this.gap)}px, ${row * this.rowHeight}px)`,
      width: `${this.width}px`,
      height: `${this.rowHeight - this.gap}px`,
    });
    if (known) known.replaceWith(element);
    else this.insert(element, index);
    this.shown.set(index, element);
  }

  insert(element, index) {
    // in the order of the list, so that the keyboard goes through it in this order
    let before = null;
    for (const [other, found] of this.shown) {
      if (other > index && (before === null || other < Number(before.dataset.index))) before = found;
    }
    this.element.insertBefore(element, before);
  }

  async fetchPage(offset) {
    if (this.waiting.has(offset)) return;
    this.waiting.add(offset);
    const { generation } = this;
    try {
      const { total, items } = await this.load(offset, PAGE);
      if (generation !== this.generation) return;
      items.forEach((item, number) => this.items.set(offset + number, item));
      const first = this.total === null;
      this.total = total;
      if (first) this.begin();
      this.update();
    } catch (error) {
      if (generation === this.generation) sayError(error);
    }
  }

  begin() {
    this.clear();
    this.onTotal(this.total);
    if (this.total === 0 && this.none) this.element.append(this.none());
    this.element.classList.toggle("is-empty", this.total === 0);
  }

  refresh() {
    this.clear();
    this.update();
  }
}
