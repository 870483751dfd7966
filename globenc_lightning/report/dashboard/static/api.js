/** The plugin's JSON, fetched once and kept while it is likely to be shown again. */

import { SALIENCY } from "./state.js";

/** @typedef {{run: string, callbacks: {tag: string, validations: number, written: number}[]}} Run */
/**
 * @typedef {{tokens: string[], special: boolean[], label: number|null, truth_name: string, truth: string|null,
 *   others: [string, string][]}} Sentence the truth is null where an earlier version of the package wrote the data;
 *   others are the name and the text of each other text of the example
 */
/**
 * @typedef {[string, string, boolean|null, number|null, string, string, number[]]} Decided what the answer is, the
 *   answer, whether it is right, its probability, what that was computed by, the token it is about, the marked tokens
 */
/**
 * @typedef {{index: number, ordinal: number, step: number, epoch: number, wall_time: number, missing: boolean,
 *   damaged: string|null, reason: string|null, predicted: number[]|null, decided: Decided[]|null,
 *   other_texts: Record<string, Sentence>,
 *   probability: (number|null)[]|null}} Validation
 */
/**
 * @typedef {{mean: (number|null)[][], low: (number|null)[][], high: (number|null)[][], n: number[][]}} Curves
 *   [validation][layer]; the whole row is null where the validation has no figures
 */
/**
 * @typedef {{run: string, tag: string, methods: string[], drawn_method: string, layers: number, settings: object,
 *   class_names: string[]|null, words: Record<string, string>, sentences: Sentence[],
 *   examples: number, validations: Validation[], correlation: Record<string, Curves>,
 *   references: string[], reference_correlation: Record<string, Record<string, Curves>>, masking: Masking|null,
 *   messages: string[]}} Index references are those besides the saliency; masking is null where no copies were made
 */
/**
 * @typedef {{mean: (number|null)[], low: (number|null)[], high: (number|null)[], n: (number|null)[]}} Course
 *   [validation]; null where the validation has no masked copies
 */
/**
 * @typedef {{methods: string[], unit: string, share: number, score: string, masking: string,
 *   examples: (number|null)[], measures: Record<string, Record<string, Course>>}} Masking by measure and method
 */
/**
 * @typedef {{methods: string[], tokens: (number[]|null)[], gain?: (number|null)[], sufficiency_gain?: (number|null)[],
 *   log_odds?: (number|null)[], probability?: ([number, number]|null)[]}} Masked one entry per sentence; probability of
 *   what is decided, on the whole text and on the masked copy
 */
/** @typedef {{rows: (number[]|null)[], left_out: (number|null)[]}} Signed one entry per sentence */
/**
 * @typedef {{rows: (number[]|null)[], saliency: (number[]|null)[], rho: (number|null)[],
 *   stored: Record<string, number>, instead: Record<string, string[]>, room: number, masked?: Masked,
 *   signed?: Signed}} Tokens one entry per sentence; the saliency is that of the reference that was asked for; stored is
 *   by method the number of sentences whose rows are, instead by sentence without a row the methods that it has, room is
 *   in bytes
 */
/**
 * @typedef {{rows: Record<string, number[][]>, rows_note: string|null, saliency: number[],
 *   rollout: Record<string, number[][]>, rollout_note: string|null, rho: Record<string, (number|null)[]>}} Detail
 */
/**
 * @typedef {{sentence: number, other_text: boolean, distance: number|null, overlap: number|null, gained: number[],
 *   lost: number[]}} Moved
 */

/**
 * @typedef {{run: string, tag: string, steps: number[], methods: string[], layers: number, probe: string|null,
 *   examples: number, shown: number, settings: Record<string, string|number|boolean|null>, places: number[], mean: Record<string, ((number|null)[]|null)[]>}} Table the correlations of a
 *   run, [validation][layer]; places are those of its validations in the index
 */
