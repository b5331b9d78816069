// SHA-256 in hexadecimal. Browsers have it on https and localhost alone; elsewhere the lines below compute it (FIPS 180-4).

export async function sha256(bytes) {
  const digest = globalThis.crypto?.subtle ? new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)) : plain(bytes);
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The digest of bytes, without the browser's help. */
export function plain(bytes) {
  const primes = [];
  for (let n = 2; primes.length < 64; n++) if (primes.every((prime) => n % prime)) primes.push(n);
  const fraction = (x) => Math.floor((x - Math.floor(x)) * 2 ** 32) | 0;
  const constants = Int32Array.from(primes, (prime) => fraction(Math.cbrt(prime)));
  const hash = Int32Array.from(primes.slice(0, 8), (prime) => fraction(Math.sqrt(prime)));
  const blocks = (bytes.length + 9 + 63) >> 6;
  const tail = new Uint8Array(128);
  const whole = bytes.length & ~63;
  tail.set(bytes.subarray(whole));
  tail[bytes.length - whole] = 0x80;
  const tailView = new DataView(tail.buffer);
  const end = blocks * 64 - whole;
  tailView.setUint32(end - 8, Math.floor(bytes.length / 2 ** 29));
  tailView.setUint32(end - 4, (bytes.length << 3) >>> 0);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const w = new Int32Array(64);
  const turn = (x, n) => (x >>> n) | (x << (32 - n));
  for (let block = 0; block < blocks; block++) {
    const [source, start] = block * 64 < whole ? [view, block * 64] : [tailView, block * 64 - whole];
    for (let i = 0; i < 16; i++) w[i] = source.getInt32(start + 4 * i);
    for (let i = 16; i < 64; i++) {
      const [x, y] = [w[i - 15], w[i - 2]];
      w[i] = w[i - 16] + w[i - 7] + (turn(x, 7) ^ turn(x, 18) ^ (x >>> 3)) + (turn(y, 17) ^ turn(y, 19) ^ (y >>> 10));
    }
    let [a, b, c, d, e, f, g, h] = hash;
    for (let i = 0; i < 64; i++) {
      const one = (h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + constants[i] + w[i]) | 0;
      const two = ((turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + one) | 0, c, b, a, (one + two) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((value, i) => (hash[i] = hash[i] + value));
  }
  const digest = new Uint8Array(32);
  hash.forEach((value, i) => new DataView(digest.buffer).setInt32(4 * i, value));
  return digest;
}
