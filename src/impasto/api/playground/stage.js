// The picture area: empty, at work, and with the result.

import { pictureSource } from "./api.js";
import { at, confirmOn, copyText, h, icon, iconButton } from "./dom.js";
import { loraReport } from "./report.js";
import { loads, outputElement } from "./moving.js";

export class Stage {
  /** `on.prompt(text)`, `on.start(output)`, `on.seed(seed)` and `on.word(text)` are what people can click here. */
  constructor(on) {
    Object.assign(this, { on, easel: at("easel"), cells: [], timer: 0, announced: "" });
  }

  /** Show what there is before the first picture. */
  empty(prompts) {
    const strokes = ["a", "b", "c"].map((layer) => h("i", { class: `stroke ${layer}` }));
    this.easel.replaceChildren(
      h("div", { class: "blank" },
        h("div", { class: "strokes", "aria-hidden": "true" }, strokes),
        h("p", { class: "blank-title" }, "An empty canvas"),
        h("p", { class: "muted" }, "Write a prompt, or begin with one of these."),
        h("ul", { class: "prompts" }, prompts.map((text) => h("li", {}, h("button", { type: "button", onclick: () => this.on.prompt(text) }, text)))),
      ),
    );
  }

  /** Stretch the canvases for a run. */
  begin(count, [width, height]) {
    this.former = { easel: [...this.easel.childNodes], report: [...at("report").childNodes] };
    this.clear();
    this.cells = Array.from({ length: count }, () => {
      const frame = h("div", { class: "frame working" });
      return { frame, figure: h("figure", { class: "cell" }, frame) };
    });
    this.hang(width / height);
    at("progress").hidden = false;
    at("stage").setAttribute("aria-busy", "true");
    this.announced = "";
    this.progress(null);
    const started = performance.now();
    const tick = () => (at("progress-time").textContent = `${((performance.now() - started) / 1000).toFixed(1)} s`);
    tick();
    this.timer = setInterval(tick, 100);
  }

  hang(ratio) {
    const wall = h("div", { class: "cells", data: { count: this.cells.length }, vars: { "--ratio": ratio } }, this.cells.map(({ figure }) => figure));
    this.easel.replaceChildren(wall);
  }

  clear() {
    at("verdict").hidden = true;
    at("report").hidden = true;
    at("report").replaceChildren();
  }

  say(text) {
    if (text !== this.announced) at("announce").textContent = this.announced = text;
  }

  /** Show how far it is; null is "in the queue". Screen readers are told in quarters. */
  progress(steps) {
    const share = steps ? steps.step / Math.max(1, steps.total) : 0;
    at("coats").style.setProperty("--p", share);
    at("coats").setAttribute("aria-valuenow", String(Math.round(share * 100)));
    at("progress-step").textContent = steps ? `Step ${steps.step} of ${steps.total}` : "In the queue";
    this.say(steps ? `${Math.floor(share * 4) * 25} percent` : "In the queue");
    document.title = steps ? `${Math.round(share * 100)}% · Impasto` : "… · Impasto";
  }

  /** Show a picture as it looks so far. */
  preview({ image, index = 0, content_type = "image/jpeg" }) {
    const cell = this.cells[index];
    if (!cell) return;
    cell.preview ??= h("img", { class: "preview", alt: "The picture so far" });
    cell.preview.src = `data:${content_type};base64,${image}`;
    if (!cell.preview.isConnected) cell.frame.append(cell.preview);
  }

  /** Bring back what hung here before `begin`: nothing was begun after all. */
  restore() {
    this.rest();
    this.easel.replaceChildren(...this.former.easel);
    at("report").replaceChildren(...this.former.report);
    at("report").hidden = this.former.report.length === 0;
    at("announce").textContent = "";
  }

  /** Stop the clock and take the progress away. */
  rest() {
    clearInterval(this.timer);
    at("progress").hidden = true;
    at("stage").removeAttribute("aria-busy");
    document.title = "Impasto";
  }

  /** Show the pictures of a prediction that has ended well. */
  async finished(prediction, size) {
    this.rest();
    this.clear();
    const seconds = (prediction.executionTime / 1000).toFixed(1);
    const count = prediction.outputs.length;
    const figures = await Promise.all(prediction.outputs.map((output, i) => this.figure(prediction, output, i)));
    this.cells = figures.map((figure) => ({ figure }));
    const first = figures[0]?.querySelector("img");
    this.hang(first?.naturalWidth ? first.naturalWidth / first.naturalHeight : size[0] / size[1]);
    this.say(count === 1 ? `The picture is finished, after ${seconds} seconds` : `${count} pictures are finished, after ${seconds} seconds`);
    const reports = (prediction.loras ?? []).map((lora) => loraReport(lora, this.on.word));
    if (reports.length) {
      at("report").replaceChildren(h("h2", {}, "What the LoRAs did"), ...reports);
      at("report").hidden = false;
    }
  }

  async figure(prediction, output, index) {
    const [src, seed] = [pictureSource(output), prediction.seed + index];
    const image = outputElement(src, { class: "work", alt: `Picture ${index + 1} of ${prediction.outputs.length}` });
    const gone = !(await loads(image));
    if (gone) return h("figure", { class: "cell" }, h("div", { class: "frame gone" }, h("p", {}, "This picture is no longer on the server.")));
    const name = `impasto-${prediction.id.slice(0, 8)}-${seed}.${/\.(\w+)$/.exec(src)?.[1] ?? "png"}`;
    const seedButton = h("button", { type: "button", class: "plain seed", title: "Copy the seed, and use it for the next run" }, icon("copy"), `seed ${seed}`);
    seedButton.addEventListener("click", async () => {
      await copyText(String(seed));
      this.on.seed(seed);
      confirmOn(seedButton, "Copied");
    });
    return h("figure", { class: "cell" },
      h("button", { type: "button", class: "frame", "aria-label": `Picture ${index + 1} in full size`, onclick: () => view(src) }, image),
      h("figcaption", {},
        seedButton,
        h("span", { class: "spacer" }),
        prediction.has_nsfw_contents?.[index] && h("span", { class: "flagged", title: "The safety checker flagged it" }, "flagged"),
        iconButton("start", "Use as start picture", () => this.on.start(output), { class: "quiet icon use-start" }),
        h("a", { class: "quiet icon", href: src, download: name, "aria-label": "Download", title: "Download" }, icon("download")),
      ),
    );
  }

  /** Say how a prediction ended that has no pictures. */
  failed(error, kind = "failed") {
    this.rest();
    for (const { frame } of this.cells) frame?.classList.replace("working", "stopped");
    at("verdict").textContent = kind === "cancelled" ? "Cancelled." : error;
    at("verdict").dataset.kind = kind;
    at("verdict").hidden = false;
    this.say(kind === "cancelled" ? "Cancelled" : `It failed: ${error}`);
  }
}

function view(src) {
  const viewer = at("viewer");
  const close = iconButton("close", "Close", () => viewer.close());
  viewer.replaceChildren(outputElement(src), close);
  viewer.onclick = (event) => event.target.tagName !== "BUTTON" && viewer.close();
  viewer.showModal();
}
