// The orientation of an image file, read as training and service do (pipelines/exif.py): its EXIF data decide, else its XMP data.
//
// Browsers differ in what they heed: Chromium turns JPEG and PNG by EXIF, WebP by nothing, and no file by XMP. So the file is
// decoded without these data, and turned here.

const XMP = /tiff:Orientation(?:="|>)\s*([0-9])/;
const SIZES = { 1: 1, 3: 2, 4: 4 }; // bytes of a value, of EXIF's types BYTE, SHORT and LONG
const EXIF_START = "Exif\0\0";
const XMP_START = "http://ns.adobe.com/xap/1.0/\0";
const VP8X_FLAGS = 20; // where WebP's flags are
const [HAS_XMP, HAS_EXIF] = [4, 8];

const latin1 = (bytes) => new TextDecoder("latin1").decode(bytes);
const viewOf = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.length);

/** {turn, bare} of an image file: the orientation, 1 to 8 as in EXIF, and the file as a Blob without what a browser may heed. */
export async function oriented(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const head = latin1(bytes.subarray(0, 16));
  const read = head.startsWith("\xff\xd8") ? ofJpeg : head.startsWith("PNG", 1) ? ofPng : head.startsWith("RIFF") && head.includes("WEBP") ? ofWebp : null;
  if (!read) return { turn: 1, bare: file }; // of other formats the browser decides
  const { exif, xmp, kept } = await read(bytes);
  const value = (exif && fromExif(exif)) ?? Number(XMP.exec(xmp ?? "")?.[1] ?? 1);
  return { turn: value >= 1 && value <= 8 ? value : 1, bare: new Blob(kept, { type: file.type }) };
}

/** The tag's value in EXIF bytes; null where it is missing or damaged. */
function fromExif(bytes) {
  if (latin1(bytes.subarray(0, 6)) === EXIF_START) bytes = bytes.subarray(6);
  const little = latin1(bytes.subarray(0, 2)) === "II";
  if (!little && latin1(bytes.subarray(0, 2)) !== "MM") return null;
  const number = (at, size) => {
    const digits = [...bytes.subarray(at, at + size)];
    return (little ? digits.reverse() : digits).reduce((sum, digit) => sum * 256 + digit, 0);
  };
  const first = number(4, 4);
  for (let i = 0, at = first + 2; i < number(first, 2); i++, at += 12) {
    if (at + 12 > bytes.length) return null;
    if (number(at, 2) !== 0x0112) continue;
    const [size, count] = [SIZES[number(at + 2, 2)] ?? 0, number(at + 4, 4)];
    return size && count ? number(size * count <= 4 ? at + 8 : number(at + 8, 4), size) : null;
  }
  return null;
}

function ofJpeg(bytes) {
  const view = viewOf(bytes);
  const parts = { exif: null, xmp: null, kept: [] };
  let [at, from] = [2, 0];
  while (at + 4 <= bytes.length) {
    const marker = bytes[at + 1];
    if (bytes[at] !== 0xff || marker === 0xff) at += 1; // other bytes between segments, or padding
    else if (marker === 0 || marker === 1 || (marker >= 0xd0 && marker <= 0xd8)) at += 2; // without a length
    else if (marker === 0xda || marker === 0xd9) break; // the picture begins, or there is none
    else {
      const end = at + 2 + view.getUint16(at + 2);
      const content = bytes.subarray(at + 4, end);
      const start = marker === 0xe1 ? latin1(content.subarray(0, XMP_START.length)) : "";
      if (start.startsWith(EXIF_START)) parts.exif = parts.exif ? joined(parts.exif, content.subarray(6)) : content;
      else if (start === XMP_START) parts.xmp = latin1(content);
      if (start.startsWith(EXIF_START) || start === XMP_START) {
        parts.kept.push(bytes.subarray(from, at));
        from = end;
      }
      at = end;
    }
  }
  parts.kept.push(bytes.subarray(from));
  return parts;
}

function joined(one, other) {
  const both = new Uint8Array(one.length + other.length);
  both.set(one);
  both.set(other, one.length);
  return both;
}

async function ofPng(bytes) {
  const view = viewOf(bytes);
  const parts = { exif: null, xmp: null, kept: [bytes.subarray(0, 8)] };
  const texts = {};
  for (let at = 8; at + 8 <= bytes.length; ) {
    const kind = latin1(bytes.subarray(at + 4, at + 8));
    const end = at + 12 + view.getUint32(at);
    const content = bytes.subarray(at + 8, end - 4);
    if (kind === "eXIf") parts.exif = content;
    else if (["tEXt", "zTXt", "iTXt"].includes(kind)) Object.assign(texts, await textOf(kind, content));
    else parts.kept.push(bytes.subarray(at, end));
    at = end;
  }
  parts.xmp = texts["XML:com.adobe.xmp"];
  const profile = texts["Raw profile type exif"]; // ImageMagick's: three lines, then hexadecimal
  const digits = profile?.split("\n").slice(3).join("").replace(/\s/g, "") ?? "";
  if (!parts.exif?.length && /^([0-9a-f]{2})+$/i.test(digits)) parts.exif = Uint8Array.from(digits.match(/../g), (pair) => parseInt(pair, 16));
  return parts;
}

/** {keyword: text} of a PNG's text chunk; {} where it is damaged. */
async function textOf(kind, content) {
  const name = content.indexOf(0);
  if (name < 0) return {};
  let rest = content.subarray(name + 1);
  let packed = kind === "zTXt";
  if (packed) rest = rest.subarray(1); // the method
  if (kind === "iTXt") {
    packed = rest[0] === 1;
    rest = rest.subarray(2);
    for (const _ of ["language", "keyword in it"]) rest = rest.subarray(rest.indexOf(0) + 1);
  }
  try {
    const text = packed ? await new Response(new Blob([rest]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer() : rest;
    return { [latin1(content.subarray(0, name))]: latin1(text) };
  } catch {
    return {};
  }
}

function ofWebp(bytes) {
  const parts = { exif: null, xmp: null, kept: [bytes] };
  if (latin1(bytes.subarray(12, 16)) !== "VP8X") return parts; // no such data
  const view = viewOf(bytes);
  const flags = bytes[VP8X_FLAGS];
  for (let at = 12; at + 8 <= bytes.length; ) {
    const kind = latin1(bytes.subarray(at, at + 4));
    const length = view.getUint32(at + 4, true);
    const content = bytes.subarray(at + 8, at + 8 + length);
    if (kind === "EXIF" && flags & HAS_EXIF) parts.exif ??= content;
    if (kind === "XMP " && flags & HAS_XMP) parts.xmp ??= latin1(content);
    at += 8 + length + (length & 1);
  }
  const head = bytes.slice(0, VP8X_FLAGS + 1);
  head[VP8X_FLAGS] &= ~(HAS_EXIF | HAS_XMP);
  parts.kept = [head, bytes.subarray(head.length)];
  return parts;
}
