// The page: images in, bars out. State lives here; nothing is stored, nothing leaves for another host.

import { Api, Problem } from "./api.js";
import { BrowserModel } from "./browser.js";
import { card } from "./card.js";
import { shiftChart } from "./charts.js";
import { GROUPS, count, h, percent, size } from "./dom.js";
import { between, logPrior, measuredPoints, probabilities, span, topK } from "./shift.js";

const TOP = 5;
const AT_ONCE = 4; // requests
const MOST = 200; // images on the page

const $ = (id) => document.getElementById(id);
const state = { api: null, gpu: null, models: [], model: null, shift: 0, items: [], number: 0, place: null, opened: new Map(), told: null };

async function start() {
  let config;
  try {
    const answer = await fetch("page/config.json");
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    config = await answer.json();
  } catch {
    return tell("The service does not answer. Check that it runs, then reload the page.");
  }
  state.api = new Api(config);
  document.querySelectorAll("[data-service]").forEach((element) => (element.hidden = !state.api.isService));
  $("limits").textContent = `${config.formats.map((name) => (name === "WEBP" ? "WebP" : name)).join(", ")}, at most ${size(config.max_bytes)} each.`;
  $("camera").hidden = !navigator.mediaDevices?.getUserMedia;
  $("key-form").hidden = !config.keys;
  listen();
  if (!state.api.isService) navigator.serviceWorker?.register("sw.js").catch(() => {}); // without it the page needs the host
  if (config.webgpu) findGpu();
  if (config.keys) $("key").focus();
  else await load();
}

/** Offer the GPU as a place, where the browser has WebGPU. */
async function findGpu() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (!adapter) return;
  state.gpu = { fp32: true, fp16: adapter.features.has("shader-f16") };
  if (state.model) showPlaces();
}

async function load() {
  try {
    state.models = await state.api.models();
  } catch (error) {
    return tell(sentence(error), error.needsKey);
  }
  tell("");
  $("key-form").hidden = true;
  $("model").replaceChildren(...state.models.map((model) => h("option", { value: model.name }, model.name)));
  document.querySelector("header .model").hidden = false;
  const asked = state.models.find((model) => model.name === state.model?.name) ?? state.models[0];
  choose(asked);
}

function choose(model) {
  state.model = model;
  model.prior ??= logPrior(model.manifest.train_counts);
  model.points ??= measuredPoints(model.manifest);
  $("model").value = model.name;
  const { min, max, left, right } = span(model.points, model.manifest.default_tail_shift ?? 0);
  Object.assign($("shift"), { min, max });
  $("shift-ends").replaceChildren(h("span", {}, left), h("span", {}, right));
  $("shift-panel").hidden = false;
  showPlaces();
  $("card-body").replaceChildren(...card(model, state.models.length > 1, state.api, download));
  document.title = `${model.name}: try the model`;
  showShift();
  again();
}

function listen() {
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    state.api.key = $("key").value.trim();
    load();
  });
  $("model").addEventListener("change", () => choose(state.models.find((model) => model.name === $("model").value)));
  $("files").addEventListener("change", () => {
    add($("files").files);
    $("files").value = "";
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData?.files.length) take(event.clipboardData);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    if (event.dataTransfer.files.length) take(event.dataTransfer);
    else tell("That was not a file. Drop image files, or paste an image.");
  });
  let asked = 0;
  const moved = () => {
    cancelAnimationFrame(asked);
    showShift();
    state.items.forEach(showAnswer);
  };
  $("shift").addEventListener("input", () => {
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(moved);
  });
  $("shift").addEventListener("change", () => {
    moved();
    if (state.told?.logits && state.items.includes(state.told)) $("status").textContent = spoken(state.told);
  });
  $("clear").addEventListener("click", () => {
    for (const item of state.items) {
      URL.revokeObjectURL(item.url);
      item.run++; // those that wait are not sent
    }
    state.items = [];
    state.told = null;
    $("results").replaceChildren();
    $("clear").hidden = true;
    $("status").textContent = "";
    $("files").focus();
  });
  listenCamera();
}

// Places: the service, and each precision in this browser

