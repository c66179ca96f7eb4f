// The service worker: what was loaded once is there without a network, and the page may use threads.

const CACHE = "emoji";
const HEADERS = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };
const PATIENCE = 4; // seconds that the network has for what the cache holds …
const REST = 30; // … and for how long it is not asked for that again, once it took longer or failed

let restUntil = 0;

self.oninstall = () => self.skipWaiting();
self.onactivate = (event) => event.waitUntil(self.clients.claim());

// What has its version in its address never changes; of the rest, the network's is newer than the cache's.
async function answer(request) {
  const cache = await caches.open(CACHE);
  const held = await cache.match(request);
  if (held && (new URL(request.url).searchParams.has("v") || Date.now() < restUntil)) return held;
  try {
    const response = await fetch(request, held && { signal: AbortSignal.timeout(1000 * PATIENCE) });
    if (response.status !== 200) return response;
    const isolated = new Response(response.body, response);
    for (const [name, value] of Object.entries(HEADERS)) isolated.headers.set(name, value);
    await cache.put(request, isolated.clone());
    const all = await cache.keys(request, { ignoreSearch: true });
    for (const { url } of all) if (url !== request.url) await cache.delete(url); // earlier versions
    return isolated;
  } catch (error) {
    if (!held) throw error;
    restUntil = Date.now() + 1000 * REST;
    return held;
  }
}

self.onfetch = (event) => {
  const { method, url } = event.request;
  if (method === "GET" && url.startsWith(self.registration.scope)) event.respondWith(answer(event.request));
};
