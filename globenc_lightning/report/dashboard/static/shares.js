/** What is shown of what, in words: of a large probe some sentences, of a sentence some methods. */

import { html } from "./dom.js";

const MOST_SPANS = 6;
const NUMBERS = new Intl.NumberFormat("en");

/** @param {number} number */
export function counted(number) {
  return NUMBERS.format(number);
}

/**
 * @param {number[]} places from 0, in ascending order
 * @returns {string} counted from 1, neighbours as one stretch
 */
export function inSpans(places) {
  /** @type {[number, number][]} */
  const spans = [];
  for (const place of places) {
    const last = spans[spans.length - 1];
    if (last && last[1] === place - 1) last[1] = place;
    else spans.push([place, place]);
  }
  const words = spans.slice(0, MOST_SPANS).map(([from, to]) => (from === to ? `${from + 1}` : `${from + 1}–${to + 1}`));
  return words.join(", ") + (spans.length > MOST_SPANS ? ", …" : "");
}

/**
 * @param {{examples: number, sentences: unknown[]}} index
 * @returns {string} "216 of 1,000 sentences"; empty where all are shown
 */
export function partOf({ examples, sentences }) {
  return sentences.length < examples ? `${counted(sentences.length)} of ${counted(examples)} sentences` : "";
}

/**
 * @param {{examples: number, sentences: unknown[]}} index
 * @returns {string} empty where all sentences are shown
 */
export function shownOf(index) {
  const part = partOf(index);
  const all = counted(index.examples);
  return part ? `The first ${part} are shown, those that every validation holds; means and curves are of all ${all}.` : "";
}

/**
 * Of how many sentences a method's rows are stored, and which methods' are.
 * @param {string} method
 * @param {number} count so many sentences are shown
 * @param {import("./api.js").Tokens} data
 * @returns {string} empty where they are of all
 */
export function storedOf(method, count, { stored, instead, room }) {
  const lacking = Object.keys(instead).map(Number);
  if (!lacking.length) return "";
  const whole = Object.keys(stored).filter((one) => stored[one] === count);
  const which = stored[method]
    ? `${method}: the rows of ${counted(stored[method])} of ${counted(count)} sentences are stored, not of ${inSpans(lacking)}.`
    : `${method}: no rows are stored.`;
  const others = whole.length ? ` Stored for all: ${whole.join(", ")}.` : "";
  return `${which}${others}${limit(room)}`;
}

/** @param {number} room in bytes */
export function limit(room) {
  return room ? ` A validation’s attributions take at most ${counted(Math.floor(room / 1024))} kB.` : "";
}

/** A line that says what is shown of what. */
export function createShare() {
  const element = html("p", { class: "share", role: "status", hidden: true });
  return {
    element,

    /** @param {...string} texts */
    say(...texts) {
      const said = texts.filter((text) => text).join(" ");
      element.hidden = !said;
      if (element.textContent !== said) element.textContent = said;
    },
  };
}
