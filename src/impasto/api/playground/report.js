// What became of a LoRA: what fitted, what did not, what to know, and the words it listens to.

import { h } from "./dom.js";

const NETWORKS = { unet: "UNet", text_encoder: "text encoder", text_encoder_2: "second text encoder" };

/** Return a card about one LoRA; `onword` gets a trigger word that was clicked. */
export function loraReport(lora, onword) {
  const applied = Object.entries(lora.applied ?? {});
  const total = applied.reduce((sum, [, count]) => sum + count, 0);
  const parts = applied.map(([network, count]) => `${count} in the ${NETWORKS[network] ?? network.replaceAll("_", " ")}`);
  const facts = [
    Object.entries(lora.kinds ?? {}).map(([kind, count]) => `${kind} × ${count}`).join(", "),
    lora.ranks && (lora.ranks[0] === lora.ranks[1] ? `rank ${lora.ranks[0]}` : `ranks ${lora.ranks[0]} to ${lora.ranks[1]}`),
    lora.base_model && lora.base_model !== "unknown" && `made for ${lora.base_model}`,
    lora.resolved && lora.resolved !== lora.path && lora.resolved,
  ].filter(Boolean);
  const words = [...new Set([...(lora.embeddings ?? []), ...(lora.trigger_words ?? [])])];
  return h("article", { class: "lora-report" },
    h("header", {}, h("strong", {}, lora.path), h("span", { class: "scale" }, `× ${lora.scale}`)),
    h("p", { class: "applied" }, `${total} modules applied`, parts.length > 0 && h("span", { class: "muted" }, ` · ${parts.join(", ")}`)),
    facts.length > 0 && h("p", { class: "muted" }, facts.join(" · ")),
    ["mismatched", "unmatched", "ignored"].map((kind) => leftOut(kind, lora[kind])),
    lora.warnings?.length > 0 && h("ul", { class: "warnings" }, lora.warnings.map((text) => h("li", {}, text))),
    words.length > 0 && h("p", { class: "words" }, h("span", { class: "muted" }, "Put in the prompt:"),
      words.map((word) => h("button", { type: "button", class: "word", onclick: () => onword(word) }, word))),
  );
}

const MEANING = { mismatched: "of another shape", unmatched: "that this model does not have", ignored: "keys that are no weights" };

function leftOut(kind, part) {
  if (!part?.count) return null;
  const names = part.first.map((each) => (typeof each === "string" ? each : JSON.stringify(each)));
  const rest = part.count - names.length;
  return h("details", { class: "left-out" },
    h("summary", {}, `${part.count} ${kind === "ignored" ? "" : "modules "}${MEANING[kind]}`),
    h("ul", {}, names.map((name) => h("li", {}, h("code", {}, name))), rest > 0 && h("li", {}, `and ${rest} more`)),
  );
}
