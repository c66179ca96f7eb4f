// All that takes long, beside the page: loads the network when it is first needed, then draws what the page asks for.

import { keyOf, normal, split } from "./random.js";
import { denoisedFrom, dpmpp2m, guided, strengthAt, timesteps, toPixels } from "./sampler.js";
import { embeddingOf, fromHalves, tokenize } from "./text.js";

const RUNTIMES = {
  webgpu: { main: "ort.webgpu.min.mjs", wasm: "ort-wasm-simd-threaded.asyncify" },
  wasm: { main: "ort.wasm.min.mjs", wasm: "ort-wasm-simd-threaded" },
};

// make(argument), made once for each argument, and again only if that failed
function once(make) {
  const made = new Map();
  return (argument) => {
    if (!made.has(argument)) {
      const making = make(argument);
      made.set(argument, making);
      making.catch(() => made.delete(argument));
    }
    return made.get(argument);
  };
}

const site = once(async () => (await fetch("site.json")).json());

// A file of the site, unpacked; the page hears how much of it has come
async function load(name) {
  const { files, version } = await site();
  const response = await fetch(`${name}.gz?v=${version}`);
  if (!response.ok) throw new Error(`${name} cannot be loaded: ${response.status} ${response.statusText}`);
  const counting = new TransformStream({
    transform(chunk, controller) {
      postMessage({ loading: name, bytes: chunk.length, of: files[name] });
      controller.enqueue(chunk);
    },
  });
  const packed = await new Response(response.body.pipeThrough(counting)).blob();
  const [first, second] = new Uint8Array(await packed.slice(0, 2).arrayBuffer());
  const isPacked = first === 0x1f && second === 0x8b; // some hosts unpack it themselves
  const stream = isPacked ? packed.stream().pipeThrough(new DecompressionStream("gzip")) : packed.stream();
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// onnxruntime-web: on the graphics card where the browser lets it, else in WebAssembly on as many threads as it gives
const runtime = once(async () => {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const provider = adapter ? "webgpu" : "wasm";
  const { main, wasm } = RUNTIMES[provider];
  const [ort, wasmBinary] = await Promise.all([import(`./runtime/${main}`), load(`runtime/${wasm}.wasm`)]);
  Object.assign(ort.env.wasm, {
    wasmBinary,
    wasmPaths: { mjs: new URL(`runtime/${wasm}.mjs`, self.location).href },
    numThreads: self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1,
  });
  const open = async (name) => ort.InferenceSession.create(await load(name), { executionProviders: [provider] });
  return { Tensor: ort.Tensor, open };
});

const network = once(async () => (await runtime()).open("unet.onnx"));
const vectors = once(async (number) => fromHalves(await load(`captions/${number}.f16`)));

const encoder = once(async () => (await runtime()).open("encoder.onnx"));
const words = once(async () => JSON.parse(new TextDecoder().decode(await load("words.json"))));

async function encode(text) {
  const [{ length }, { Tensor }, bert, known] = await Promise.all([site(), runtime(), encoder(), words()]);
  const { tokens, mask } = tokenize(text, length, known);
  const inputs = { tokens: new Tensor("int32", tokens, [1, length]), text_mask: new Tensor("bool", mask, [1, length]) };
  return { emb: (await bert.run(inputs)).output.data, mask };
}

// Vectors of a caption, or of other words, and of the empty caption, which is the first in each part
async function embed(prompt) {
  const { parts, length, dim } = await site();
  const found = parts.findIndex(({ captions }) => captions.includes(prompt));
  const number = Math.max(found, 0);
  const table = { ...parts[number], vectors: await vectors(number), length, dim };
  const own = found < 0 ? await encode(prompt) : embeddingOf(table.captions.indexOf(prompt), table);
  return [own, embeddingOf(0, table)];
}

function joined(a, b) {
  const pair = new a.constructor(a.length + b.length);
  pair.set(a);
  pair.set(b, a.length);
  return pair;
}

async function draw({ prompt, seed, guidance, steps }) {
  const { shape, prediction, schedule, interval, length, dim } = await site();
  const [[positive, negative], { Tensor }, unet] = await Promise.all([embed(prompt), runtime(), network()]);
  const text = {
    text_emb: new Tensor("float32", joined(positive.emb, negative.emb), [2, length, dim]),
    text_mask: new Tensor("bool", joined(positive.mask, negative.mask), [2, length]),
  };

  async function denoise(noisy, t) {
    const images = new Tensor("float32", joined(noisy, noisy), [2, ...shape]);
    const { output } = await unet.run({ noisy: images, t: new Tensor("int32", [t, t], [2]), ...text });
    const predicted = [output.data.slice(0, noisy.length), output.data.slice(noisy.length)];
    const mix = [schedule.alpha[t], schedule.sigma[t]];
    const [own, empty] = predicted.map((one) => denoisedFrom(prediction, noisy, one, ...mix));
    return guided(own, empty, strengthAt(t, guidance, interval));
  }

  const channels = shape[2];
  const noise = normal(split(keyOf(seed), 0), shape[0] * shape[1] * channels);
  const times = timesteps(schedule.alpha.length - 1, steps);
  const show = (image, step) => postMessage({ step, of: steps, pixels: toPixels(image, channels) });
  return toPixels(await dpmpp2m(denoise, schedule, times, noise, show), channels);
}

onmessage = async ({ data }) => {
  try {
    postMessage({ drawn: data, pixels: await draw(data) });
  } catch (error) {
    postMessage({ error: error.message });
  }
};
