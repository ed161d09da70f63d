// Size and seed: the two numbers people like to pick rather than type.

import { h, iconButton } from "./dom.js";
import { Field, changed } from "./field.js";

// The sizes SDXL was trained on, near one megapixel.
const TRAINED = [[1024, 1024], [1152, 896], [1216, 832], [1344, 768], [1536, 640]];
const NAMES = { "1024*1024": "1:1", "1152*896": "9:7", "1216*832": "3:2", "1344*768": "16:9", "1536*640": "21:9" };

export class SizeField extends Field {
  constructor(name, schema, suited) {
    const [low, high, step] = [schema.minimum ?? 512, schema.maximum ?? 1536, schema.multipleOf ?? 8];
    const side = (label) => h("input", { type: "number", min: low, max: high, step, "aria-label": label, inputmode: "numeric" });
    const [width, height] = [side("Width in pixels"), side("Height in pixels")];
    width.id = "field-size";
    const presets = h("div", { class: "presets", role: "group", "aria-label": "Size presets" });
    const own = h("div", { class: "sides" }, width, h("span", { "aria-hidden": "true" }, "×"), height);
    const turn = iconButton("swap", "Swap width and height", () => {
      [width.value, height.value] = [height.value, width.value];
      changed(width);
    });
    own.append(turn);
    super(name, schema, {
      input: width,
      parts: [presets],
      beside: [own],
      read: () => (width.value || height.value ? `${width.value}*${height.value}` : undefined),
      write: (value) => {
        [width.value, height.value] = String(value).split(/[*x×]/i).map((part) => part.trim());
        this.mark?.();
      },
    });
    Object.assign(this, { width, height, low, high, step });
    const small = suited && suited !== "1024*1024" ? [suited.split("*").map(Number)] : [];
    const sizes = [...small, ...TRAINED].filter((pair) => pair.every((each) => each >= low && each <= high));
    this.presets = sizes.map(([w, h]) => this.preset(w, h, small[0]?.[0] === w));
    presets.append(...this.presets.map(({ button }) => button));
    this.element.addEventListener("input", () => this.mark());
  }

  preset(w, hgt, small) {
    const scale = 20 / Math.max(w, hgt);
    const shape = h("i", { class: "shape", vars: { "--w": `${w * scale}px`, "--h": `${hgt * scale}px` } });
    const text = small ? `${w}` : (NAMES[`${w}*${hgt}`] ?? `${w}×${hgt}`);
    const button = h("button", { type: "button", class: "preset", title: `${w} × ${hgt}`, "aria-label": `${w} by ${hgt} pixels` }, shape, text);
    button.addEventListener("click", () => {
      const upright = Number(this.height.value) > Number(this.width.value);
      [this.width.value, this.height.value] = upright ? [hgt, w] : [w, hgt];
      changed(this.width);
    });
    return { button, w, h: hgt };
  }

  mark() {
    const [w, hgt] = [Number(this.width.value), Number(this.height.value)];
    for (const preset of this.presets ?? []) {
      const on = (preset.w === w && preset.h === hgt) || (preset.w === hgt && preset.h === w);
      preset.button.setAttribute("aria-pressed", String(on));
    }
  }

  /** Take the shape of a picture, at about the area that is set now. */
  match(width, height) {
    const area = Number(this.width.value) * Number(this.height.value) || 1024 * 1024;
    const side = (wanted) => Math.min(this.high, Math.max(this.low, Math.round(wanted / this.step) * this.step));
    this.width.value = side(Math.sqrt((area * width) / height));
    this.height.value = side(Math.sqrt((area * height) / width));
    changed(this.width);
  }
}

export class SeedField extends Field {
  constructor(name, schema) {
    const input = h("input", { type: "number", min: schema.minimum, max: schema.maximum, step: 1, inputmode: "numeric" });
    const note = h("span", { class: "seed-note", "aria-hidden": "true" }, "drawn anew each run");
    const set = (value) => {
      input.value = value;
      changed(input);
    };
    const dice = iconButton("dice", "Roll a seed", () => set(crypto.getRandomValues(new Uint32Array(1))[0]));
    const anew = iconButton("random", "Draw a new seed for each run", () => set(-1));
    const reuse = iconButton("reuse", "Use the last picture's seed again", () => set(this.last), { disabled: true });
    const row = h("div", { class: "with-buttons" }, h("div", { class: "seed-box" }, input, note), dice, anew, reuse);
    const show = () => (note.hidden = input.value !== "-1");
    super(name, schema, {
      input,
      parts: [row],
      read: () => (input.value === "" ? undefined : Number(input.value)),
      write: (value) => {
        input.value = value ?? "";
        show();
      },
    });
    Object.assign(this, { reuse, last: null });
    input.addEventListener("input", show);
  }

  /** Remember the seed of the last picture, for the button. */
  offer(seed) {
    this.last = seed;
    this.reuse.disabled = false;
  }
}
