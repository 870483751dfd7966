/** Tokens and numbers as a person can read them. */

const REWRITTEN = 50_000;
/** @type {Map<string, string>} tokens and how they are read: the same ones come again and again */
const rewritten = new Map();

const JOINERS = /[\u200c\u200d]/u;
const JOINED = /[\p{L}\p{M}\p{Extended_Pictographic}\p{Emoji_Modifier}\ufe0f]/u;
const INVISIBLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/u;
const EMOJI_TAG = /[\u{e0020}-\u{e007f}]/u;

/**
 * Rewrites a token so that each of its characters can be seen, in the same way as the pictures do: control characters
 * as their escape (\n, \x00), other invisible ones as their code point, spaces at either end as ␣. Joiners inside words
 * and emoji stay.
 * @param {string} token
 * @returns {string}
 */
export function visible(token) {
  const known = rewritten.get(token);
  if (known !== undefined) return known;
  const text = rewrite(token);
  if (rewritten.size >= REWRITTEN) rewritten.clear();
  rewritten.set(token, text);
  return text;
}

/** @param {string} token */
function rewrite(token) {
  if (token === "") return "(empty)";
  const characters = Array.from(token);
  const spaces = characters.map((character) => /\s/u.test(character));
  const first = spaces.indexOf(false);
  const last = spaces.lastIndexOf(false);
  const emoji = characters.some((character) => /\p{Extended_Pictographic}/u.test(character));
  return characters
    .map((character, i) => {
      if (/\p{Cc}/u.test(character)) return escaped(character);
      const joins = JOINED.test(characters[i - 1] ?? "") && JOINED.test(characters[i + 1] ?? "");
      if ((JOINERS.test(character) && joins) || (EMOJI_TAG.test(character) && emoji)) return character;
      const outer = spaces[i] && (first < 0 || i < first || i > last);
      if (outer && character === " ") return "␣";
      return outer || INVISIBLE.test(character) ? codePoint(character) : character;
    })
    .join("");
}

function escaped(character) {
  const short = { "\t": "\\t", "\n": "\\n", "\r": "\\r" }[character];
  return short ?? `\\x${character.charCodeAt(0).toString(16).padStart(2, "0")}`;
}

function codePoint(character) {
  return `U+${/** @type {number} */ (character.codePointAt(0)).toString(16).toUpperCase().padStart(4, "0")}`;
}

/**
 * @param {string} text
 * @param {number} limit characters, the ellipsis among them
 * @returns {string}
 */
export function shorten(text, limit) {
  const characters = Array.from(text);
  return characters.length <= limit ? text : `${characters.slice(0, limit - 1).join("")}…`;
}

/**
 * @param {number|null|undefined} value
 * @param {number} [digits]
 * @returns {string} with a proper minus sign; "undefined" for null
 */
export function decimal(value, digits = 2) {
  if (value === null || value === undefined) return "undefined";
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
}

/**
 * @param {number} share
 * @returns {string}
 */
export function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

/**
 * The place of one value among all: 1 for the largest, equal values share a place.
 * @param {number[]} values
 * @param {number} position
 * @returns {number}
 */
function rank(values, position) {
  let larger = 0;
  for (const value of values) if (value > values[position]) larger += 1;
  return larger + 1;
}

/**
 * @param {number[]} values
 * @param {number} position
 * @returns {string}
 */
export function valueAndRank(values, position) {
  return `${decimal(values[position])} · rank ${rank(values, position)} of ${values.length}`;
}

/**
 * @param {{tokens: string[], special: boolean[]}} sentence
 * @returns {string} the sentence in one line, without special tokens: words parted where ▁ stands for a space, or else
 *   all tokens parted but those that ## marks as a word's continuation
 */
export function plain(sentence) {
  const tokens = sentence.tokens.filter((_, k) => !sentence.special[k]).map(visible);
  // ⋯ stands for the rest of a character that a token before shows.
  if (!tokens.some((token) => token.startsWith("▁") || token.startsWith("⋯"))) {
    return tokens.join(" ").replaceAll(" ##", "");
  }
  return tokens.join("").replaceAll("⋯", "").replaceAll(/▁+/gu, " ").trim();
}

/**
 * @param {string[]|null} names
 * @param {number|null|undefined} label
 * @returns {string}
 */
export function className(names, label) {
  if (label === null || label === undefined) return "–";
  return visible(names?.[label] ?? String(label));
}
