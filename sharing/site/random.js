// Noise from a seed, the same numbers as jax.random gives.

// Threefry-2x32, 20 rounds (Salmon et al. 2011): two words encrypted under a key of two words.
export function threefry([k0, k1], x0, x1) {
  const keys = [k0, k1, k0 ^ k1 ^ 0x1bd11bda];
  const rotations = [[13, 15, 26, 6], [17, 29, 16, 24]];
  x0 = (x0 + k0) >>> 0;
  x1 = (x1 + k1) >>> 0;
  for (let group = 0; group < 5; group++) {
    for (const r of rotations[group % 2]) {
      x0 = (x0 + x1) >>> 0;
      x1 = (((x1 << r) | (x1 >>> (32 - r))) ^ x0) >>> 0;
    }
    x0 = (x0 + keys[(group + 1) % 3]) >>> 0;
    x1 = (x1 + keys[(group + 2) % 3] + group + 1) >>> 0;
  }
  return [x0, x1];
}

// jax.random.key(seed) and jax.random.split(key)[number]
export const keyOf = (seed) => [0, seed];
export const split = (key, number) => threefry(key, 0, number);

// jax.random.normal(key, n): sqrt(2) erfinv(u), u uniform between -1 and 1
export function normal(key, n) {
  const smallest = Math.fround(-1 + 2 ** -24);
  return Float32Array.from({ length: n }, (_, i) => {
    const [a, b] = threefry(key, 0, i);
    const u = Math.fround(((a ^ b) >>> 9) * 2 ** -22 + smallest);
    return Math.SQRT2 * inverseErf(u);
  });
}

// The polynomials that XLA takes for float32 (Giles 2012, Table 5)
const CENTRE = [
  2.81022636e-8, 3.43273939e-7, -3.5233877e-6, -4.39150654e-6, 0.00021858087, -0.00125372503, -0.00417768164,
  0.246640727, 1.50140941,
];
const TAIL = [
  -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
  1.00167406, 2.83297682,
];

function inverseErf(x) {
  const w = -Math.log1p(-Math.fround(x * x)); // rounded as XLA rounds it, which tells near ±1
  const [z, coefficients] = w < 5 ? [w - 2.5, CENTRE] : [Math.sqrt(w) - 3, TAIL];
  return x * coefficients.reduce((sum, c) => sum * z + c);
}
