// A model in this browser, apart from the page so that it stays responsive: file in, logits out.
//
// Messages: {id, load: {bytes, precision, threads, manifest}} and {id, file, maxPixels} or {id, images, count}; answers {id, ...} or {id, problem}.

import * as ort from "./ort/ort.wasm.js";
import { applyRule, decode } from "./pixels.js";

const folder = new URL("ort/", import.meta.url).href;
ort.env.wasm.wasmPaths = { mjs: `${folder}ort-wasm-simd-threaded.js`, wasm: `${folder}ort-wasm-simd-threaded.wasm` };
ort.env.logLevel = "error";

let session = null;
let rule = null;
let turn = Promise.resolve(); // one run at a time

async function load({ bytes, threads, manifest }) {
  ort.env.wasm.numThreads = crossOriginIsolated ? threads : 1;
  session = await ort.InferenceSession.create(new Uint8Array(bytes), { executionProviders: ["wasm"], logSeverityLevel: 3 });
  rule = manifest.rule;
  const { size } = rule;
  await run(new Uint8Array(size * size * 3), 1); // the first run allocates
  return { threads: ort.env.wasm.numThreads };
}

async function run(images, count) {
  const { size } = rule;
  const begun = performance.now();
  const { logits } = await session.run({ images: new ort.Tensor("uint8", images, [count, size, size, 3]) }, ["logits"]);
  return { logits: logits.data, runMs: performance.now() - begun };
}

async function predict({ file, maxPixels }) {
  const begun = performance.now();
  const image = applyRule(await decode(file, maxPixels, rule.window ?? null), rule);
  const decodeMs = performance.now() - begun;
  return { ...(await run(new Uint8Array(image.data.buffer), 1)), decodeMs };
}

self.addEventListener("message", ({ data }) => {
  turn = turn.then(async () => {
    try {
      const answer = data.load ? await load(data.load) : data.images ? await run(data.images, data.count) : await predict(data);
      self.postMessage({ id: data.id, ...answer });
    } catch (error) {
      self.postMessage({ id: data.id, problem: String(error?.message ?? error) });
    }
  });
});
