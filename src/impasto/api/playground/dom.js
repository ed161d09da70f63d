// Making elements. Knows no part of the page. Text only ever becomes text: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  dice: "M5 3h14a2 2 0 0 1 2 2v14a2 2 0 0 1-2 2H5a2 2 0 0 1-2-2V5a2 2 0 0 1 2-2zM8 8h.01M16 8h.01M12 12h.01M8 16h.01M16 16h.01",
  reuse: "M4 12a8 8 0 1 1 2.3 5.6M4 12l-2-3M4 12l3-2.5",
  random: "M3 7h3.5c5 0 5.500 10 10.500 10H21M21 17l-3-3M21 17l-3 3M3 17h3.500c1.600 0 2.700-1 3.600-2.300M14 8.500C14.900 7.600 15.800 7 17 7h4M21 7l-3-3M21 7l-3 3",
  swap: "M7 4 3 8l4 4M3 8h14M17 12l4 4-4 4M21 16H7",
  download: "M12 3v12M7 11l5 5 5-5M4 20h16",
  brush: "M20 3c-6 3-10 7-12 11l2.500 2.500C14.500 14.500 18.500 10 20 3zM8 14c-3 0-3 4-6 5 3 2 8 1 8-2.500",
  eraser: "M8 20 3 15 14 4l7 7-9 9zM8 20h13M9 9l7 7",
  undo: "M8 5 4 9l4 4M4 9h10a6 6 0 0 1 0 12h-3",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v5M14 11v5",
  close: "M6 6l12 12M18 6 6 18",
  plus: "M12 5v14M5 12h14",
  invert: "M12 3a9 9 0 1 0 0 18zM12 3a9 9 0 0 1 0 18",
  start: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4",
  reload: "M20 11a8 8 0 1 0-2 6M20 5v6h-6",
  light: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.500 1.500M17.500 17.500 19 19M19 5l-1.500 1.500M6.500 17.500 5 19",
  dark: "M20 14.500A8.500 8.500 0 0 1 9.500 4 8.500 8.500 0 1 0 20 14.500z",
  system: "M3 5h18v11H3zM9 20h6M12 16v4",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
};

/** Return an element; `props` has attributes, properties (not strings), `on…` listeners, `class` and `data`. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "vars") for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Return an icon; it says nothing to screen readers, so its button needs a label. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of [["viewBox", "0 0 24 24"], ["class", "ink"], ["aria-hidden", "true"]]) svg.setAttribute(key, value);
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** Return a small button with an icon; `label` is its name for everyone who cannot see it, and its tooltip. */
export function iconButton(name, label, onclick, props = {}) {
  return h("button", { type: "button", class: "quiet icon", "aria-label": label, title: label, onclick, ...props }, icon(name));
}

/** Return the element of the page with this id. */
export const at = (id) => document.getElementById(id);

/** Put text on the clipboard; pages without TLS have no clipboard interface, so there is the old way, too. */
export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const area = h("textarea", { class: "visually-hidden", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** Say for a moment on a button that it worked. */
export function confirmOn(button, text) {
  const [content, label] = [[...button.childNodes], button.getAttribute("aria-label")];
  if (button.dataset.confirming) return;
  button.dataset.confirming = "yes";
  button.replaceChildren(text);
  if (label) button.setAttribute("aria-label", text);
  setTimeout(() => {
    button.replaceChildren(...content);
    if (label) button.setAttribute("aria-label", label);
    delete button.dataset.confirming;
  }, 1400);
}