function showPlaces() {
  const { api, model } = state;
  // One name for the precision that the service prefers, whatever it is called in the next model.
  const places = api.isService ? model.precisions.map((precision) => [serviceName(model, precision), `On the service (${precision})`]) : [];
  if (api.config.browser)
    for (const [precision, file] of Object.entries(model.files)) {
      places.push([precision, `In this browser, ${precision} (${size(file.bytes)})`]);
      if (state.gpu?.[precision]) places.push([`${precision} webgpu`, `On this browser's GPU, ${precision} (${size(file.bytes)})`]);
    }
  if (!places.some(([place]) => place === state.place)) state.place = api.isService ? "service" : model.serves;
  $("places").replaceChildren(...places.map(([place, name]) =>
    h("label", {}, h("input", { type: "radio", name: "place", value: place, checked: place === state.place, onchange: () => {
      state.place = place;
      showPlaceHint();
      again();
    } }), name)));
  $("where").hidden = false;
  showPlaceHint();
}

const serviceName = (model, precision) => (precision === model.serves ? "service" : `service ${precision}`);

function showPlaceHint() {
  const { api, place } = state;
  const isolated = globalThis.crossOriginIsolated ? "" : " Here it uses one thread, because this page is not isolated from other origins.";
  $("place-hint").textContent =
    !place.startsWith("service") ? `The image does not leave this device. The model is loaded once, and its SHA-256 is checked.${isolated}`
    : api.config.browser ? "Images are sent to the service. Its time is decoding and the model; the whole request has the way and the wait, too. In this browser the same model gives the same answers, without sending them."
    : "Images are sent to the service. Its time is decoding and the model; the whole request has the way and the wait, too. To run the model in this browser, the service needs onnxruntime-web: python -m serve.page.ort";
}

/** The model in this browser, opened once while it is chosen. */
function opened(model, place) {
  const key = openedKey(model, place);
  if (!state.opened.has(key)) {
    const [precision, device] = place.split(" ");
    $("status").textContent = `Loading ${model.name}, ${precision} (${size(model.files[precision].bytes)}) into this browser …`;
    const opening = BrowserModel.open(model, precision, state.api, device);
    opening.catch(() => state.opened.get(key) === opening && state.opened.delete(key)); // the next image tries again
    state.opened.set(key, opening);
  }
  return state.opened.get(key);
}

function openedKey(model, place) {
  const [precision, device] = place.split(" ");
  return `${model.files[precision].sha256} ${device}`;
}

// Images

/** Add what was dropped or pasted. A folder looks like a file that cannot be read. */
function take(transfer) {
  const items = [...transfer.items].filter((item) => item.kind === "file");
  const files = items.map((item) => item.getAsFile());
  const folders = files.filter((_, i) => items[i].webkitGetAsEntry?.()?.isDirectory);
  add(files.filter((file) => !folders.includes(file)));
  if (folders.length) tell(`${folders[0].name} is a folder. Open it, and drop the images that are in it.`);
}

function add(files) {
  if (!state.model) return tell(state.api.config.keys ? "Enter the API key first." : "The models are not loaded yet. Try again in a moment.");
  tell("");
  const room = MOST - state.items.length;
  if (files.length > room) tell(`This page shows ${MOST} images at most; ${files.length - room} were left out.`);
  const added = [...files].slice(0, room).map((file) => ({ id: ++state.number, file, url: URL.createObjectURL(file), run: 0 }));
  for (const item of added) {
    item.element = itemElement(item);
    $("results").prepend(item.element);
  }
  state.items.push(...added);
  $("clear").hidden = state.items.length === 0;
  const place = $("results").getBoundingClientRect();
  if (place.top > innerHeight || place.top < 0) $("status").parentElement.scrollIntoView(); // on a phone it is below the slider
  answer(added);
}

/** Let go of the models that no longer run: each has a worker, with its weights and WebAssembly's memory. */
function release() {
  const { model, place } = state;
  const kept = place.startsWith("service") ? null : openedKey(model, place);
  for (const [key, opening] of state.opened) {
    if (key === kept) continue;
    state.opened.delete(key);
    opening.then((old) => old.close(), () => {});
  }
}

