// Words into the vectors that the network attends to.

// The numbers of a file in float16
export function fromHalves(bytes) {
  const halves = new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 2);
  return Float32Array.from(halves, (bits) => {
    const exponent = (bits >> 10) & 31;
    const size = exponent ? (1024 + (bits & 1023)) * 2 ** (exponent - 25) : (bits & 1023) * 2 ** -24;
    return bits >> 15 ? -size : size;
  });
}

// The vectors of a caption, padded to `length` tokens, and a mask; `tokens` says how many each caption of the file has
export function embeddingOf(row, { tokens, vectors, length, dim }) {
  const start = tokens.slice(0, row).reduce((sum, n) => sum + n, 0);
  const emb = new Float32Array(length * dim);
  emb.set(vectors.subarray(start * dim, (start + tokens[row]) * dim));
  return { emb, mask: Uint8Array.from({ length }, (_, i) => i < tokens[row]) };
}

const tidy = (text) => text.trim().replace(/\s+/g, " ").toLowerCase();

// The captions with a word that begins with each word of a text: the text itself first, then the shortest
export function matching(text, captions) {
  const words = tidy(text).split(" ");
  const found = captions.filter((caption) => {
    const own = tidy(caption).split(/[^\p{L}\p{N}]+/u);
    return words.every((word) => own.some((one) => one.startsWith(word)) || tidy(caption) === tidy(text));
  });
  return found.sort((a, b) => (tidy(b) === tidy(text)) - (tidy(a) === tidy(text)) || a.length - b.length);
}
