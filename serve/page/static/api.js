// Requests to the service, or to the files of a static folder. Every failure is a sentence for people.

import { size } from "./dom.js";

/** A failure with a sentence. needsKey: the service asks for an API key. */
export class Problem extends Error {
  constructor(sentence, needsKey = false) {
    super(sentence);
    this.needsKey = needsKey;
  }
}

/** A key as the service compares it: its UTF-8 bytes, each a letter, because headers have one byte a letter. */
const asHeader = (key) => String.fromCharCode(...new TextEncoder().encode(key));

/** Milliseconds of a Server-Timing header, "decode;dur=1.2, model;dur=0.8", added up; null where a proxy has dropped it. */
function workMs(header) {
  const found = [...(header ?? "").matchAll(/dur=([0-9.]+)/g)];
  return found.length ? found.reduce((sum, [, ms]) => sum + Number(ms), 0) : null;
}

/** Raise Problem where a file was removed, renamed or changed since it was chosen: the browser refuses to read it. */
export async function checkReadable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Problem(`${file.name} cannot be read any more; choose it again.`);
  }
}

export class Api {
  constructor(config) {
    this.config = config;
    this.key = ""; // in memory only
  }

  get isService() {
    return this.config.mode === "service";
  }

  /** The models: [{name, serves, files: {precision: {url, sha256, bytes}}, manifest}]. */
  async models() {
    const path = this.isService ? "v1/models" : "models.json";
    const { models } = await (await this.fetch(path)).json();
    await Promise.all(
      models.map(async (model) => {
        // Relative to the page, which lies below any prefix and in any folder.
        const folder = this.isService ? `v1/models/${encodeURIComponent(model.name)}` : `models/${encodeURIComponent(model.name)}`;
        for (const [precision, file] of Object.entries(model.files)) file.url = `${folder}/${precision}.onnx`;
        model.manifestUrl = `${folder}/manifest.json`;
        model.manifest = await (await this.fetch(model.manifestUrl)).json();
      }),
    );
    return models;
  }

  /** {logits, sha256, ms, wholeMs} of an image file, by the service. ms is its work on it; wholeMs has the way and the wait, too. */
  async predict(file, model, precision) {
    this.checkSize(file);
    const begun = performance.now();
    const query = new URLSearchParams({ model: model.name, precision, top_k: 1, logits: true });
    const options = { method: "POST", body: file, headers: { "content-type": file.type || "application/octet-stream" } };
    const answer = await this.fetch(`v1/predict?${query}`, options, file.name).catch(async (error) => {
      await checkReadable(file); // else the service is blamed for it
      throw error;
    });
    const content = await answer.json();
    const wholeMs = performance.now() - begun;
    return { logits: content.predictions[0].logits, sha256: content.sha256, ms: workMs(answer.headers.get("server-timing")) ?? wholeMs, wholeMs };
  }

  checkSize(file) {
    if (file.size > this.config.max_bytes)
      throw new Problem(`${file.name} is too large: it has ${size(file.size)}, and at most ${size(this.config.max_bytes)} are accepted. Save it smaller.`);
    if (file.size === 0) throw new Problem(`${file.name} is empty.`);
  }

  /** A successful response. Raises Problem. */
  async fetch(url, options = {}, subject = "") {
    const headers = { ...options.headers, ...(this.key ? { "x-api-key": asHeader(this.key) } : {}) };
    let answer;
    try {
      answer = await fetch(url, { ...options, headers });
    } catch {
      throw new Problem(this.isService ? "The service does not answer. Check that it runs, then try again." : `${url} cannot be loaded. Check the connection, then reload the page.`);
    }
    if (answer.ok) return answer;
    let said = "";
    try {
      said = (await answer.json()).error ?? "";
    } catch {
      // not JSON: a proxy's own page
    }
    throw this.problem(answer.status, said, subject);
  }

  problem(status, said, subject) {
    const what = subject || "The request";
    const formats = this.config.formats.map((name) => (name === "WEBP" ? "WebP" : name));
    const listed = formats.length > 1 ? `${formats.slice(0, -1).join(", ")} or ${formats.at(-1)}` : formats[0];
    switch (status) {
      case 401:
        return new Problem(
          this.key ? "The service does not accept this API key. Check it and enter it again." : "This service needs an API key. Enter it above the images.",
          true,
        );
      case 408:
        return new Problem(`${what} took too long to send. Try again, or save the image smaller.`);
      case 413:
        return new Problem(`${what} is too large: ${said || `at most ${size(this.config.max_bytes)} are accepted`}.`);
      case 415:
        return new Problem(`${what} is not an image that can be read here. Save it as ${listed}.`);
      case 422:
        return new Problem(`${what} cannot be read as an image: ${said.replace(/^the image cannot be read: /, "") || "it is damaged"}.`);
      case 503:
        return new Problem("The service is busy. Try again in a moment.");
      default:
        return new Problem(`${what} failed: ${said || `status ${status}`}.`);
    }
  }
}