/** Ask for all images again: the model or its place has changed. */
function again() {
  release();
  for (const item of state.items) item.logits = item.problem = null;
  state.items.forEach(showAnswer);
  answer([...state.items]); // a list of its own: images that are added meanwhile have theirs
}

async function answer(items) {
  const waiting = items.map((item) => [item, ++item.run]);
  const { model, place } = state;
  let [done, failed] = [0, 0];
  const work = async () => {
    for (let next = waiting.shift(); next; next = waiting.shift()) {
      const [item, run] = next;
      if (item.run !== run) continue; // asked again, or removed
      let [result, problem] = [null, null];
      try {
        result = await ask(item.file, model, place);
      } catch (error) {
        problem = error;
      }
      if (item.run !== run) continue; // the same, meanwhile
      Object.assign(item, { logits: result?.logits, problem: problem && sentence(problem) });
      if (result) (item.times ??= new Map()).set(`${model.name} ${place}`, result);
      if (problem?.needsKey) askForKey();
      if (problem) failed++;
      done++;
      showAnswer(item);
      state.told = done === items.length && items.length === 1 && !problem ? item : null;
      $("status").textContent =
        done < items.length ? `${done} of ${items.length} images answered.` : items.length === 1 && !problem ? spoken(item) : `${done - failed} of ${items.length} images answered${failed ? `, ${failed} failed` : ""}.`;
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
}

async function ask(file, model, place) {
  const [where, asked] = place.split(" ");
  if (where !== "service") {
    state.api.checkSize(file);
    return (await opened(model, place)).predict(file);
  }
  const precision = asked ?? model.serves;
  const result = await state.api.predict(file, model, precision);
  if (result.sha256 !== model.files[precision].sha256) load(); // a new version was put in the model's place
  return result;
}

/** The time of each place that has answered: "service fp32: 3.1 ms (whole request 12 ms), browser fp32: 5.1 ms". */
function times(item) {
  const { model } = state;
  const names = new Map((model.precisions ?? []).map((precision) => [serviceName(model, precision), `service ${precision}`]));
  for (const precision of Object.keys(model.files)) names.set(precision, `browser ${precision}`).set(`${precision} webgpu`, `GPU ${precision}`);
  const texts = [];
  for (const [place, name] of names) {
    const taken = item.times?.get(`${model.name} ${place}`);
    if (taken) texts.push(`${name}: ${milliseconds(taken.ms)}${taken.wholeMs === undefined ? "" : ` (whole request ${milliseconds(taken.wholeMs)})`}`);
  }
  return texts.join(", ");
}

const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;

function itemElement(item) {
  const image = h("img", { src: item.url, alt: `the image ${item.file.name}` });
  image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth < 100));
  image.addEventListener("error", () => (image.hidden = true));
  item.body = h("div", { class: "body" }, h("p", { class: "hint" }, "asking …"));
  return h("li", { class: "result" }, h("figure", {}, image, h("figcaption", {}, item.file.name)), item.body);
}

function ranked(item) {
  const { manifest, prior } = state.model;
  const shares = probabilities(item.logits, prior, state.shift);
  return topK(shares, TOP).map((i) => ({ label: manifest.classes[i], group: manifest.groups[i], count: manifest.train_counts[i], share: shares[i], index: i }));
}

function showAnswer(item) {
  const remove = h("button", { type: "button", "aria-label": `Remove ${item.file.name}`, onclick: () => {
    URL.revokeObjectURL(item.url);
    item.run++;
    state.items = state.items.filter((other) => other !== item);
    const beside = item.element.nextElementSibling ?? item.element.previousElementSibling;
    item.element.remove();
    $("clear").hidden = state.items.length === 0;
    (beside?.querySelector("button") ?? $("files")).focus(); // the focused button is gone
  } }, "Remove");
  if (item.problem) {
    item.body.replaceChildren(h("p", { class: "problem" }, item.problem), h("div", { class: "foot" }, h("span"), remove));
    return;
  }
  if (!item.logits) {
    item.body.replaceChildren(h("p", { class: "hint" }, "asking …"));
    return;
  }
  const bars = ranked(item).map((row) => {
    const bar = h("span");
    bar.style.width = `${(100 * row.share).toFixed(2)}%`;
    return h("li", { class: row.group, "data-index": row.index, "data-share": row.share },
      h("span", { class: "label" }, row.label), h("span", { class: "track", "aria-hidden": "true" }, bar), h("span", { class: "prob" }, percent(row.share)),
      h("span", { class: "group" }, h("span", { class: "dot", "aria-hidden": "true" }), row.group, h("span", { class: "count" }, `, ${count(row.count)} images`)));
  });
  item.body.replaceChildren(
    h("ol", { class: "bars", "aria-label": `Most likely classes of ${item.file.name}` }, bars),
    h("div", { class: "foot" }, h("span", {}, times(item)), remove),
  );
}

