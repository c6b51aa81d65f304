// Points on a canvas: drawn into its pixels, found by a grid of cells; pan, zoom and lasso by pointer and keyboard.

const CELLS = 256;

export class Plot {
  // on: {hover(row | -1, x, y), click(row), select(rows)}
  constructor(canvas, overlay, on) {
    Object.assign(this, { canvas, overlay, on, positions: new Float32Array(0), number: 0 });
    this.colors = new Uint32Array(0);
    this.strong = null; // Uint8Array: 1 where a point is not dimmed; null: all
    this.view = { x: 0.5, y: 0.5, scale: 1 }; // scale: the unit square's side in the shorter side of the canvas
    this.lassoing = false;
    this.hovered = -1;
    this.pointers = new Map();
    this.controller = new AbortController();
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(canvas);
    this.listen();
  }

  destroy() {
    this.controller.abort();
    this.observer.disconnect();
  }

  setPositions(positions) {
    this.positions = positions;
    this.number = positions.length / 2;
    this.index();
    this.draw();
  }

  setColors(colors) {
    this.colors = colors;
    this.draw();
  }

  setStrong(strong) {
    this.strong = strong;
    this.draw();
  }

  index() {
    // counting sort of the points into cells of the unit square; what lies outside is in the cells at its rim
    const { positions, number } = this;
    const cell = (value) => Math.max(0, Math.min(CELLS - 1, Math.floor(value * CELLS)));
    const starts = new Uint32Array(CELLS * CELLS + 1);
    const cells = new Uint32Array(number);
    for (let i = 0; i < number; i += 1) {
      cells[i] = cell(positions[2 * i + 1]) * CELLS + cell(positions[2 * i]);
      starts[cells[i] + 1] += 1;
    }
    for (let i = 0; i < CELLS * CELLS; i += 1) starts[i + 1] += starts[i];
    const next = starts.slice();
    const members = new Uint32Array(number);
    for (let i = 0; i < number; i += 1) members[next[cells[i]]++] = i;
    Object.assign(this, { starts, members, cell });
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    for (const canvas of [this.canvas, this.overlay]) {
      canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
      canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    }
    this.ratio = ratio;
    this.pixels = null;
    this.paint();
  }

  get side() {
    return Math.min(this.canvas.width, this.canvas.height) * this.view.scale;
  }

  toScreen(row) {
    const { side, view, canvas } = this;
    return [canvas.width / 2 + (this.positions[2 * row] - view.x) * side, canvas.height / 2 + (this.positions[2 * row + 1] - view.y) * side];
  }

  toWorld(x, y) {
    const { side, view, canvas } = this;
    return [view.x + (x - canvas.width / 2) / side, view.y + (y - canvas.height / 2) / side];
  }

