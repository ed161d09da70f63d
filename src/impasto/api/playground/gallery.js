// What this key has made: newest first, in pages; a click brings settings and pictures back.

import { ApiError, call, pictureSource } from "./api.js";
import { at, h, icon } from "./dom.js";
import { ended } from "./events.js";
import { outputElement } from "./moving.js";

const PER_PAGE = 18;
const SURE_MS = 3000;

export class Gallery {
  /** `open(prediction)` is called for a click on a work; `refused(error)` where the list cannot be read. */
  constructor({ open, refused }) {
    Object.assign(this, { open, refused, page: 1, hasKey: false, loads: 0 });
    at("reload").append(icon("reload"));
    at("reload").addEventListener("click", () => this.load());
    at("newer").addEventListener("click", () => this.load(this.page - 1));
    at("older").addEventListener("click", () => this.load(this.page + 1));
  }

  /** Show a page; of several loads under way, say with an old key and a new one, the last one asked for counts. */
  async load(page = this.page) {
    const load = ++this.loads;
    if (!this.hasKey) return this.show([], "With a key, everything it made shows up here.", 1, false);
    try {
      const list = await call("api/v3/predictions", { method: "POST", body: { page, page_size: PER_PAGE, include_inputs: true } });
      if (load !== this.loads) return undefined;
      const older = list.has_more ?? page * PER_PAGE < (list.total ?? 0);
      if (!list.items.length && page > 1) return this.load(page - 1);
      return this.show(list.items, list.items.length ? "" : "Nothing yet: the first picture hangs here.", page, older);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (load !== this.loads) return undefined;
      this.show([], error.status === 401 ? "The key is not valid here." : error.message, 1, false);
      return error.status === 401 && this.refused(error);
    }
  }

  show(items, note, page, older) {
    this.page = page;
    at("works").replaceChildren(...items.map((item) => this.work(item)));
    at("gallery-note").textContent = note;
    at("gallery-note").hidden = !note;
    at("newer").disabled = page === 1;
    at("older").disabled = !older;
    at("page").textContent = page > 1 || older ? `page ${page}` : "";
  }

  work(prediction) {
    const inputs = prediction.inputs ?? prediction.input ?? {};
    const prompt = inputs.prompt ?? "";
    const [output] = prediction.outputs ?? [];
    const state = ended(prediction) ? (prediction.error?.startsWith("cancelled") ? "cancelled" : prediction.status) : prediction.status;
    const picture = output
      ? outputElement(pictureSource(output), { still: true, loading: "lazy", decoding: "async" })
      : h("span", { class: "no-picture" }, state);
    picture.addEventListener("error", () => picture.replaceWith(h("span", { class: "no-picture" }, "expired")));
    const more = (prediction.outputs?.length ?? 0) > 1 && h("span", { class: "more" }, `${prediction.outputs.length}`);
    const open = h("button", { type: "button", class: "open-work", title: prompt, "aria-label": `${prompt || "A picture"}, ${state}: load its settings` }, picture, more);
    open.addEventListener("click", () => this.open(prediction, inputs));
    const item = h("li", { class: "work-item", data: { state, id: prediction.id } }, open, this.remover(prediction, () => item.remove()));
    return item;
  }

  /** Return a button that deletes at the second click. */
  remover(prediction, gone) {
    const button = h("button", { type: "button", class: "delete", "aria-label": "Delete" }, icon("trash"));
    let sure = false;
    button.addEventListener("click", async () => {
      if (!sure) {
        sure = true;
        button.replaceChildren("Delete?");
        button.setAttribute("aria-label", "Delete for good?");
        setTimeout(() => {
          sure = false;
          button.replaceChildren(icon("trash"));
          button.setAttribute("aria-label", "Delete");
        }, SURE_MS);
        return;
      }
      try {
        await call("api/v3/predictions/delete", { method: "POST", body: { ids: [prediction.id] } });
        gone();
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        this.refused(error);
      }
    });
    return button;
  }
}
