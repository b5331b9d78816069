// Models in this browser: fetched once, checked against the manifest's SHA-256, then run in a worker.

import { Problem, checkReadable } from "./api.js";
import { sha256 } from "./sha256.js";

export class BrowserModel {
  /** Fetch and start on a device: wasm or webgpu. Raises Problem, and never uses bytes that are not those of the manifest. */
  static async open(model, precision, api, device = "wasm", threads = Math.min(4, navigator.hardwareConcurrency || 1)) {
    const file = model.files[precision];
    const bytes = new Uint8Array(await (await api.fetch(file.url)).arrayBuffer());
    const found = await sha256(bytes);
    if (found !== file.sha256)
      throw new Problem(`The file of ${model.name} (${precision}) is not the one that its manifest names, so it is not used. Reload the page, or download it again.`);
    const opened = new BrowserModel(model.name, api.config.max_pixels);
    try {
      Object.assign(opened, await opened.ask({ load: { bytes: bytes.buffer, device, threads, manifest: { rule: model.manifest.rule } } }, [bytes.buffer]));
    } catch (error) {
      opened.close();
      throw new Problem(`The model cannot run in this browser: ${error.message.replace(/\.$/, "")}.`);
    }
    return opened;
  }

  constructor(name, maxPixels) {
    this.name = name;
    this.maxPixels = maxPixels;
    this.waiting = new Map();
    this.number = 0;
    this.worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    this.worker.addEventListener("message", ({ data }) => {
      const { resolve, reject } = this.waiting.get(data.id);
      this.waiting.delete(data.id);
      if (data.problem) reject(new Problem(data.problem));
      else resolve(data);
    });
    this.worker.addEventListener("error", (event) => {
      event.preventDefault();
      this.refuse("its WebAssembly did not start");
    });
  }

  ask(message, transfer = []) {
    const id = ++this.number;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, ...message }, transfer);
    });
  }

  /** {logits, ms, decodeMs, runMs} of an image file; ms leaves out the wait for other images. Raises Problem. */
  async predict(file) {
    try {
      const answer = await this.ask({ file, maxPixels: this.maxPixels });
      return { ...answer, logits: Array.from(answer.logits), ms: answer.decodeMs + answer.runMs };
    } catch (error) {
      await checkReadable(file);
      if (error.message.includes("pixels")) throw new Problem(`${file.name} is too large: ${error.message}.`);
      if (error.message.includes("not an image")) throw new Problem(`${file.name} is not an image that this browser reads. Save it as JPEG, PNG or WebP.`);
      if (error.message.includes("16-bit")) throw new Problem(`${file.name} has ${error.message}. Save it with 8 bits, or ask the service.`);
      throw new Problem(`${file.name} failed in this browser: ${error.message}.`);
    }
  }

  /** {logits, runMs} of images uint8 (count, S, S, 3), for measurements. */
  run(images, count) {
    return this.ask({ images, count });
  }

  /** End the worker, which frees the model's memory. */
  close() {
    this.worker.terminate();
    this.refuse("it was closed");
  }

  refuse(reason) {
    for (const { reject } of this.waiting.values()) reject(new Problem(reason));
    this.waiting.clear();
  }
}
