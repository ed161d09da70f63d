// The LoRAs of the request: a name and a scale each, as many as the model takes.

import { h, icon, iconButton } from "./dom.js";
import { Field, changed, numberControls, showAt } from "./field.js";

export class LorasField extends Field {
  constructor(name, schema) {
    const list = h("ol", { class: "loras" });
    const add = h("button", { type: "button", class: "add" }, icon("plus"), "Add a LoRA");
    super(name, schema, {
      input: add,
      parts: [list, add, h("p", { class: "muted" }, "A name on this server, owner/name of the hub, a URL, or a Civitai id.")],
      label: null,
      read: () => this.rows?.map((row) => row.read()),
      write: (value) => this.show(value ?? []),
    });
    Object.assign(this, { list, add, rows: [], item: schema.items.properties, most: schema.maxItems ?? 5 });
    add.addEventListener("click", () => {
      this.append({ path: "" }).path.focus();
      changed(this.list);
    });
  }

  show(loras) {
    this.rows = [];
    this.list.replaceChildren();
    for (const lora of loras) this.append(lora);
    this.count();
  }

  append({ path, scale }) {
    const number = `${this.rows.length + 1}`;
    const where = h("input", { type: "text", "aria-label": `LoRA ${number}`, placeholder: "owner/name", spellcheck: "false", autocapitalize: "none", autocomplete: "off" });
    where.value = path;
    const { input, slider, read, write } = numberControls(this.item.scale);
    input.setAttribute("aria-label", `Scale of LoRA ${number}`);
    write(scale ?? this.item.scale.default);
    const error = h("p", { class: "error", id: `error-lora-${Math.random().toString(36).slice(2)}`, hidden: true });
    const element = h("li", { class: "lora" });
    const row = { element, path: where, scale: input, error, read: () => ({ path: where.value, scale: read() ?? this.item.scale.default }) };
    const remove = iconButton("close", `Remove LoRA ${number}`, () => {
      this.rows = this.rows.filter((each) => each !== row);
      element.remove();
      this.count();
      changed(this.list);
      this.add.focus();
    });
    element.append(h("div", { class: "lora-name" }, where, remove), h("div", { class: "lora-scale" }, slider, input), error);
    element.addEventListener("input", () => this.clearRow(row));
    this.rows.push(row);
    this.list.append(element);
    this.count();
    return row;
  }

  count() {
    this.add.hidden = this.rows.length >= this.most;
  }

  fail(problem, rest = []) {
    const row = this.rows[Number(rest[0])];
    if (!row) return super.fail(problem);
    const input = rest[1] === "scale" ? row.scale : row.path;
    row.error.textContent = problem;
    row.error.hidden = false;
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-describedby", row.error.id);
    return showAt(input);
  }

  clear() {
    super.clear();
    for (const row of this.rows ?? []) this.clearRow(row);
  }

  clearRow(row) {
    row.error.hidden = true;
    for (const input of [row.path, row.scale]) {
      input.removeAttribute("aria-invalid");
      input.removeAttribute("aria-describedby");
    }
  }
}
