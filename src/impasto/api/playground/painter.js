// Painting a mask over the start picture: strokes that can be undone, by mouse, touch, pen or keys.

import { h, icon, iconButton } from "./dom.js";

const MOST_PIXELS = 1536; // of the longer side: no larger picture is drawn
// How the mask shows over the picture: hatched, so that it is seen on any colour. What is sent is white on black.
const TINTS = ["#d2391c", "#ffe9dc"];

/** Return a function that opens the painter; see `StartField`. */
export function painterIn(dialog) {
  return (start, mask) => new Painting(dialog, start, mask?.strokes ?? []).run();
}

class Painting {
  constructor(dialog, start, strokes) {
    Object.assign(this, { dialog, strokes: [...strokes], erasing: false, stroke: null });
    const scale = Math.min(1, MOST_PIXELS / Math.max(start.width, start.height));
    const [width, height] = [start.width, start.height].map((side) => Math.round(side * scale));
    this.canvas = h("canvas", { width, height, tabindex: "0", role: "application", "aria-label": "Mask. Arrow keys move the brush, space paints, square brackets change its size." });
    this.canvas.id = "mask-canvas";
    this.ring = h("div", { class: "ring", hidden: true });
    this.at = [width / 2, height / 2];
    this.unit = Math.min(width, height) / 100;
    this.hatch = hatched(Math.max(8, Math.round(this.unit * 2.4)));
    const board = h("div", { class: "board", vars: { "--ratio": width / height, "aspect-ratio": `${width} / ${height}` } }, h("img", { src: start.src, alt: "" }), this.canvas, this.ring);
    this.size = h("input", { type: "range", min: 1, max: 40, value: 12, id: "brush-size" });
    this.paintTool = h("button", { type: "button", class: "plain" }, icon("brush"), "Paint");
    this.eraseTool = h("button", { type: "button", class: "plain" }, icon("eraser"), "Erase");
    this.undoTool = iconButton("undo", "Undo", () => this.undo());
    const tools = h("div", { class: "tools" },
      h("div", { class: "tool-pair", role: "group", "aria-label": "Tool" }, this.paintTool, this.eraseTool),
      h("label", { class: "brush", for: "brush-size" }, "Brush", this.size),
      this.undoTool,
      iconButton("invert", "Invert", () => this.push({ invert: true })),
      h("button", { type: "button", class: "plain", id: "mask-clear", onclick: () => this.push({ clear: true }) }, "Clear"),
    );
    const cancel = h("button", { type: "button", class: "plain", onclick: () => this.finish(undefined) }, "Cancel");
    const done = h("button", { type: "button", class: "plain strong", id: "mask-done", onclick: () => this.finish(this.result()) }, "Use the mask");
    dialog.replaceChildren(
      h("header", {}, h("h2", { id: "painter-title" }, "Paint what should change"), cancel, done),
      h("div", { class: "board-room" }, board),
      tools,
    );
    this.paintTool.addEventListener("click", () => this.erase(false));
    this.eraseTool.addEventListener("click", () => this.erase(true));
    this.size.addEventListener("input", () => this.showRing());
    this.listen();
  }

  run() {
    this.erase(false);
    this.draw();
    this.dialog.showModal();
    this.canvas.focus();
    return new Promise((resolve) => {
      this.resolve = resolve;
      this.dialog.addEventListener("close", () => this.finish(undefined), { once: true });
    });
  }

