// Light, dark, or as the system says.

import { at, icon } from "./dom.js";
import { recall, remember } from "./store.js";

const ORDER = ["system", "light", "dark"];
const NAMES = { system: "Theme: as the system", light: "Theme: light", dark: "Theme: dark" };

export function setUpTheme() {
  const button = at("theme");
  let theme = ORDER.includes(recall("theme")) ? recall("theme") : "system";
  const show = () => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.replaceChildren(icon(theme));
    button.setAttribute("aria-label", NAMES[theme]);
    button.title = NAMES[theme];
  };
  button.addEventListener("click", () => {
    theme = ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length];
    remember("theme", theme === "system" ? null : theme);
    show();
  });
  show();
}