/**
 * @typedef {{drift: Record<string, (number|null)[]>, mass: Record<string, (number|null)[]>, chance: number|null,
 *   chosen: number[], sentences: Record<string, number>}} Dynamics one entry per validation of the index; chosen are
 *   tokens per sentence; sentences is by method the number whose rows are stored
 */

const KEPT = 600;

export function createApi() {
  /** @type {Map<string, Promise<any>>} the least recently used first */
  const kept = new Map();
  /** @type {Map<string, number[]>} when each validation was written, by run and tag */
  const times = new Map();

  async function get(route, parameters) {
    const url = new URL(route, document.baseURI);
    for (const [name, value] of Object.entries(parameters)) url.searchParams.set(name, String(value));
    let response;
    try {
      response = await fetch(url, { headers: { Accept: "application/json" } });
    } catch {
      throw new Error("TensorBoard does not answer. Is it still running?");
    }
    let body;
    try {
      body = await response.json();
    } catch {
      throw new Error(`TensorBoard answered ${response.status} without data.`);
    }
    if (!response.ok) throw new Error(body.error ?? `TensorBoard answered ${response.status}.`);
    return body;
  }

  /** @param {(number|undefined)[]} written when what is asked for was written: a resumed training may write it again */
  function once(route, parameters, ...written) {
    const key = JSON.stringify([route, parameters, written]);
    const answer = kept.get(key) ?? get(route, parameters);
    kept.delete(key);
    kept.set(key, answer);
    answer.catch(() => kept.delete(key));
    if (kept.size > KEPT) kept.delete(/** @type {string} */ (kept.keys().next().value));
    return answer;
  }

  /** @returns {Promise<Index>} */
  async function index(run, tag, written) {
    const answer = await once("index", { run, tag }, written);
    const each = answer.validations.map((validation) => validation.wall_time);
    times.set(JSON.stringify([run, tag]), each);
    return answer;
  }

  /** @returns {number|undefined} */
  function writtenAt(run, tag, position) {
    return times.get(JSON.stringify([run, tag]))?.[position];
  }

  return {
    /** @returns {Promise<{runs: Run[]}>} never kept: it tells what is new */
    runs: () => get("runs", {}),

    /** @returns {Promise<string[]>} the names of all of TensorBoard's runs, in its order */
    allRuns: () => get("../../runs", {}),

    index,

    /** @returns {Promise<Table>} */
    table: (run, tag, written) => once("table", { run, tag }, written),

    /** @returns {Promise<Dynamics>} after the run's table */
    dynamics: (run, tag, layer, methods, against, by, tokens, written) =>
      once(
        "dynamics",
        { run, tag, layer, methods: JSON.stringify(methods), against, by, tokens: JSON.stringify(tokens) },
        written,
      ),

    /**
     * @param {{reference?: string, asked?: string|null}} [besides] another reference than the saliency; "masked" or
     *   "signed"
     * @returns {Promise<Tokens>} every sentence's readout row of one method and layer
     */
    tokens: (run, tag, index, method, layer, besides = {}) =>
      once("tokens", { run, tag, index, method, layer, ...named(besides) }, writtenAt(run, tag, index)),

    /** @returns {Promise<Detail>} one sentence at one validation */
    detail: (run, tag, index, sentence) =>
      once("detail", { run, tag, index, sentence }, writtenAt(run, tag, index)),

    /** @returns {Promise<{rho: Record<string, (number|null)[][]>}>} one sentence over all validations */
    sentence: (run, tag, sentence, written, besides = {}) =>
      once("sentence", { run, tag, sentence, ...named(besides) }, written),

    /** @returns {Promise<{sentences: Moved[], lacking: number[], room: number}>} lacking are those without rows */
    movement: (run, tag, from, to, method, layer) =>
      once(
        "movement",
        { run, tag, from, to, method, layer, k: 5 },
        writtenAt(run, tag, from),
        writtenAt(run, tag, to),
      ),
  };
}

/** What is not the usual. */
function named({ reference = SALIENCY, asked = null }) {
  return { ...(reference === SALIENCY ? {} : { reference }), ...(asked ? { asked } : {}) };
}
