// Two pictures in SVG: the classes' training counts, and accuracy over the tail shift.

import { between, ends } from "./shift.js";
import { GROUPS, count, s } from "./dom.js";

/** Training images of each class, largest first, coloured by shot group; the height is logarithmic. */
export function histogram(manifest) {
  const [width, height, left, bottom] = [420, 150, 40, 18];
  const order = manifest.train_counts.map((_, i) => i).sort((a, b) => manifest.train_counts[b] - manifest.train_counts[a]);
  const most = Math.max(...order.map((i) => manifest.train_counts[i]), 10);
  const top = Math.ceil(Math.log10(most));
  const y = (value) => height - bottom - (Math.log10(Math.max(value, 1)) / top) * (height - bottom - 8);
  const step = (width - left - 4) / order.length;
  const gap = step > 4 ? 1 : 0;
  const paths = Object.fromEntries(GROUPS.map((group) => [group, ""]));
  order.forEach((i, place) => {
    const [x, height_] = [left + place * step, y(Math.max(manifest.train_counts[i], 1.15))];
    paths[manifest.groups[i]] += `M${x.toFixed(2)} ${height - bottom}V${height_.toFixed(2)}h${(step - gap).toFixed(2)}V${height - bottom}z`;
  });
  const lines = Array.from({ length: top + 1 }, (_, power) => [
    s("line", { class: "axis", x1: left, x2: width, y1: y(10 ** power), y2: y(10 ** power) }),
    s("text", { x: left - 6, y: y(10 ** power) + 4, "text-anchor": "end" }, count(10 ** power)),
  ]);
  const [first, last] = [order[0], order.at(-1)];
  const text =
    `Training images of ${order.length} classes, largest first: from ${count(manifest.train_counts[first])} of ${manifest.classes[first]} ` +
    `to ${count(manifest.train_counts[last])} of ${manifest.classes[last]}.`;
  return s(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": text },
    lines,
    GROUPS.map((group) => s("path", { class: group, d: paths[group] })),
    s("text", { x: left, y: height - 3 }, "classes, largest first"),
  );
}

/** Measured accuracy of the shot groups over the tail shift, with a line at the shift that is set. */
export function shiftChart(points, shift) {
  const [width, height, left, bottom] = [360, 180, 42, 20];
  const [low, high] = ends(points);
  const x = (value) => left + ((value - low) / (high - low || 1)) * (width - left - 10);
  const y = (share) => 8 + (1 - share) * (height - bottom - 8);
  const grid = [0, 0.5, 1].map((share) => [
    s("line", { class: "axis", x1: left, x2: width - 6, y1: y(share), y2: y(share) }),
    s("text", { x: left - 5, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`),
  ]);
  const curves = ["overall", ...GROUPS].map((score) => {
    const known = points.filter((point) => point[score] !== null && point[score] !== undefined);
    if (!known.length) return [];
    const now = between(points, shift, score);
    return [
      s("path", { class: `curve ${score}`, d: known.map((p, i) => `${i ? "L" : "M"}${x(p.shift).toFixed(1)} ${y(p[score]).toFixed(1)}`).join("") }),
      now === null ? null : s("circle", { class: score, cx: x(shift), cy: y(now), r: 4 }),
    ];
  });
  return s(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, // the table beside it says the same in words
    grid,
    s("line", { class: "now", x1: x(shift), x2: x(shift), y1: 4, y2: height - bottom }),
    curves,
    [low, (low + high) / 2, high].map((value, i) =>
      s("text", { x: x(value), y: height - 4, "text-anchor": ["start", "middle", "end"][i] }, i === 1 ? "tail shift" : String(Number(value.toFixed(3)))),
    ),
  );
}
