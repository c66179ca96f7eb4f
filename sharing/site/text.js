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

export const tidy = (text) => text.trim().replace(/\s+/g, " ").toLowerCase();

// The captions with a word that begins with each word of a text: the text itself first, then the shortest
export function matching(text, captions) {
  const words = tidy(text).split(" ");
  const found = captions.filter((caption) => {
    const own = tidy(caption).split(/[^\p{L}\p{N}]+/u);
    return words.every((word) => own.some((one) => one.startsWith(word)) || tidy(caption) === tidy(text));
  });
  return found.sort((a, b) => (tidy(b) === tidy(text)) - (tidy(a) === tidy(text)) || a.length - b.length);
}

// Other words: their word pieces, as BERT's tokenizer makes them

const PUNCTUATION = /([!-/:-@[-`{-~]|\p{P})/u; // all of ASCII that is neither letter nor digit, too
const CHINESE =
  /[\u4e00-\u9fff\u3400-\u4dbf\u{20000}-\u{2a6df}\u{2a700}-\u{2b73f}\u{2b740}-\u{2b81f}\u{2b820}-\u{2ceaf}\uf900-\ufaff\u{2f800}-\u{2fa1f}]/gu;

// Emoji by their English names: "my 🐶" becomes "my dog face"
function spelled(text, names) {
  const longestFirst = Object.keys(names).sort((a, b) => b.length - a.length);
  const any = longestFirst.join("|").replaceAll("*", "\\*");
  return text.replace(new RegExp(any, "gu"), (emoji) => ` ${names[emoji]} `);
}

function normalized(text, { lowercase, strip_accents }) {
  text = text.replace(/[\t\n\r]/g, " ").replace(/[\p{Cc}\p{Cf}\p{Co}\ufffd]/gu, "").replace(CHINESE, " $& ");
  if (strip_accents) text = text.normalize("NFD").replace(/\p{Mn}/gu, "");
  return lowercase ? [...text].map((letter) => letter.toLowerCase()).join("") : text; // Σ is σ, also at the end of a word
}

// The longest pieces that the vocabulary has, from the left; one unknown piece for a word that has none
function piecesOf(word, { vocabulary, prefix, longest, unknown }) {
  const [letters, pieces] = [[...word], []];
  for (let start = 0; start < letters.length; ) {
    let end = letters.length;
    const piece = () => (start ? prefix : "") + letters.slice(start, end).join("");
    while (end > start && !Object.hasOwn(vocabulary, piece())) end--;
    if (end === start || letters.length > longest) return [vocabulary[unknown]];
    pieces.push(vocabulary[piece()]);
    start = end;
  }
  return pieces;
}

// A text's tokens, with a mask, cut or padded to `length`; `known` is words.json
export function tokenize(text, length, known) {
  const [first, last] = known.ends;
  const words = normalized(spelled(text, known.names), known).split(/\s+/).flatMap((word) => word.split(PUNCTUATION));
  const pieces = words.flatMap((word) => piecesOf(word, known));
  const ids = [first, ...pieces.slice(0, length - 2), last];
  const tokens = Int32Array.from({ length }, (_, i) => ids[i] ?? 0);
  return { tokens, mask: Uint8Array.from({ length }, (_, i) => i < ids.length) };
}
