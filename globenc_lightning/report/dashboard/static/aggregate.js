/** Curves of many runs as one: which runs belong together, their mean at each step, how far they lie from it. */

import { visible } from "./text.js";

const SETTINGS = {
  target: "another score",
  readout: "another readout",
  normalize: "another normalization",
  exclude_special_tokens: "another choice about special tokens",
  aggregation: "another aggregation",
};

/**
 * @typedef {{x: number[], mean: (number|null)[], low: (number|null)[]|null, high: (number|null)[]|null, n: number[]}}
 *   Average
 */

/**
 * @typedef {{x: number[], y: (number|null)[], low?: (number|null)[]|null, high?: (number|null)[]|null}} Curve
 */

/**
 * Why a run's figures are no part of a mean with another's.
 * @param {import("./api.js").Table|null} table null where the run has none
 * @param {import("./api.js").Table|null} own the other's
 * @param {string[]} methods those that are drawn
 * @returns {string|null} null where they are
 */
export function whyApart(table, own, methods) {
  if (!table || !own) return "no figures under this run’s tag that can be read";
  if (table.probe !== own.probe) return "another probe";
  if (table.layers !== own.layers) return `another number of layers, ${table.layers}`;
  const other = Object.keys(SETTINGS).find((name) => table.settings[name] !== own.settings[name]);
  if (other) return `${SETTINGS[other]}, ${visible(String(table.settings[other] ?? (other === "aggregation" ? "rollout" : "none")))}`;
  const absent = methods.filter((method) => !(method in table.mean));
  return absent.length ? `no figures of ${absent.join(", ")}` : null;
}

/**
 * The mean over runs at every step that any of them has.
 * @param {Curve[]} curves one per run; of several points at one step the last counts
 * @returns {Average} low and high are one standard deviation (of a sample) from the mean, null where fewer than two runs
 *   have a value; those of a single run are its own
 */
export function average(curves) {
  /** @type {Map<number, number[]>} */
  const values = new Map();
  for (const { x, y } of curves) {
    const own = new Map(x.map((step, i) => [step, y[i] ?? null]));
    for (const [step, value] of own) {
      const there = values.get(step) ?? [];
      if (value !== null) there.push(value);
      values.set(step, there);
    }
  }
  const x = [...values.keys()].sort((a, b) => a - b);
  const found = x.map((step) => spread(values.get(step) ?? []));
  const banded = curves.length > 1;
  const places = new Map((curves[0]?.x ?? []).map((step, i) => [step, i]));
  const own = (ends) => (ends ? x.map((step) => ends[places.get(step) ?? -1] ?? null) : null);
  return {
    x,
    mean: found.map(({ mean }) => mean),
    low: banded ? found.map(({ mean, sd }) => (mean === null || sd === null ? null : mean - sd)) : own(curves[0]?.low),
    high: banded ? found.map(({ mean, sd }) => (mean === null || sd === null ? null : mean + sd)) : own(curves[0]?.high),
    n: found.map(({ n }) => n),
  };
}

/** @param {number[]} values */
function spread(values) {
  const n = values.length;
  if (!n) return { n, mean: null, sd: null };
  const mean = values.reduce((sum, value) => sum + value, 0) / n;
  const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  return { n, mean, sd: n > 1 ? Math.sqrt(squares / (n - 1)) : null };
}

/**
 * The tokens in a typed text: parted by spaces or commas; a comma between spaces is a token.
 * @param {string} text
 * @returns {string[]}
 */
export function typedTokens(text) {
  const pieces = text.split(/\s+/u).flatMap((piece) => (piece === "," ? [piece] : piece.split(",")));
  return [...new Set(pieces.filter((piece) => piece))];
}
