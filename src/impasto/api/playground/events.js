// Following a prediction to its end: server-sent events, resumed where they broke off; polls where there are none.

import { ApiError, call, send } from "./api.js";

const ENDS = new Set(["completed", "failed", "cancelled", "timeout", "deleted"]);
const TRIES = 4; // streams in a row that brought nothing, before polling
const POLL_MS = 1000;

export const ended = (prediction) => ENDS.has(prediction.status);

/** Yield `{id, event, data}` for each event of a text/event-stream; `retry` is passed on as an event of that name. */
export async function* parseEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let open = { id: null, event: "message", data: [] };
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      const lines = text.split(/\r\n|\n|\r(?!$)/);
      text = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (open.data.length) yield { ...open, data: open.data.join("\n") };
          open = { id: null, event: "message", data: [] };
          continue;
        }
        const [, name, data] = /^([^:]*)(?:: ?)?([\s\S]*)$/.exec(line);
        if (name === "data") open.data.push(data);
        else if (name === "event") open.event = data;
        else if (name === "id") open.id = data;
        else if (name === "retry") yield { id: null, event: "retry", data };
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the caller has left; the connection goes with it
  }
}

/**
 * Follow a prediction until it has ended; return its last form.
 *
 * `on.status(prediction)`, `on.progress({step, total})` and `on.preview({image, index, content_type})` are called on
 * the way. Throws `AbortError` when `signal` is aborted, and `ApiError` when the prediction cannot be read.
 */
export async function follow(id, on, signal) {
  let last = null;
  let pause = 500;
  for (let tries = 0; tries < TRIES; tries++) {
    try {
      const headers = { Accept: "text/event-stream", ...(last !== null && { "Last-Event-ID": last }) };
      const response = await send(`api/v3/predictions/${id}/events`, { signal, headers });
      if (response.status === 204) break; // it has ended, and that was told
      for await (const { id: name, event, data } of parseEvents(response.body)) {
        tries = 0;
        if (name !== null) last = name;
        if (event === "retry") pause = Number(data) || pause;
        if (event === "progress" || event === "preview") on[event](JSON.parse(data));
        if (event === "status") {
          const prediction = JSON.parse(data);
          on.status(prediction);
          if (ended(prediction)) return prediction;
        }
      }
    } catch (error) {
      if (error.name === "AbortError") throw error;
      const refused = error instanceof ApiError && error.status >= 400 && error.status < 500 && error.status !== 429;
      if (refused) break; // no stream here; a poll tells whether the prediction is
    }
    await wait(pause, signal);
  }
  return poll(id, on, signal);
}

async function poll(id, on, signal) {
  for (let failures = 0; ; ) {
    try {
      const prediction = await call(`api/v3/predictions/${id}/result`, { signal });
      failures = 0;
      on.status(prediction);
      if (ended(prediction)) return prediction;
      if (prediction.progress) on.progress(prediction.progress);
    } catch (error) {
      const passing = error instanceof ApiError && (error.status === 0 || error.status === 429 || error.status >= 500);
      if (!passing || ++failures > 30) throw error;
    }
    await wait(POLL_MS, signal);
  }
}

function wait(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(done, milliseconds);
    function done() {
      signal?.removeEventListener("abort", abort);
      resolve();
    }
    function abort() {
      clearTimeout(timer);
      reject(signal.reason);
    }
    if (signal?.aborted) abort();
    else signal?.addEventListener("abort", abort, { once: true });
  });
}
