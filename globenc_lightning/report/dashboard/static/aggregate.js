/** Curves of many runs as one: the mean at each step, and how far the runs lie from it. */

/**
 * @typedef {{x: number[], mean: (number|null)[], low: (number|null)[]|null, high: (number|null)[]|null, n: number[]}}
 *   Average
 */

/**
 * The mean over runs at every step that any of them has.
 * @param {{x: number[], y: (number|null)[]}[]} curves one per run; of several points at one step the last counts
 * @returns {Average} low and high are one standard deviation (of a sample) from the mean, null where fewer than two runs
 *   have a value, and null altogether for a single run
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
  return {
    x,
    mean: found.map(({ mean }) => mean),
    low: banded ? found.map(({ mean, sd }) => (mean === null || sd === null ? null : mean - sd)) : null,
    high: banded ? found.map(({ mean, sd }) => (mean === null || sd === null ? null : mean + sd)) : null,
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
