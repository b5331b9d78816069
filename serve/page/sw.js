// Works offline after the first visit: every file is kept, and only bytes with the SHA-256 of the list below are.
// Answers carry the headers that isolate the page, so that WebAssembly may use threads where the host sends none.

const VERSION = "@VERSION@";
const FILES = @FILES@; // path: SHA-256
const FIRST = @FIRST@; // kept at the first visit; the others when they are used
const PREFIX = `cibl-ray ${self.registration.scope} `;
const NAME = PREFIX + VERSION;

self.addEventListener("install", (event) => {
  event.waitUntil(Promise.all(FIRST.map(installed)).then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => {
  const clean = async () => {
    for (const name of await caches.keys()) if (name.startsWith(PREFIX) && name !== NAME) await caches.delete(name);
    await self.clients.claim();
  };
  event.waitUntil(clean());
});

self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  if (event.request.method !== "GET" || !url.href.startsWith(self.registration.scope)) return;
  const path = decodeURIComponent(url.pathname.slice(new URL(self.registration.scope).pathname.length)) || "index.html";
  if (path in FILES) event.respondWith(kept(path));
});

async function kept(path) {
  const cache = await caches.open(NAME);
  const found = await cache.match(place(path));
  if (found) return found;
  const answer = await fetched(path);
  if (answer.ok) await keep(path, answer).catch(() => {}); // no room for it: it is fetched again next time
  return answer;
}

const place = (path) => new URL(path.split("/").map(encodeURIComponent).join("/"), self.registration.scope).href;

/** Where a file is not that of this version, the version before stays in use. */
async function installed(path) {
  const answer = await fetched(path);
  if (!answer.ok) throw new Error(await answer.text());
  await keep(path, answer);
}

async function keep(path, answer) {
  const cache = await caches.open(NAME);
  await cache.put(place(path), answer.clone());
}

async function fetched(path) {
  const answer = await fetch(place(path), { cache: "no-cache" });
  if (!answer.ok) throw new Error(`${path}: status ${answer.status}`);
  const bytes = await answer.arrayBuffer();
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (found !== FILES[path]) return new Response(`${path} is not the file of version ${VERSION}`, { status: 502 });
  const headers = new Headers({
    "content-type": answer.headers.get("content-type") ?? "application/octet-stream",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "same-origin",
  });
  return new Response(bytes, { headers });
}
