// From an image file to the network's input: the rule that training, service and the Python edge follow (pipelines/pixels.py).
//
// Resizing is that of Pillow 13, number for number: the same weights in double precision, rounded to 22 bits, and two passes, each
// rounded to bytes. The horizontal pass is the first, unless the height shrinks by more than twice what the width does: Pillow was
// compared over many sizes, see tests/serve/test_browser.py. Only the decoder is the browser's own.

import { oriented } from "./orientation.js";

const BITS = 22;
const LARGEST_SIDE = 16384; // of a canvas

const FILTERS = {
  bilinear: { support: 1, at: (x) => (Math.abs(x) < 1 ? 1 - Math.abs(x) : 0) },
  bicubic: {
    support: 2,
    at: (x) => {
      const [a, d] = [-0.5, Math.abs(x)];
      if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
      return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
    },
  },
};

/** Python's round: halves go to the even number. */
export function roundHalfEven(x) {
  const low = Math.floor(x);
  const rest = x - low;
  return rest < 0.5 || (rest === 0.5 && low % 2 === 0) ? low : low + 1;
}

/** For each output pixel its first input pixel, and the weights of it and its successors as integers. */
function weights(inputs, from, to, outputs, filter) {
  const scale = Math.fround(to - from) / outputs;
  const stretch = Math.max(scale, 1);
  const support = filter.support * stretch;
  return Array.from({ length: outputs }, (_, place) => {
    const center = from + (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(inputs, Math.trunc(center + support + 0.5));
    const values = Array.from({ length: end - first }, (_, i) => filter.at((i + first - center + 0.5) * (1 / stretch)));
    const sum = values.reduce((total, value) => total + value, 0);
    const taps = Int32Array.from(values, (value) => {
      const share = sum === 0 ? value : value / sum;
      return Math.trunc(share * 2 ** BITS + (share < 0 ? -0.5 : 0.5));
    });
    return { first, taps };
  });
}

/** Resize {data: RGB bytes, width, height} to width x height; box: [left, top, right, bottom] of the input, floats. */
export function resize(image, width, height, filter, box) {
  const [left, top, right, bottom] = box.map(Math.fround);
  const across = weights(image.width, left, right, width, FILTERS[filter]);
  const down = weights(image.height, top, bottom, height, FILTERS[filter]);
  const needsAcross = width !== image.width || left !== 0 || right !== width;
  const needsDown = height !== image.height || top !== 0 || bottom !== height;
  const downFirst = height < image.height && image.height - height > 2 * (image.width - width);
  if (needsDown && downFirst) image = vertical(image, down);
  if (needsAcross) image = horizontal(image, across, needsDown && !downFirst ? used(down) : [0, image.height]);
  if (needsDown && !downFirst) image = vertical(image, down, needsAcross ? used(down)[0] : 0);
  return image;
}

/** The first input row that is used, and the end of them. */
const used = (down) => [down[0].first, down.at(-1).first + down.at(-1).taps.length];

/** Resize the rows from `first` to `end` across. */
function horizontal({ data, width }, across, [top, end]) {
  const out = new Uint8ClampedArray((end - top) * across.length * 3);
  let place = 0;
  for (let y = top; y < end; y++) {
    for (const { first, taps } of across) {
      let [r, g, b] = [1 << (BITS - 1), 1 << (BITS - 1), 1 << (BITS - 1)];
      let at = (y * width + first) * 3;
      for (let i = 0; i < taps.length; i++, at += 3) {
        const tap = taps[i];
        r += data[at] * tap;
        g += data[at + 1] * tap;
        b += data[at + 2] * tap;
      }
      out[place++] = r >> BITS;
      out[place++] = g >> BITS;
      out[place++] = b >> BITS;
    }
  }
  return { data: out, width: across.length, height: end - top };
}

/** Resize down. skipped: rows of the original that the image lacks at its top. */
function vertical({ data, width }, down, skipped = 0) {
  const row = width * 3;
  const out = new Uint8ClampedArray(down.length * row);
  const sums = new Int32Array(row);
  down.forEach(({ first, taps }, y) => {
    sums.fill(1 << (BITS - 1));
    for (let i = 0; i < taps.length; i++) {
      const tap = taps[i];
      const start = (first - skipped + i) * row;
      for (let x = 0; x < row; x++) sums[x] += data[start + x] * tap;
    }
    for (let x = 0; x < row; x++) out[y * row + x] = sums[x] >> BITS;
  });
  return { data: out, width, height: down.length };
}

function crop(image, left, top, size) {
  const out = new Uint8ClampedArray(size * size * 3);
  for (let y = 0; y < size; y++) {
    const start = ((top + y) * image.width + left) * 3;
    out.set(image.data.subarray(start, start + size * 3), y * size * 3);
  }
  return { data: out, width: size, height: size };
}

/** Apply a manifest's rule {size, ratio, square, max_side} to an RGB image; the result has size x size pixels. */
export function applyRule(image, rule) {
  const { size } = rule;
  const side = roundHalfEven(size / rule.ratio);
  let [width, height] = [image.width, image.height];
  let stored = [width, height];
  if (rule.square !== null) stored = [rule.square, rule.square];
  else if (rule.max_side !== null) {
    const scale = Math.min(1, rule.max_side / Math.max(width, height));
    stored = [Math.max(1, roundHalfEven(width * scale)), Math.max(1, roundHalfEven(height * scale))];
  }
  if (stored[0] !== width || stored[1] !== height) image = resize(image, ...stored, "bicubic", [0, 0, width, height]);
  [width, height] = stored;
  const shorter = Math.min(width, height);
  const [wide, high] = [Math.trunc((side * width) / shorter), Math.trunc((side * height) / shorter)];
  const [left, top] = [roundHalfEven((wide - size) / 2), roundHalfEven((high - size) / 2)];
  if (wide === width && high === height) return crop(image, left, top, size);
  const [x, y] = [width / wide, height / high];
  return resize(image, size, size, rule.interpolation ?? "bilinear", [left * x, top * y, Math.min(width, (left + size) * x), Math.min(height, (top + size) * y)]);
}

// EXIF's orientations as matrices of a canvas of width w and height h.
const TURNS = {
  1: () => [1, 0, 0, 1, 0, 0],
  2: (w) => [-1, 0, 0, 1, w, 0],
  3: (w, h) => [-1, 0, 0, -1, w, h],
  4: (w, h) => [1, 0, 0, -1, 0, h],
  5: () => [0, 1, 1, 0, 0, 0],
  6: (w) => [0, 1, -1, 0, w, 0],
  7: (w, h) => [0, -1, -1, 0, w, h],
  8: (w, h) => [0, -1, 1, 0, 0, h],
};

/** Whether a file is a PNG of 16 bits a value, and whether it says that fewer of them are used. */
async function deepPng(file) {
  const bytes = new Uint8Array(await file.slice(0, 4096).arrayBuffer());
  const deep = bytes.length > 25 && bytes[0] === 0x89 && bytes[1] === 0x50 && bytes[24] === 16;
  return { deep, narrow: deep && new TextDecoder("latin1").decode(bytes).includes("sBIT") };
}

const TOO_DEEP = "16-bit values of another range than 0 to 65,535, of which browsers keep only 8 bits";

/**
 * Decode an image file as a viewer shows it: turned as its metadata say, transparency over white, colour profiles ignored. RGB.
 * window: the rule's, which needs all 16 bits.
 */
export async function decode(file, maxPixels, window = null) {
  const { deep, narrow } = await deepPng(file);
  if (deep && (narrow || window)) throw new Error(TOO_DEEP);
  let bitmap;
  const { turn, bare } = await oriented(file);
  try {
    bitmap = await createImageBitmap(bare, { premultiplyAlpha: "none", colorSpaceConversion: "none" });
  } catch {
    throw new Error("not an image that this browser reads");
  }
  const [width, height] = turn > 4 ? [bitmap.height, bitmap.width] : [bitmap.width, bitmap.height];
  try {
    if (width * height > maxPixels) throw new Error(`${width} × ${height} pixels, ${maxPixels.toLocaleString("en")} at most`);
    if (Math.max(width, height) > LARGEST_SIDE) throw new Error(`a side of more than ${LARGEST_SIDE.toLocaleString("en")} pixels`);
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.setTransform(...TURNS[turn](width, height));
    context.drawImage(bitmap, 0, 0);
    const rgba = context.getImageData(0, 0, width, height).data;
    const data = new Uint8ClampedArray(width * height * 3);
    for (let from = 0, to = 0; from < rgba.length; from += 4) {
      data[to++] = rgba[from];
      data[to++] = rgba[from + 1];
      data[to++] = rgba[from + 2];
    }
    // The upper 8 bits of 12-bit values are black: the service refuses them, too, or shifts them.
    if (deep && data.some((value) => value > 0) && !data.some((value) => value > 15)) throw new Error(TOO_DEEP);
    return { data, width, height };
  } finally {
    bitmap.close();
  }
}
