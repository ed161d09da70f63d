// Putting the page together. Knows which parts there are, and what one has to tell another.

import { send } from "./api.js";
import { setUpCode } from "./code.js";
import { at, h } from "./dom.js";
import { changed } from "./field.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { KeyField } from "./key.js";
import { painterIn } from "./painter.js";
import { ended } from "./events.js";
import { Runs, sizeOf } from "./run.js";
import { loadModels } from "./schema.js";
import { Stage } from "./stage.js";
import { catchPictures } from "./start-field.js";
import { recallJson, remember } from "./store.js";
import { setUpTheme } from "./theme.js";

const apple = /Mac|iP(hone|ad)/.test(navigator.platform);
const showCode = setUpCode();
setUpTheme();
at("run-hint").textContent = apple ? "⌘ ↵" : "Ctrl ↵";

const server = await (await send("static/server.json")).json();
const form = new Form(at("form"), server, painterIn(at("painter")));
const stage = new Stage({
  prompt: (text) => setPrompt(text),
  word: (word) => setPrompt([form.value("prompt"), word].filter(Boolean).join(", ")),
  seed: (seed) => setField("seed", seed),
  start: (output) => form.fields.get("image").takeOutput(output),
});
const runs = new Runs(stage, {
  refused,
  ended: (prediction) => {
    if (prediction.status === "completed") form.fields.get("seed").offer(prediction.seed);
    gallery.load(1);
  },
});
const gallery = new Gallery({ open: openWork, refused: (error) => (error.status === 401 ? key.refused(error) : alertOf(error.message)) });
const key = new KeyField(() => reload());
const former = recallJson("form"); // read before the form is shown, which writes it anew
let models = [];

async function reload() {
  alertOf("");
  gallery.hasKey = Boolean(key.value);
  try {
    models = await loadModels(Boolean(key.value));
  } catch (error) {
    return alertOf(error.message);
  }
  const chosen = at("model").value || former?.model;
  at("model").replaceChildren(...models.map(({ id, description }) => h("option", { value: id, title: description }, id)));
  if (models.some(({ id }) => id === chosen)) at("model").value = chosen;
  if (!form.schema) {
    form.show(schemaOf(at("model").value));
    form.load(former?.values ?? (server.size ? { size: server.size } : {}));
  }
  return gallery.load(1);
}

const schemaOf = (id) => models.find((model) => model.id === id).schema;

function setField(name, value) {
  const field = form.fields.get(name);
  field.value = value;
  field.clear();
  changed(field.element);
}

function setPrompt(text) {
  setField("prompt", text);
  form.fields.get("prompt").input.focus();
}

/** Show a refusal where it belongs: at the key, at its field, or above the button. */
function refused(error) {
  if (error.status === 401) {
    key.refused(error);
    return key.focus();
  }
  if (!error.field || !form.fail(error.field, error.problem)) alertOf(error.problem);
  return undefined;
}

function alertOf(text) {
  at("alert").textContent = text;
  at("alert").hidden = !text;
}

function run() {
  key.settle();
  if (runs.running) return;
  form.clear();
  key.clear();
  alertOf("");
  if (!key.value) {
    key.fail("A key is needed. The service prints one at its first start.");
    key.focus();
    return;
  }
  key.fold();
  if (matchMedia("(max-width: 60rem)").matches) at("stage").scrollIntoView({ behavior: "smooth", block: "start" });
  runs.start(at("model").value, form.body());
}

/** Bring an earlier prediction back: its settings with the seed it had, and its pictures or its further work. */
function openWork(prediction, inputs) {
  if (runs.running) return;
  if (models.some(({ id }) => id === prediction.model)) {
    at("model").value = prediction.model;
    form.show(schemaOf(prediction.model));
  }
  alertOf("");
  form.load({ ...inputs, seed: prediction.seed });
  const start = form.fields.get("image");
  if (start?.start) start.drops();
  if (inputs.image) alertOf("Start pictures are not kept by the service: add it again to repeat this one.");
  form.fields.get("seed").offer(prediction.seed);
  at("stage").scrollIntoView({ behavior: "smooth", block: "nearest" });
  if (prediction.status === "completed") stage.finished(prediction, sizeOf(inputs));
  else if (!ended(prediction)) runs.join(prediction, inputs);
  else {
    stage.begin(inputs.num_images ?? 1, sizeOf(inputs));
    stage.failed(prediction.error, prediction.error.startsWith("cancelled") ? "cancelled" : "failed");
  }
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
at("form").addEventListener("input", () => {
  if (!form.schema) return;
  showCode(at("model").value, form.body());
  remember("form", JSON.stringify({ model: at("model").value, values: form.values() }));
});
at("model").addEventListener("change", () => form.show(schemaOf(at("model").value)));
at("cancel").addEventListener("click", () => runs.cancel());
addEventListener("keydown", (event) => {
  if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  }
  if (event.key === "Escape" && runs.running) runs.cancel();
});
catchPictures(at("veil"), (file) => !document.querySelector("dialog[open]") && form.fields.get("image")?.take(file));

stage.empty(server.prompts);
await reload();
document.documentElement.dataset.ready = "yes"; // for tests: everything is wired
