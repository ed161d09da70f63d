// The form of the chosen model, built from its schema, and the request body that it stands for.

import { at } from "./dom.js";
import { SeedField, SizeField } from "./canvas-fields.js";
import { choiceField, flagField, numberField, pickField, plainField, textField } from "./field.js";
import { LorasField } from "./loras-field.js";
import { StartField } from "./start-field.js";

// Where a field stands; one that is not named here, because the service has learnt it since, stands under "output".
const PLACES = {
  prompt: "prompt", negative_prompt: "prompt",
  size: "canvas", num_images: "canvas", seed: "canvas",
  image: "start", strength: "start", frames: "start", fps: "start", motion: "start",
  loras: "loras",
  num_inference_steps: "sampling", guidance_scale: "sampling", scheduler: "sampling", acceleration: "sampling",
  refine: "refine", high_noise_frac: "refine", refine_steps: "refine",
};
const GROUPS = ["prompt", "canvas", "start", "loras", "sampling", "refine", "output"];
// The page always wants addresses, follows the work itself, and gives each LoRA its scale; masks come with their picture.
const LEFT_OUT = new Set(["enable_base64_output", "enable_sync_mode", "lora_scale", "mask_image"]);
const ALWAYS = new Set(["prompt", "size", "num_inference_steps", "guidance_scale", "num_images", "seed"]);
const SHOWN_WHEN = {
  strength: (form) => form.value("image") !== undefined,
  high_noise_frac: (form) => form.value("refine") === "expert_ensemble_refiner",
  refine_steps: (form) => form.value("refine") === "base_image_refiner",
};

export class Form {
  constructor(element, server, paint) {
    Object.assign(this, { element, server, paint, fields: new Map(), schema: null });
    element.addEventListener("input", () => this.refresh());
  }

  /** Build the fields of a model; values that differ from the former model's defaults stay. */
  show(schema) {
    const kept = this.schema ? this.values() : {};
    const start = this.fields.get("image");
    this.schema = schema;
    this.fields = new Map();
    for (const group of GROUPS) at(`group-${group}`).replaceChildren();
    const names = schema["x-order-properties"] ?? Object.keys(schema.properties);
    for (const name of names) {
      const unused = name.startsWith("refine") || name === "high_noise_frac" ? !this.server.refiner : false;
      if (!LEFT_OUT.has(name) && !unused && !schema.properties[name]["x-hidden"]) this.place(name, schema.properties[name], start);
    }
    this.load(kept);
    at("refine-section").hidden = !this.fields.has("refine");
    at("loras-section").hidden = !this.fields.has("loras");
  }

  place(name, schema, start) {
    if (name === "loras" && schema.maxItems === 0) return;
    const field = name === "image" && start ? start : this.make(name, schema);
    field.value = undefined;
    this.fields.set(name, field);
    if (field.maskField) {
      this.fields.set("mask_image", field.maskField);
      field.onmatch = (width, height) => this.fields.get("size").match(width, height);
    }
    at(`group-${PLACES[name] ?? "output"}`).append(field.element);
  }

  make(name, schema) {
    if (name === "size") return new SizeField(name, schema, this.server.size);
    if (name === "seed") return new SeedField(name, schema);
    if (name === "image") return new StartField(name, schema, this.paint);
    if (name === "loras") return new LorasField(name, schema);
    if (schema.enum) return choiceField(name, schema);
    if (schema.type === "boolean") return flagField(name, schema);
    const ranged = schema.minimum !== undefined && schema.maximum !== undefined;
    if (schema.type === "integer" && ranged && schema.maximum - schema.minimum < 6) return pickField(name, schema);
    if (["integer", "number"].includes(schema.type) && ranged) return numberField(name, schema);
    return name.includes("prompt") ? textField(name, schema) : plainField(name, schema);
  }

  value(name) {
    return this.fields.get(name)?.value;
  }

  /** Return the values that are not the defaults, without the pictures: what a browser may remember. */
  values() {
    const values = {};
    for (const [name, field] of this.fields) {
      if (name !== "image" && name !== "mask_image" && !isDefault(field)) values[name] = field.value;
    }
    return values;
  }

  /** Return the body of the request. */
  body() {
    const body = {};
    const names = this.schema["x-order-properties"] ?? Object.keys(this.schema.properties);
    for (const name of names) {
      const field = this.fields.get(name);
      if (!field || field.value === undefined || SHOWN_WHEN[name]?.(this) === false) continue;
      if (ALWAYS.has(name) || !isDefault(field)) body[name] = field.value;
    }
    return body;
  }

  /** Take over the values of an earlier request; what it does not name gets its default. */
  load(values) {
    for (const [name, field] of this.fields) {
      if (name === "image" || name === "mask_image") continue;
      field.value = values[name] ?? (name === "strength" ? values.prompt_strength : undefined);
    }
    this.clear();
    this.element.dispatchEvent(new Event("input", { bubbles: true }));
  }

  /** Show a refusal at the field it names; return whether there is one. */
  fail(path, problem) {
    const field = this.fields.get(path[0] === "prompt_strength" ? "strength" : path[0]);
    field?.fail(problem, path.slice(1));
    return Boolean(field);
  }

  clear() {
    for (const field of this.fields.values()) field.clear();
  }

  refresh() {
    for (const [name, shown] of Object.entries(SHOWN_WHEN)) {
      const field = this.fields.get(name);
      if (field) field.element.hidden = !shown(this);
    }
    this.note();
  }

  /** Say in the headings of closed groups what is in them. */
  note() {
    const value = (name) => this.value(name);
    const loras = value("loras")?.length ?? 0;
    const start = value("image") ? (value("mask_image") ? "with a mask" : "set") : "";
    const notes = {
      start,
      loras: loras ? `${loras} of ${this.fields.get("loras").most}` : "",
      sampling: `${value("num_inference_steps") ?? "?"} steps · ${value("guidance_scale") ?? "?"} · ${value("scheduler") ?? ""}`.replaceAll("_", " "),
      refine: value("refine") === "no_refiner" ? "off" : (value("refine") ?? "").replaceAll("_", " "),
      output: value("output_format") ?? "",
    };
    for (const [group, text] of Object.entries(notes)) at(`note-${group}`).textContent = text;
  }
}

function isDefault(field) {
  const given = field.value;
  return given === undefined || JSON.stringify(given) === JSON.stringify(field.schema.default ?? null);
}