function spoken(item) {
  const [best] = ranked(item);
  return `${item.file.name}: ${best.label}, ${percent(best.share)}.`;
}

// Tail shift

function showShift() {
  state.shift = Number($("shift").value);
  const text = state.shift.toFixed(2);
  $("shift-value").textContent = text;
  $("shift").setAttribute("aria-valuetext", `${text}: ${state.shift === 0 ? "as exported" : state.shift > 0 ? "favours rare classes" : "favours common classes"}`);
  const { points, manifest } = state.model;
  if (!points.length) {
    $("measured").replaceChildren(h("p", { class: "hint" }, "This bundle has no accuracy measured under other shifts."));
    return;
  }
  const rows = ["overall", ...GROUPS].map((score) => {
    const [now, before] = [between(points, state.shift, score), between(points, 0, score)];
    const change = now === null || before === null ? null : 100 * (now - before);
    const kind = change === null || Math.abs(change) < 0.05 ? "" : change > 0 ? "up" : "down";
    return h("tr", {}, h("th", { scope: "row" }, h("span", { class: `dot ${score}` }), score), h("td", {}, percent(now)),
      h("td", { class: kind }, change === null ? "–" : kind ? `${change > 0 ? "+" : "−"}${Math.abs(change).toFixed(1)}` : "0.0"));
  });
  $("measured").replaceChildren(
    h("div", { class: "measured" },
      h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Accuracy"), h("th", { scope: "col" }, "here"), h("th", { scope: "col" }, "change"))), h("tbody", {}, rows)),
      shiftChart(points, state.shift)),
    h("p", { class: "hint" }, `Measured on the ${manifest.split ?? "test"} images when the model was exported, at ${points.length} shifts; between them a straight line.`),
  );
}

// Camera

function listenCamera() {
  let stream = null;
  let asking = false;
  const stop = () => {
    stream?.getTracks().forEach((track) => track.stop());
    stream = null;
  };
  $("camera").addEventListener("click", async () => {
    if (asking) return; // a second stream would stay on
    asking = true;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" }, audio: false });
    } catch {
      return tell("The camera cannot be used. Allow it for this page, or choose an image file.");
    } finally {
      asking = false;
    }
    $("video").srcObject = stream;
    $("camera-dialog").showModal();
    await $("video").play();
  });
  $("shoot").addEventListener("click", () => {
    const video = $("video");
    if (!video.videoWidth) return; // no picture yet
    const canvas = h("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => add([new File([blob], `photograph-${state.number + 1}.jpg`, { type: "image/jpeg" })]), "image/jpeg", 0.95);
    $("camera-dialog").close();
  });
  $("camera-close").addEventListener("click", () => $("camera-dialog").close());
  $("camera-dialog").addEventListener("close", stop);
}

// Words

function sentence(error) {
  if (error instanceof Problem) return error.message;
  console.error(error);
  return `This page failed: ${error.message}`;
}

function tell(text, needsKey = false) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
  if (needsKey) askForKey();
}

function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
}

/** Save a file. With a key a plain link would be refused, so the page fetches it. */
async function download(event, url, name) {
  if (!state.api.key) return;
  event.preventDefault();
  try {
    const blob = await (await state.api.fetch(url)).blob();
    const link = h("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  } catch (error) {
    tell(sentence(error));
  }
}

start();
