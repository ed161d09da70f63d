// The API key: kept in this browser, told where it is wrong.

import { useKey } from "./api.js";
import { at, h } from "./dom.js";
import { recall, remember } from "./store.js";

export class KeyField {
  /** `onchange` is called when there is another key. */
  constructor(onchange) {
    this.section = at("key-section");
    this.input = h("input", { type: "password", id: "key", autocomplete: "off", spellcheck: "false", placeholder: "Paste your key", "aria-describedby": "key-help" });
    this.error = h("p", { class: "error", id: "error-key", hidden: true });
    const forget = h("button", { type: "button", class: "plain", onclick: () => this.set("") }, "Forget");
    const show = h("button", { type: "button", class: "plain", "aria-pressed": "false" }, "Show");
    show.addEventListener("click", () => {
      const hidden = this.input.type === "text";
      this.input.type = hidden ? "password" : "text";
      show.setAttribute("aria-pressed", String(!hidden));
    });
    at("key-body").append(h("div", { class: "field" },
      h("label", { for: "key", class: "visually-hidden" }, "API key"),
      h("div", { class: "with-buttons" }, this.input, show, forget),
      this.error,
      h("p", { class: "muted", id: "key-help" }, "Kept in this browser's local storage and sent to this server alone. Whoever uses this browser can read it. ", h("code", {}, "impasto keys create NAME"), " makes one."),
    ));
    this.input.addEventListener("input", () => this.clear());
    this.input.addEventListener("change", () => this.set(this.input.value));
    this.onchange = onchange;
    this.take(recall("key") ?? "");
    this.section.open = !this.value;
  }

  take(value) {
    this.value = value.trim().replace(/^Bearer\s+/i, "");
    this.input.value = this.value;
    useKey(this.value);
    at("key-note").textContent = this.value ? `…${this.value.slice(-4)}` : "needed to paint";
  }

  /** Take the key from the box now: whoever presses Ctrl+Enter in it has not left it yet. */
  settle() {
    if (this.input.value.trim() !== this.value) this.set(this.input.value);
  }

  set(value) {
    this.take(value);
    remember("key", this.value);
    this.clear();
    this.onchange();
  }

  /** Close the section when it has served, unless someone is in it. */
  fold() {
    if (!this.section.contains(document.activeElement)) this.section.open = false;
  }

  /** Tell what an answer of 401 says, unless there is another key by now. */
  refused({ key, problem }) {
    if (key === this.value) this.fail(problem);
  }

  fail(problem) {
    this.section.open = true;
    this.error.textContent = problem;
    this.error.hidden = false;
    this.input.setAttribute("aria-invalid", "true");
    this.input.setAttribute("aria-describedby", "error-key key-help");
  }

  focus() {
    this.input.focus();
  }

  clear() {
    this.error.hidden = true;
    this.input.removeAttribute("aria-invalid");
    this.input.setAttribute("aria-describedby", "key-help");
  }
}