  finish(value) {
    this.resolve(value);
    if (this.dialog.open) this.dialog.close();
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      this.begin(this.point(event));
    });
    canvas.addEventListener("pointermove", (event) => {
      for (const each of event.getCoalescedEvents?.() ?? [event]) if (this.stroke) this.stroke.points.push(this.point(each));
      this.at = this.point(event);
      this.showRing();
      if (this.stroke) this.draw();
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => this.end());
    canvas.addEventListener("pointerleave", () => (this.ring.hidden = true));
    canvas.addEventListener("blur", () => (this.ring.hidden = true));
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("keyup", (event) => event.key === " " && this.end());
  }

  key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (moves[event.key]) {
      const far = this.unit * (event.shiftKey ? 8 : 2);
      this.at = this.at.map((each, i) => Math.min([this.canvas.width, this.canvas.height][i], Math.max(0, each + moves[event.key][i] * far)));
      this.stroke?.points.push(this.at);
    } else if (event.key === " ") {
      if (!this.stroke) this.begin(this.at);
    } else if (event.key === "[" || event.key === "]") this.size.value = Number(this.size.value) + (event.key === "]" ? 2 : -2);
    else if (event.key === "e") this.erase(!this.erasing);
    else if (event.key === "z") this.undo();
    else return;
    event.preventDefault();
    this.draw();
    this.showRing();
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.canvas.width, ((event.clientY - box.top) / box.height) * this.canvas.height];
  }

  begin(point) {
    this.stroke = { erase: this.erasing, size: Number(this.size.value) * this.unit, points: [point] };
    this.push(this.stroke);
  }

  end() {
    this.stroke = null;
  }

  push(stroke) {
    this.strokes.push(stroke);
    this.draw();
  }

  undo() {
    this.strokes.pop();
    this.draw();
  }

  erase(on) {
    this.erasing = on;
    this.paintTool.setAttribute("aria-pressed", String(!on));
    this.eraseTool.setAttribute("aria-pressed", String(on));
  }

  showRing() {
    const scale = this.canvas.clientWidth / this.canvas.width;
    this.ring.hidden = false;
    this.ring.style.inlineSize = this.ring.style.blockSize = `${Number(this.size.value) * this.unit * scale}px`;
    this.ring.style.left = `${this.at[0] * scale}px`;
    this.ring.style.top = `${this.at[1] * scale}px`;
  }

  /** Draw all strokes anew: undo is only a shorter list. */
  draw() {
    const pen = this.canvas.getContext("2d", { willReadFrequently: true });
    const { width, height } = this.canvas;
    pen.clearRect(0, 0, width, height);
    pen.lineCap = pen.lineJoin = "round";
    pen.strokeStyle = pen.fillStyle = pen.createPattern(this.hatch, "repeat");
    for (const stroke of this.strokes) {
      if (stroke.clear) pen.clearRect(0, 0, width, height);
      else if (stroke.invert) {
        pen.globalCompositeOperation = "xor";
        pen.fillRect(0, 0, width, height);
      } else {
        pen.globalCompositeOperation = stroke.erase ? "destination-out" : "source-over";
        drawStroke(pen, stroke);
      }
      pen.globalCompositeOperation = "source-over";
    }
    this.undoTool.disabled = this.strokes.length === 0;
  }

  /** Return the mask, white on black, and how it looks over the picture; null if nothing is painted. */
  result() {
    this.draw();
    const { width, height } = this.canvas;
    const pixels = this.canvas.getContext("2d").getImageData(0, 0, width, height);
    let any = false;
    for (let i = 0; i < pixels.data.length; i += 4) {
      const level = pixels.data[i + 3];
      any ||= level > 0;
      pixels.data.set([level, level, level, 255], i);
    }
    if (!any) return null;
    const sheet = h("canvas", { width, height });
    sheet.getContext("2d").putImageData(pixels, 0, 0);
    return { uri: sheet.toDataURL("image/png"), overlay: this.canvas.toDataURL("image/png"), strokes: this.strokes };
  }
}

/** Return a tile of diagonal stripes without seams. */
function hatched(side) {
  const tile = h("canvas", { width: side, height: side });
  const pen = tile.getContext("2d");
  pen.fillStyle = TINTS[0];
  pen.fillRect(0, 0, side, side);
  pen.fillStyle = TINTS[1];
  for (const corners of [[[0, 0.65], [0.65, 0], [1, 0], [0, 1]], [[0.65, 1], [1, 0.65], [1, 1]]]) {
    pen.beginPath();
    for (const [x, y] of corners) pen.lineTo(x * side, y * side);
    pen.fill();
  }
  return tile;
}

function drawStroke(pen, { size, points }) {
  pen.beginPath();
  pen.arc(...points[0], size / 2, 0, 2 * Math.PI); // a line without length leaves no dot
  pen.fill();
  pen.lineWidth = size;
  pen.beginPath();
  for (const point of points) pen.lineTo(...point);
  pen.stroke();
}
