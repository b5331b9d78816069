// The model card: what a bundle's manifest says, for people.

import { histogram } from "./charts.js";
import { GROUPS, MEANING, count, h, percent, size } from "./dom.js";

const ROWS = 100; // of classes shown at once

/** Elements of the card. several: whether the service has other models, too. download(event, url, name) saves a file. */
export function card(model, several, api, download) {
  const { manifest } = model;
  const scores = manifest.accuracy?.[model.serves] ?? {};
  const total = manifest.train_counts.reduce((sum, n) => sum + n, 0);
  const imbalance = Math.max(...manifest.train_counts) / Math.max(1, Math.min(...manifest.train_counts));
  const source = manifest.source ?? {};
  return [
    h("div", { class: "panel" },
      h("dl", { class: "facts" },
        fact("Classes", count(manifest.classes.length)),
        fact("Training images", count(total)),
        fact("Largest over smallest", imbalance.toFixed(imbalance < 10 ? 1 : 0)),
        fact(`Accuracy on ${manifest.split ?? "test"}`, percent(scores.overall)),
        fact("Run", source.run ?? "–"),
        fact("Epoch", source.epoch ?? "–"),
        fact("Input", `${manifest.rule.size} × ${manifest.rule.size} px`),
        fact("Exported", (manifest.created ?? "–").slice(0, 10)),
        source.pretrained ? wide("Pretrained weights", `${source.pretrained.network}: ${source.pretrained.weights}; licence ${source.pretrained.licence ?? "not known"}`) : null,
        wide("From file to pixels", manifest.input ?? ""),
      ),
    ),
    h("div", { class: "panel" },
      h("h3", {}, "Training images of each class"),
      histogram(manifest),
      h("ul", { class: "legend" }, GROUPS.map((group) => h("li", {}, h("span", { class: `dot ${group}` }), `${group}: ${MEANING[group]} images`))),
    ),
    h("div", { class: "panel" }, h("h3", {}, `Accuracy on ${manifest.split ?? "test"}`), accuracy(model, download), worst(model)),
    h("div", { class: "panel" }, h("h3", { id: "classes-title" }, "Classes"), classTable(model)),
    h("div", { class: "panel" }, h("h3", {}, "Use it elsewhere"), elsewhere(model, several, api)),
  ];
}

const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)));
const wide = (name, value) => h("div", { class: "wide" }, h("dt", {}, name), h("dd", {}, value));

function accuracy(model, download) {
  const columns = ["overall", ...GROUPS, "worst"];
  const rows = Object.entries(model.files).map(([precision, file]) => {
    const scores = model.manifest.accuracy?.[precision] ?? {};
    const name = `${model.name}.${precision}.onnx`;
    return h("tr", {},
      h("th", { scope: "row" }, precision),
      columns.map((column) => h("td", {}, percent(scores[column]))),
      h("td", {}, h("a", { href: file.url, download: name, onclick: (event) => download(event, file.url, name), "aria-label": `Download ${name}, ${size(file.bytes)}` }, size(file.bytes))),
    );
  });
  return [
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Accuracy of each precision" },
      h("table", {},
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Precision"), columns.map((column) =>
          h("th", { scope: "col" }, GROUPS.includes(column) ? h("span", { class: `dot ${column}` }) : null, column === "worst" ? "worst class" : column)), h("th", { scope: "col" }, "File"))),
        h("tbody", {}, rows),
      ),
    ),
    h("p", {}, h("a", { href: model.manifestUrl, download: `${model.name}.manifest.json`, onclick: (event) => download(event, model.manifestUrl, `${model.name}.manifest.json`) }, "Download manifest.json"), h("span", { class: "hint" }, ", with all of this for programs")),
    Object.entries(model.files).map(([precision, file]) => h("p", { class: "hint" }, `SHA-256 of ${precision}: `, h("code", {}, file.sha256))),
  ];
}

/** Accuracies of the classes by index, of the precision that serves; null where the bundle does not have them. */
const perClass = (model) => model.manifest.per_class?.[model.serves] ?? null;

