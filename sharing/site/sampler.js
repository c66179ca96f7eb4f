// From noise to a picture: what schedule.py, guidance.py and samplers.py do, for one picture, without fresh noise.

// steps + 1 evenly spaced timesteps from T to 0, halves rounded to even
export function timesteps(T, steps) {
  return Array.from({ length: steps + 1 }, (_, i) => {
    const t = T + i * (-T / steps);
    return t % 1 === 0.5 ? 2 * Math.round(t / 2) : Math.round(t);
  });
}

// The clean image that a prediction stands for, given noisy = alpha image + sigma noise
export function denoisedFrom(kind, noisy, predicted, alpha, sigma) {
  const formulas = {
    eps: (x, p) => (x - sigma * p) / alpha,
    v: (x, p) => alpha * x - sigma * p,
    x0: (x, p) => p,
  };
  return noisy.map((x, i) => formulas[kind](x, predicted[i]));
}

// The strength of guidance at step t: as asked for within the interval, elsewhere 1, which is none
export const strengthAt = (t, guidance, [first, last]) => (first <= t && t <= last ? guidance : 1);

// negative + guidance (positive - negative), in [-1, 1]  (Ho & Salimans 2022, Eq. 6)
export function guided(positive, negative, guidance) {
  return negative.map((n, i) => Math.min(Math.max(n + guidance * (positive[i] - n), -1), 1));
}

// DPM-Solver++(2M)  (Lu et al. 2022b, Algorithm 2). denoise(noisy, t) estimates the clean image; each estimate is shown.
export async function dpmpp2m(denoise, { alpha, sigma }, times, noisy, show) {
  const lambda = times.map((t) => Math.log(alpha[t]) - Math.log(sigma[t])); // infinite at t = 0
  let before = noisy;
  for (let i = 0; i + 1 < times.length; i++) {
    const [t, next] = [times[i], times[i + 1]];
    const denoised = await denoise(noisy, t);
    show(denoised, i + 1);
    const [h, last] = [lambda[i + 1] - lambda[i], i > 0 ? lambda[i] - lambda[i - 1] : 0];
    const ahead = Number.isFinite(h) && h <= 2 * last ? h / (2 * last) : 0; // half a step, in units of the last one
    const remaining = sigma[next] / sigma[t];
    const share = alpha[next] - remaining * alpha[t];
    const previous = before;
    noisy = noisy.map((x, k) => remaining * x + share * (denoised[k] + ahead * (denoised[k] - previous[k])));
    before = denoised;
  }
  return noisy;
}

// An image in [-1, 1] with 1 (grey), 3 (colour) or 4 channels (with transparency) as bytes of RGBA
export function toPixels(image, channels) {
  const pixels = new Uint8ClampedArray((image.length / channels) * 4); // which rounds and clips
  const byte = (i) => (Math.min(Math.max(image[i], -1), 1) + 1) * 127.5;
  for (let pixel = 0; pixel < pixels.length / 4; pixel++) {
    const first = pixel * channels;
    const alpha = channels === 4 ? byte(first + 3) : 255;
    for (let c = 0; c < 3; c++) {
      const colour = byte(first + (channels === 1 ? 0 : c)); // premultiplied
      pixels[4 * pixel + c] = alpha > 0.5 ? (255 * colour) / alpha : 255;
    }
    pixels[4 * pixel + 3] = alpha;
  }
  return pixels;
}
