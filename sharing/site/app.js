// The page: what to draw, the drawing as it comes, and a gallery of what was drawn.

import { matching, tidy } from "./text.js";

const SHOWN = 12; // suggestions
const KEPT = 60; // drawings in the gallery

const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));

// Threads need two headers that few hosts send. The service worker adds them, from the second load of the page on.
async function isolate() {
  if (!navigator.serviceWorker) return; // not over https
  await navigator.serviceWorker.register("sw.js");
  await navigator.serviceWorker.ready;
  if (self.crossOriginIsolated || sessionStorage.reloaded) return;
  sessionStorage.reloaded = true;
  location.reload();
  await new Promise(() => {});
}

const say = (text) => (page.status.textContent = text);
await isolate().catch(() => {}); // else one thread, and nothing offline

const site = await (await fetch("site.json")).json();
const captions = site.parts.flatMap((part) => part.captions.slice(1));
const worker = new Worker("worker.js", { type: "module" });
const gallery = JSON.parse(localStorage.gallery ?? "[]"); // the newest first

// Settings

for (const range of [page.guidance, page.steps]) {
  range.oninput = () => (range.nextElementSibling.value = range.value);
}

function set({ prompt, seed, guidance, steps }) {
  Object.assign(page.prompt, { value: prompt });
  for (const [name, value] of Object.entries({ seed, guidance, steps })) page[name].value = value;
  page.guidance.oninput();
  page.steps.oninput();
}

function asked() {
  const [seed, guidance, steps] = [page.seed, page.guidance, page.steps].map((input) => Number(input.value));
  return { prompt: page.prompt.value.trim(), seed, guidance, steps };
}

const linkTo = ({ prompt, seed, guidance, steps }) => `#${new URLSearchParams({ prompt, seed, guidance, steps })}`;

// Captions that fit what is typed

function suggest() {
  const found = page.prompt.value.trim() ? matching(page.prompt.value, captions) : site.examples;
  page.suggestions.replaceChildren(
    ...found.slice(0, SHOWN).map((caption) => {
      const chip = Object.assign(document.createElement("button"), { type: "button", textContent: caption });
      chip.onclick = () => {
        page.prompt.value = caption;
        page.form.requestSubmit(page.draw);
      };
      return chip;
    }),
  );
}

page.prompt.oninput = suggest;

// Drawing

const loading = new Map(); // of each file, how many bytes have come and how many there are
let started;

page.form.onsubmit = (event) => {
  event.preventDefault();
  if (page.draw.disabled) return;
  if (!page.keep.checked) page.seed.value = Math.floor(Math.random() * 2 ** 31);
  start(asked());
};

function start(request) {
  const caption = captions.find((one) => tidy(one) === tidy(request.prompt));
  page.offer.hidden = true;
  if (!caption && !localStorage.encoder) {
    page.offer.hidden = !request.prompt || !site.files["encoder.onnx"];
    say("The network has not learned this caption.");
    return;
  }
  page.draw.disabled = true;
  started = performance.now();
  say("Drawing …");
  worker.postMessage({ ...request, prompt: caption ?? request.prompt });
}

page.fetch.onclick = () => {
  localStorage.encoder = true;
  start(asked());
};

function show(pixels) {
  const [height, width] = site.shape;
  page.canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
}

worker.onmessage = ({ data }) => {
  if (data.loading) {
    const bytes = (loading.get(data.loading)?.bytes ?? 0) + data.bytes;
    loading.set(data.loading, { bytes, of: data.of });
    const [come, all] = ["bytes", "of"].map((what) => [...loading.values()].reduce((sum, one) => sum + one[what], 0));
    page.progress.value = come / all;
    say(`Loading the network: ${(come / 1e6).toFixed(1)} of ${(all / 1e6).toFixed(1)} MB`);
  } else if (data.step) {
    show(data.pixels);
    page.progress.value = data.step / data.of;
    say(`Step ${data.step} of ${data.of}`);
  } else {
    page.draw.disabled = false;
    page.progress.removeAttribute("value");
    loading.clear();
    if (data.error) {
      say(data.error);
      return;
    }
    show(data.pixels);
    say(`${data.drawn.prompt}, seed ${data.drawn.seed}: ${((performance.now() - started) / 1000).toFixed(1)} seconds`);
    history.replaceState(null, "", linkTo(data.drawn));
    gallery.unshift({ ...data.drawn, png: page.canvas.toDataURL() });
    gallery.splice(KEPT);
    showGallery();
  }
};

worker.onerror = (event) => say(`This browser cannot draw: ${event.message ?? "it has no module workers"}`);

// The gallery, kept in this browser

function showGallery() {
  try {
    localStorage.gallery = JSON.stringify(gallery);
  } catch {
    // full, or not allowed: then it ends with the page
  }
  page.gallery.replaceChildren(
    ...gallery.map((drawing) => {
      const figure = page.drawing.content.cloneNode(true);
      const part = (selector) => figure.querySelector(selector);
      Object.assign(part("img"), { src: drawing.png, alt: drawing.prompt });
      part("figcaption").textContent = drawing.prompt;
      const name = `${drawing.prompt.replace(/[^\p{L}\p{N}]+/gu, "-")}-${drawing.seed}.png`;
      Object.assign(part(".download"), { href: drawing.png, download: name });
      part(".link").href = linkTo(drawing);
      part(".remove").onclick = () => {
        gallery.splice(gallery.indexOf(drawing), 1);
        showGallery();
      };
      return figure;
    }),
  );
}

// A link that draws

function follow() {
  const wanted = { seed: 0, guidance: site.sampling.c, steps: site.sampling.steps, prompt: "" };
  Object.assign(wanted, Object.fromEntries(new URLSearchParams(location.hash.slice(1))));
  set(wanted);
  suggest();
  if (wanted.prompt && page.form.reportValidity()) start(asked());
}

page.size.textContent = `${(site.files["encoder.onnx"] / 1e6).toFixed(0)} MB`;
page.steps.max = Math.min(page.steps.max, site.schedule.alpha.length - 1);
[page.canvas.height, page.canvas.width] = site.shape;
page.about.textContent = site.about;
page.draw.disabled = false;
onhashchange = follow;
showGallery();
follow();
