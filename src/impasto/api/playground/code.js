// The tabs that show the request as a program, always in step with the form.

import { urlOf } from "./api.js";
import { at, confirmOn, copyText, h } from "./dom.js";
import { LANGUAGES, snippet } from "./snippets.js";
import { recall, remember } from "./store.js";

/** Set the tabs up; return a function that shows a request. */
export function setUpCode() {
  const names = Object.keys(LANGUAGES);
  let language = names.includes(recall("language")) ? recall("language") : names[0];
  let [request, text] = [null, ""];
  const tabs = names.map((name) => h("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "snippet", onclick: () => choose(name) }, LANGUAGES[name]));
  at("tabs").append(...tabs);
  at("tabs").addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const next = (names.indexOf(language) + by + names.length) % names.length;
    choose(names[next]);
    tabs[next].focus();
  });
  at("copy").addEventListener("click", async () => {
    await copyText(text);
    confirmOn(at("copy"), "Copied");
  });

  function choose(name) {
    language = name;
    remember("language", name);
    draw();
  }

  function draw() {
    tabs.forEach((tab, i) => {
      tab.setAttribute("aria-selected", String(names[i] === language));
      tab.tabIndex = names[i] === language ? 0 : -1;
    });
    at("snippet").setAttribute("aria-labelledby", `tab-${language}`);
    if (!request) return;
    const written = snippet(language, urlOf("").replace(/\/$/, ""), request.model, request.body);
    text = written.text;
    at("snippet-text").textContent = written.shown;
  }

  draw();
  return (model, body) => {
    request = { model, body };
    draw();
  };
}
