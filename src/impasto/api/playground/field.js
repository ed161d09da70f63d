// One named value of the request as something to see and touch: label, control, and the place for its error.

import { h } from "./dom.js";

const LABELS = {
  prompt: "Prompt",
  negative_prompt: "Negative prompt",
  size: "Size",
  num_images: "Pictures",
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  scheduler: "Scheduler",
  seed: "Seed",
  strength: "Strength",
  refine: "Refiner",
  high_noise_frac: "Hand-over",
  refine_steps: "Refiner steps",
  output_format: "File format",
  fps: "Frames a second",
  enable_safety_checker: "Safety checker",
};

export const labelOf = (name) => LABELS[name] ?? (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ");

/**
 * The common part of all fields.
 *
 * A kind of field gives `input` (what the label names and an error points at), `parts` (what is shown) and `read` and
 * `write`, which turn what is shown into the value of the request and back; `undefined` is "not given".
 */
export class Field {
  constructor(name, schema, { input, parts, read, write, label = labelOf(name), beside = [] }) {
    Object.assign(this, { name, schema, input, read, write });
    input.id ||= `field-${name}`;
    this.error = h("p", { class: "error", id: `error-${name}`, hidden: true });
    const hint = (schema.description ?? "").replaceAll("`", "");
    this.help = h("span", { class: "visually-hidden", id: `help-${name}` }, hint);
    input.setAttribute("aria-describedby", this.help.id);
    const head = label && h("div", { class: "field-head" }, h("label", { for: input.id, title: hint }, label), ...beside);
    this.element = h("div", { class: "field", data: { field: name } }, head, ...parts, this.help, this.error);
    this.element.addEventListener("input", () => this.clear());
  }

  get value() {
    return this.read();
  }

  set value(value) {
    this.write(value ?? this.schema.default);
  }

  /** Show what is wrong; `rest` is the path below this field, which only some kinds can point at. */
  fail(problem) {
    this.error.textContent = problem;
    this.error.hidden = false;
    this.input.setAttribute("aria-invalid", "true");
    this.input.setAttribute("aria-describedby", `${this.error.id} ${this.help.id}`);
    showAt(this.input);
  }

  clear() {
    if (this.error.hidden) return;
    this.error.hidden = true;
    this.input.removeAttribute("aria-invalid");
    this.input.setAttribute("aria-describedby", this.help.id);
  }
}

/** Open the group of a wrong value, and bring it into sight with its error. */
export function showAt(input) {
  input.closest("details")?.setAttribute("open", "");
  input.focus({ preventScroll: true });
  input.scrollIntoView({ block: "center" });
}

/** Tell the form that a value was changed by a button, not by typing. */
export function changed(element) {
  element.dispatchEvent(new Event("input", { bubbles: true }));
}

export function textField(name, schema) {
  const long = name === "prompt";
  const input = h("textarea", { rows: long ? 3 : 1, maxlength: schema.maxLength, spellcheck: "true", class: long ? "long" : null });
  if (long) input.placeholder = "What should be in the picture?";
  if (name === "negative_prompt") input.placeholder = "What should be left out";
  return new Field(name, schema, {
    input,
    parts: [input],
    read: () => input.value || undefined,
    write: (value) => (input.value = value ?? ""),
  });
}

export function choiceField(name, schema) {
  const input = h("select", {}, schema.enum.map((word) => h("option", { value: word }, String(word).replaceAll("_", " "))));
  return new Field(name, schema, {
    input,
    parts: [input],
    read: () => input.value,
    write: (value) => (input.value = value ?? ""),
  });
}

export function flagField(name, schema) {
  const input = h("input", { type: "checkbox" });
  return new Field(name, schema, {
    input,
    parts: [],
    beside: [input],
    read: () => input.checked,
    write: (value) => (input.checked = Boolean(value)),
  });
}

/** A whole number with few choices: a button for each. */
export function pickField(name, schema) {
  const numbers = Array.from({ length: schema.maximum - schema.minimum + 1 }, (_, i) => schema.minimum + i);
  const radios = numbers.map((number) => h("input", { type: "radio", name: `pick-${name}`, value: number, class: "visually-hidden" }));
  const group = h("div", { class: "pick", role: "radiogroup", "aria-label": labelOf(name), tabindex: "-1" },
    radios.map((radio) => h("label", {}, radio, h("span", {}, radio.value))));
  return new Field(name, schema, {
    input: group,
    parts: [],
    beside: [group],
    read: () => Number(radios.find((radio) => radio.checked)?.value ?? schema.default),
    write: (value) => radios.forEach((radio) => (radio.checked = Number(radio.value) === value)),
  });
}

/** A number: typed, or drawn along its range. What is typed is sent as it is; the service is the judge of it. */
export function numberField(name, schema) {
  const { input, slider, read, write } = numberControls(schema);
  const pair = schema.default === undefined ? [input] : [slider];
  const beside = schema.default === undefined ? [] : [input];
  return new Field(name, schema, { input, parts: pair, beside, read, write });
}

/** Return a number box and a slider that move together. */
export function numberControls(schema) {
  const [low, high] = [schema.minimum, schema.maximum];
  const step = schema.type === "integer" ? 1 : (schema.multipleOf ?? (high - low <= 1 ? 0.01 : high - low <= 5 ? 0.05 : 0.1));
  const input = h("input", { type: "number", step: schema.type === "integer" ? 1 : "any", min: low, max: high, inputmode: "decimal" });
  const slider = h("input", { type: "range", min: low, max: high, step, tabindex: "-1", "aria-hidden": "true" });
  const fill = () => slider.style.setProperty("--at", `${((Number(slider.value) - low) / (high - low)) * 100}%`);
  const follow = () => {
    slider.value = input.value === "" ? low : input.value;
    fill();
  };
  slider.addEventListener("input", () => {
    input.value = slider.value;
    fill();
  });
  input.addEventListener("input", follow);
  const read = () => (input.value === "" ? undefined : Number(input.value));
  const write = (value) => {
    input.value = value ?? "";
    follow();
  };
  return { input, slider, read, write };
}

export function plainField(name, schema) {
  const input = h("input", { type: "text" });
  return new Field(name, schema, {
    input,
    parts: [input],
    read: () => input.value || undefined,
    write: (value) => (input.value = value ?? ""),
  });
}
