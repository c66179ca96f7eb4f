// The service worker: what was loaded once is there without a network, and the page may use threads.

const CACHE = "emoji";
const HEADERS = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

self.oninstall = () => self.skipWaiting();
self.onactivate = (event) => event.waitUntil(self.clients.claim());

// What has its version in its address never changes; of the rest, the network's is newer than the cache's.
async function answer(request) {
  const cache = await caches.open(CACHE);
  const held = await cache.match(request);
  if (held && new URL(request.url).searchParams.has("v")) return held;
  try {
    const response = await fetch(request);
    if (response.status !== 200) return response;
    await cache.delete(request, { ignoreSearch: true }); // an earlier version
    const isolated = new Response(response.body, response);
    for (const [name, value] of Object.entries(HEADERS)) isolated.headers.set(name, value);
    await cache.put(request, isolated.clone());
    return isolated;
  } catch (error) {
    if (held) return held;
    throw error;
  }
}

self.onfetch = (event) => {
  const { method, url } = event.request;
  if (method === "GET" && url.startsWith(self.registration.scope)) event.respondWith(answer(event.request));
};
