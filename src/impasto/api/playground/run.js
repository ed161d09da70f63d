// One run from click to picture: submit, follow, cancel.

import { ApiError, call, randomName } from "./api.js";
import { at } from "./dom.js";
import { follow } from "./events.js";

export class Runs {
  /** `on.refused(error)` shows a refusal; `on.ended(prediction)` is called after each run. */
  constructor(stage, on) {
    Object.assign(this, { stage, on, current: null });
  }

  get running() {
    return this.current !== null;
  }

  /** Submit a request and follow it. */
  async start(model, body) {
    if (this.running) return;
    const run = (this.current = { id: null, leaving: new AbortController(), cancelled: false });
    this.buttons();
    this.stage.begin(body.num_images ?? 1, sizeOf(body));
    try {
      // With a name of its own, a request that is sent again after a broken answer makes no second job.
      const headers = { "Idempotency-Key": randomName() };
      const post = () => call(`api/v3/${model}`, { method: "POST", body, headers });
      const prediction = await post().catch((error) => (error.status === 0 ? post() : Promise.reject(error)));
      run.id = prediction.id;
      if (run.cancelled) await this.cancel();
      await this.follow(run, body);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (run.id === null) this.stage.restore();
      else this.stage.failed(error.problem);
      this.on.refused(error);
    } finally {
      this.current = null;
      this.buttons();
    }
  }

  /** Join a run that was begun elsewhere, or before this page was loaded. */
  async join(prediction, inputs) {
    if (this.running) return;
    const run = (this.current = { id: prediction.id, leaving: new AbortController(), cancelled: false });
    this.buttons();
    this.stage.begin(inputs.num_images ?? 1, sizeOf(inputs));
    try {
      await this.follow(run, inputs);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.stage.failed(error.problem);
    } finally {
      this.current = null;
      this.buttons();
    }
  }

  async follow(run, body) {
    const on = {
      status: (prediction) => prediction.status === "processing" && prediction.progress && this.stage.progress(prediction.progress),
      progress: (steps) => this.stage.progress(steps),
      preview: (preview) => this.stage.preview(preview),
    };
    const prediction = await follow(run.id, on, run.leaving.signal);
    if (prediction.status === "completed") await this.stage.finished(prediction, sizeOf(body));
    else this.stage.failed(prediction.error, run.cancelled || prediction.error.startsWith("cancelled") ? "cancelled" : "failed");
    this.on.ended(prediction);
  }

  /** Ask for the end of the run; its last status comes the usual way. */
  async cancel() {
    const run = this.current;
    if (!run) return;
    run.cancelled = true;
    at("cancel").disabled = true;
    if (run.id === null) return;
    try {
      await call(`api/v3/predictions/${run.id}/cancel`, { method: "POST" });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      run.cancelled = false;
      at("cancel").disabled = false;
      this.on.refused(error);
    }
  }

  buttons() {
    at("run").hidden = this.running;
    at("cancel").hidden = !this.running;
    at("cancel").disabled = false;
    if (this.running && document.activeElement === document.body) at("cancel").focus();
    if (!this.running && document.activeElement === document.body) at("run").focus({ preventScroll: true });
  }
}

export function sizeOf(body) {
  const sides = String(body.size ?? "1024*1024").split(/[*x×]/i).map(Number);
  return sides.length === 2 && sides.every((side) => side > 0) ? sides : [1024, 1024];
}
