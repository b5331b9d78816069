// A model in this browser, apart from the page so that it stays responsive: file in, logits out.
//
// Messages: {id, load: {bytes, device, threads, manifest}} and {id, file, maxPixels} or {id, images, count}; answers {id, ...} or {id, problem}.

import { applyRule, decode } from "./pixels.js";

const folder = new URL("ort/", import.meta.url).href;
// Builds of onnxruntime-web: the one for GPUs is twice as large.
const BUILDS = {
  wasm: ["ort.wasm.js", "ort-wasm-simd-threaded"],
  webgpu: ["ort.webgpu.js", "ort-wasm-simd-threaded.asyncify"],
};

let ort = null;
let session = null;
let rule = null;
let turn = Promise.resolve(); // one run at a time

async function load({ bytes, device, threads, manifest }) {
  const [script, binary] = BUILDS[device];
  ort = await import(`${folder}${script}`);
  ort.env.wasm.wasmPaths = { mjs: `${folder}${binary}.js`, wasm: `${folder}${binary}.wasm` };
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = crossOriginIsolated ? threads : 1;
  session = await ort.InferenceSession.create(new Uint8Array(bytes), { executionProviders: [device], logSeverityLevel: 3 });
  rule = manifest.rule;
  const { size } = rule;
  await run(new Uint8Array(size * size * 3), 1); // the first run allocates, and compiles shaders
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