  get radius() {
    const crowd = Math.sqrt(Math.max(1, this.number) / 2000);
    const size = Math.max(1.6, Math.min(5, 4.2 / Math.pow(crowd, 0.45))) * Math.min(2.2, Math.pow(this.view.scale, 0.25));
    return size * (this.ratio || 1);
  }

  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.paint();
    });
  }

  paint() {
    const { canvas } = this;
    const { width, height } = canvas;
    if (!width || !height || !this.ratio) return;
    const context = canvas.getContext("2d");
    if (!this.pixels || this.pixels.width !== width || this.pixels.height !== height) {
      this.pixels = context.createImageData(width, height);
      this.words = new Uint32Array(this.pixels.data.buffer);
    }
    this.words.fill(0);
    const mask = disc(this.radius);
    this.scale = this.side;
    this.left = width / 2 - this.view.x * this.scale;
    this.top = height / 2 - this.view.y * this.scale;
    const { strong, colors, number } = this;
    if (colors.length === number) {
      if (strong) for (let i = 0; i < number; i += 1) if (!strong[i]) this.stamp(i, (colors[i] & 0xffffff) | 0x38000000, mask);
      for (let i = 0; i < number; i += 1) if (!strong || strong[i]) this.stamp(i, colors[i], mask);
    }
    context.putImageData(this.pixels, 0, 0);
    this.paintOverlay();
  }

  stamp(row, color, mask) {
    const { words, positions, canvas } = this;
    const { width, height } = canvas;
    const x = Math.round(this.left + positions[2 * row] * this.scale) - mask.reach;
    const y = Math.round(this.top + positions[2 * row + 1] * this.scale) - mask.reach;
    if (x < -mask.size || y < -mask.size || x > width || y > height) return;
    const body = color & 0xffffff;
    const alpha = color >>> 24;
    const solid = color >>> 0;
    const { dx, dy, cover } = mask;
    const inside = x >= 0 && y >= 0 && x + mask.size <= width && y + mask.size <= height;
    for (let i = 0; i < cover.length; i += 1) {
      const px = x + dx[i];
      const py = y + dy[i];
      if (!inside && (px < 0 || py < 0 || px >= width || py >= height)) continue;
      const at = py * width + px;
      if (cover[i] === 255 && alpha === 255) {
        words[at] = solid;
        continue;
      }
      const own = (cover[i] * alpha) / 255;
      const there = words[at];
      words[at] = there ? blend(there, body, own) : body | (Math.round(own) << 24);
    }
  }

  paintOverlay() {
    const context = this.overlay.getContext("2d");
    context.clearRect(0, 0, this.overlay.width, this.overlay.height);
    const style = getComputedStyle(this.overlay);
    context.strokeStyle = style.color;
    context.lineWidth = 2 * this.ratio;
    if (this.hovered >= 0 && this.hovered < this.number) {
      const [x, y] = this.toScreen(this.hovered);
      context.beginPath();
      context.arc(x, y, this.radius + 3 * this.ratio, 0, 2 * Math.PI);
      context.stroke();
    }
    if (this.path?.length > 1) {
      context.setLineDash([5 * this.ratio, 4 * this.ratio]);
      context.beginPath();
      this.path.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.closePath();
      context.stroke();
      context.globalAlpha = 0.08;
      context.fillStyle = style.color;
      context.fill();
      context.globalAlpha = 1;
      context.setLineDash([]);
    }
  }

  nearest(x, y, reach) {
    if (!this.number) return -1;
    const [wx, wy] = this.toWorld(x, y);
    const far = reach / this.side;
    let [found, best] = [-1, far * far];
    for (let cy = this.cell(wy - far); cy <= this.cell(wy + far); cy += 1) {
      for (let cx = this.cell(wx - far); cx <= this.cell(wx + far); cx += 1) {
        const c = cy * CELLS + cx;
        for (let i = this.starts[c]; i < this.starts[c + 1]; i += 1) {
          const row = this.members[i];
          if (this.strong && !this.strong[row]) continue;
          const [dx, dy] = [this.positions[2 * row] - wx, this.positions[2 * row + 1] - wy];
          const distance = dx * dx + dy * dy;
          if (distance < best) [found, best] = [row, distance];
        }
      }
    }
    return found;
  }

  inside(path) {
    const points = path.map(([x, y]) => this.toWorld(x, y));
    const xs = points.map(([x]) => x);
    const ys = points.map(([, y]) => y);
    const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const rows = [];
    for (let row = 0; row < this.number; row += 1) {
      const [x, y] = [this.positions[2 * row], this.positions[2 * row + 1]];
      if (x < left || x > right || y < top || y > bottom || (this.strong && !this.strong[row])) continue;
      let within = false;
      for (let i = 0, j = points.length - 1; i < points.length; j = i, i += 1) {
        const [[xi, yi], [xj, yj]] = [points[i], points[j]];
        if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) within = !within;
      }
      if (within) rows.push(row);
    }
    return rows;
  }

  zoom(factor, x = this.canvas.width / 2, y = this.canvas.height / 2) {
    const [wx, wy] = this.toWorld(x, y);
    this.view.scale = Math.max(0.5, Math.min(400, this.view.scale * factor));
    const [nx, ny] = this.toWorld(x, y);
    this.view.x += wx - nx;
    this.view.y += wy - ny;
    this.draw();
  }

  pan(dx, dy) {
    this.view.x -= dx / this.side;
    this.view.y -= dy / this.side;
    this.draw();
  }

  fit() {
    Object.assign(this.view, { x: 0.5, y: 0.5, scale: 1 });
    this.draw();
  }

  hover(row, x = 0, y = 0) {
    if (row === this.hovered && row < 0) return;
    this.hovered = row;
    this.paintOverlay();
    this.on.hover(row, x, y);
  }

  listen() {
    const { signal } = this.controller;
    const { overlay } = this;
    const place = (event) => {
      const box = overlay.getBoundingClientRect();
      return [(event.clientX - box.left) * this.ratio, (event.clientY - box.top) * this.ratio];
    };
    overlay.addEventListener("wheel", (event) => {
      event.preventDefault();
      const step = event.deltaMode === 1 ? event.deltaY * 16 : event.deltaY;
      this.zoom(Math.exp(-Math.max(-120, Math.min(120, step)) * (event.ctrlKey ? 0.01 : 0.002)), ...place(event));
    }, { passive: false, signal });
    overlay.addEventListener("pointerdown", (event) => {
      overlay.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, place(event));
      this.moved = 0;
      if (this.pointers.size === 1 && (this.lassoing || event.shiftKey)) this.path = [place(event)];
      else this.path = null;
    }, { signal });
    overlay.addEventListener("pointermove", (event) => this.move(event, place(event)), { signal });
    const up = (event) => {
      const held = this.pointers.delete(event.pointerId);
      if (this.path?.length > 2) this.on.select(this.inside(this.path));
      else if (held && event.type === "pointerup" && this.moved < 6 * this.ratio) this.tap(event, place(event));
      this.path = null;
      this.paintOverlay();
    };
    overlay.addEventListener("pointerup", up, { signal });
    overlay.addEventListener("pointercancel", up, { signal });
    const leaves = (event) => event.pointerType === "mouse" && !this.pointers.size; // a finger leaves when it is lifted
    overlay.addEventListener("pointerleave", (event) => leaves(event) && this.hover(-1), { signal });
    overlay.addEventListener("keydown", (event) => this.key(event), { signal });
  }

  move(event, now) {
    const before = this.pointers.get(event.pointerId);
    if (!before) {
      const row = this.nearest(...now, Math.max(14 * this.ratio, this.radius * 2));
      this.hover(row, event.clientX, event.clientY);
      return;
    }
    this.pointers.set(event.pointerId, now);
    this.moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
    if (this.path) {
      this.path.push(now);
      this.paintOverlay();
    } else if (this.pointers.size === 2) {
      const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
      const spread = (point) => Math.max(1, Math.hypot(point[0] - other[0], point[1] - other[1]));
      this.zoom(spread(now) / spread(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
      this.pan((now[0] - before[0]) / 2, (now[1] - before[1]) / 2);
    } else if (this.moved > 3 * this.ratio) {
      this.hover(-1);
      this.pan(now[0] - before[0], now[1] - before[1]);
    }
  }

  tap(event, place) {
    const row = this.nearest(...place, Math.max(18 * this.ratio, this.radius * 2));
    if (event.pointerType === "mouse") {
      if (row >= 0) this.on.click(row);
    } else {
      this.hover(row, event.clientX, event.clientY);
    }
  }

  key(event) {
    const step = 60 * this.ratio;
    const keys = {
      ArrowLeft: () => this.pan(step, 0), ArrowRight: () => this.pan(-step, 0), ArrowUp: () => this.pan(0, step), ArrowDown: () => this.pan(0, -step),
      "+": () => this.zoom(1.4), "=": () => this.zoom(1.4), "-": () => this.zoom(1 / 1.4), 0: () => this.fit(),
      Enter: () => {
        const row = this.nearest(this.canvas.width / 2, this.canvas.height / 2, this.canvas.width);
        if (row >= 0) this.on.click(row);
      },
    };
    const act = keys[event.key];
    if (!act || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  }
}

function disc(radius) {
  const reach = Math.ceil(radius + 0.5);
  const [dx, dy, cover] = [[], [], []];
  for (let y = -reach; y <= reach; y += 1) {
    for (let x = -reach; x <= reach; x += 1) {
      const amount = Math.max(0, Math.min(1, radius + 0.5 - Math.hypot(x, y)));
      if (amount > 0) {
        dx.push(x + reach);
        dy.push(y + reach);
        cover.push(Math.round(amount * 255));
      }
    }
  }
  return { reach, size: 2 * reach + 1, dx: Int32Array.from(dx), dy: Int32Array.from(dy), cover: Uint8Array.from(cover) };
}

function blend(under, body, alpha) {
  const share = alpha / 255;
  const below = (under >>> 24) / 255;
  const whole = share + below * (1 - share);
  if (!whole) return 0;
  const part = (shift) => Math.round((((body >>> shift) & 255) * share + ((under >>> shift) & 255) * below * (1 - share)) / whole);
  return (part(0) | (part(8) << 8) | (part(16) << 16) | (Math.round(whole * 255) << 24)) >>> 0;
}
