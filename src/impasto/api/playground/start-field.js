// The start picture, from a file, a drop, the clipboard or an earlier result, and the mask painted on it.

import { pictureSource } from "./api.js";
import { h, icon } from "./dom.js";
import { Field, changed } from "./field.js";

const TAKEN = new Set(["image/png", "image/jpeg", "image/webp"]);
const MOST_BYTES = 8e6; // larger files are scaled down here; the service takes 20 MB, but draws 1536 px at most
const MOST_PIXELS = 2048; // of the longer side

export class StartField extends Field {
  /** `paint(start)` opens the painter and resolves to `{uri, overlay, strokes}`, or null if nothing changed. */
  constructor(name, schema, paint) {
    const file = h("input", { type: "file", accept: "image/*", class: "visually-hidden" });
    const drop = h("label", { class: "drop" }, file, icon("start"), h("span", {}, "Choose, drop or paste a picture"));
    const shown = h("div", { class: "start", hidden: true });
    super(name, schema, { input: file, parts: [drop, shown], label: "Start picture", read: () => this.start?.uri, write: () => {} });
    Object.assign(this, { drop, shown, paint, start: null, mask: null });
    this.maskField = new MaskValue(this);
    file.addEventListener("change", () => {
      if (file.files[0]) this.take(file.files[0]);
      file.value = "";
    });
  }

  /** Take a file of any kind this browser can show. */
  async take(file) {
    try {
      this.set({ ...(await prepared(file)), name: file.name || "pasted picture" });
    } catch {
      this.fail(`${file.name || "this"} is no picture that this browser can read`);
    }
  }

  /** Take a result of the service, by its address. */
  async takeOutput(output) {
    const src = pictureSource(output);
    const { naturalWidth: width, naturalHeight: height } = await loaded(src);
    this.set({ uri: /^https?:/.test(output) ? output : src, src, width, height, name: "an earlier picture" });
  }

  set(start) {
    Object.assign(this, { start, mask: null });
    this.refresh();
    this.element.closest("details")?.setAttribute("open", "");
    changed(this.element);
  }

  drops() {
    Object.assign(this, { start: null, mask: null });
    this.refresh();
    changed(this.element);
  }

  async openPainter() {
    const painted = await this.paint(this.start, this.mask);
    if (painted === undefined) return;
    this.mask = painted;
    this.refresh();
    changed(this.element);
    this.shown.querySelector(".paint-mask")?.focus();
  }

  refresh() {
    const { start, mask } = this;
    this.drop.hidden = start !== null;
    this.shown.hidden = start === null;
    if (!start) return this.shown.replaceChildren();
    const picture = h("div", { class: "start-picture" }, h("img", { src: start.src, alt: "Start picture" }));
    if (mask) picture.append(h("img", { src: mask.overlay, alt: "Painted mask", class: "overlay" }));
    return this.shown.replaceChildren(
      picture,
      h("div", { class: "start-side" },
        h("p", { class: "muted", title: start.name }, `${start.width} × ${start.height}`),
        h("button", { type: "button", class: "plain paint-mask", onclick: () => this.openPainter() }, icon("brush"), mask ? "Edit the mask" : "Paint a mask"),
        mask && h("button", { type: "button", class: "plain", onclick: () => this.dropMask() }, icon("eraser"), "Remove the mask"),
        h("button", { type: "button", class: "plain", onclick: () => this.onmatch?.(start.width, start.height) }, icon("swap"), "Match the size"),
        h("button", { type: "button", class: "plain", "aria-label": "Remove the start picture", onclick: () => this.drops() }, icon("trash"), "Remove"),
      ),
    );
  }

  dropMask() {
    this.mask = null;
    this.refresh();
    changed(this.element);
  }
}

/** The mask as a field of its own in the request; it is shown, and its errors are told, at the start picture. */
class MaskValue {
  constructor(owner) {
    Object.assign(this, { owner, name: "mask_image", schema: { default: "" }, element: null });
  }

  get value() {
    return this.owner.mask?.uri;
  }

  set value(_) {}

  fail(problem) {
    this.owner.fail(problem);
  }

  clear() {}
}

/** Return `{uri, src, width, height}`: the file as it is, or drawn anew where it is too large or of another kind. */
async function prepared(file) {
  const uri = await asUri(file);
  const image = await loaded(uri);
  const { naturalWidth: width, naturalHeight: height } = image;
  if (TAKEN.has(file.type) && file.size <= MOST_BYTES && Math.max(width, height) <= MOST_PIXELS) return { uri, src: uri, width, height };
  const scale = Math.min(1, MOST_PIXELS / Math.max(width, height));
  const canvas = h("canvas", { width: Math.round(width * scale), height: Math.round(height * scale) });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  const drawn = file.type === "image/jpeg" ? canvas.toDataURL("image/jpeg", 0.95) : canvas.toDataURL("image/png");
  return { uri: drawn, src: drawn, width: canvas.width, height: canvas.height };
}

function asUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

export async function loaded(src) {
  const image = new Image();
  image.src = src;
  await image.decode();
  return image;
}

/** Watch the whole page for pictures that are dropped or pasted. */
export function catchPictures(veil, take) {
  const first = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));
  const carries = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  let depth = 0;
  const show = (by) => {
    depth = Math.max(0, depth + by);
    veil.hidden = depth === 0;
  };
  addEventListener("dragenter", (event) => carries(event) && show(1));
  addEventListener("dragleave", (event) => carries(event) && show(-1));
  addEventListener("dragover", (event) => carries(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    show(-depth);
    const file = first(event.dataTransfer);
    if (file) take(file);
  });
  addEventListener("paste", (event) => {
    const file = first(event.clipboardData);
    if (!file) return;
    event.preventDefault();
    take(file);
  });
}