function worst(model) {
  const shares = perClass(model);
  if (!shares) return null;
  const order = shares.map((_, i) => i).filter((i) => shares[i] !== null).sort((a, b) => shares[a] - shares[b]).slice(0, 5);
  return [
    h("h3", {}, "Worst classes"),
    h("ul", { class: "plain" }, order.map((i) => h("li", {}, h("span", { class: `dot ${model.manifest.groups[i]}` }),
      `${model.manifest.classes[i]}: ${percent(shares[i])}, ${count(model.manifest.train_counts[i])} training images`))),
  ];
}

function classTable(model) {
  const { manifest } = model;
  const shares = perClass(model);
  const columns = [
    { name: "Class", of: (i) => manifest.classes[i] },
    { name: "Group", of: (i) => GROUPS.indexOf(manifest.groups[i]) },
    { name: "Training images", of: (i) => manifest.train_counts[i], down: true },
    ...(shares ? [{ name: "Accuracy", of: (i) => shares[i] ?? -1 }] : []),
  ];
  let [sorted, down, all] = [2, true, false];
  const search = h("input", { type: "search", id: "class-search", autocomplete: "off", spellcheck: "false" });
  const shown = h("span", { class: "hint", role: "status" });
  const more = h("button", { type: "button" }, "Show all");
  const body = h("tbody");
  const heads = columns.map((column, number) =>
    h("th", { scope: "col" }, h("button", { type: "button", onclick: () => {
      [sorted, down] = [number, sorted === number ? !down : column.down === true];
      show();
    } }, column.name)));
  const show = () => {
    const wanted = search.value.trim().toLowerCase();
    const found = manifest.classes.map((_, i) => i).filter((i) => manifest.classes[i].toLowerCase().includes(wanted));
    const { of } = columns[sorted];
    const sign = down ? -1 : 1;
    found.sort((a, b) => {
      const [left, right] = [of(a), of(b)];
      return sign * (typeof left === "string" ? left.localeCompare(right) : left - right) || a - b;
    });
    const rows = all ? found : found.slice(0, ROWS);
    body.replaceChildren(...rows.map((i) =>
      h("tr", {}, h("td", { class: "name" }, manifest.classes[i]), h("td", {}, h("span", { class: `dot ${manifest.groups[i]}` }), manifest.groups[i]),
        h("td", {}, count(manifest.train_counts[i])), shares ? h("td", {}, percent(shares[i])) : null)));
    heads.forEach((head, number) => {
      if (number === sorted) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    shown.textContent = `${count(rows.length)} of ${count(manifest.classes.length)} classes`;
    more.hidden = rows.length === found.length;
  };
  search.addEventListener("input", show);
  more.addEventListener("click", () => {
    all = true;
    show();
  });
  show();
  return [
    h("div", { class: "search" }, h("label", { for: "class-search" }, "Find"), search, shown),
    h("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-labelledby": "classes-title" }, h("table", {}, h("thead", {}, h("tr", {}, heads)), body)),
    more,
    shares ? null : h("p", { class: "hint" }, "This bundle has no accuracy of each class: it was exported by an older version."),
  ];
}

function elsewhere(model, several, api) {
  const here = new URL(".", location.href).href;
  if (!api.isService) {
    return h("p", {}, "This folder works without any service: copy it to any static host. ",
      "Who wants the model in a program takes the ONNX file above; ", h("code", {}, "manifest.json"), " says what goes in and comes out.");
  }
  const key = api.config.keys ? "-H 'x-api-key: YOUR_KEY' " : "";
  return [
    copied(`curl ${key}--data-binary @image.jpg '${here}v1/predict?model=${model.name}'`),
    h("p", { class: "hint" }, "The model on a device of your own, without this service:"),
    copied(`python -m serve.edge ${here.replace(/\/$/, "")} image.jpg${several ? ` --name ${model.name}` : ""}${api.config.keys ? " --key YOUR_KEY" : ""}`),
  ];
}

function copied(line) {
  const button = h("button", { type: "button", onclick: async () => {
    try {
      await navigator.clipboard.writeText(line);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(pre);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  } }, "Copy");
  const pre = h("pre", {}, line);
  return h("div", { class: "copy" }, pre, button);
}
