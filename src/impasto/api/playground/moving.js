// A finished output as an element: an <img>, or a <video> that runs by itself, in a loop, where it is one. Knows addresses.

import { h } from "./dom.js";

const isVideo = (src) => /\.webm$/.test(src);

/** Return the element that shows an output; a still one (`still`) shows a video's first frame. */
export function outputElement(src, { still = false, alt = "", ...props } = {}) {
  if (!isVideo(src)) return h("img", { src, alt, ...props });
  const run = still ? {} : { autoplay: true, loop: true, playsinline: true };
  const video = h("video", { src, "aria-label": alt, preload: "auto", ...run, class: props.class });
  video.muted = true; // the attribute alone does not let a made element run by itself
  return video;
}

/** Whether it can be shown, once that is known. */
export function loads(element) {
  if (element.tagName === "IMG") return element.decode().then(() => true, () => false);
  return new Promise((done) => {
    element.addEventListener("loadeddata", () => done(true), { once: true });
    element.addEventListener("error", () => done(false), { once: true });
  });
}
