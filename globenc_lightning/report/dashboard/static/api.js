/** The plugin's JSON, fetched once and kept while it is likely to be shown again. */

/** @typedef {{run: string, callbacks: {tag: string, validations: number}[]}} Run */
/** @typedef {{tokens: string[], special: boolean[], label: number|null}} Sentence */
/**
 * @typedef {{index: number, ordinal: number, step: number, epoch: number, wall_time: number, missing: boolean,
 *   damaged: string|null, predicted: number[]|null, probability: (number|null)[]|null}} Validation
 */
/**
 * @typedef {{mean: (number|null)[][], low: (number|null)[][], high: (number|null)[][], n: number[][]}} Curves
 *   [validation][layer]; the whole row is null where the validation has no figures
 */
/**
 * @typedef {{run: string, tag: string, methods: string[], drawn_method: string, layers: number, settings: object,
 *   class_names: string[]|null, sentences: Sentence[], validations: Validation[], correlation: Record<string, Curves>,
 *   messages: string[]}} Index
 */
/** @typedef {{rows: (number[]|null)[], saliency: number[][], rho: (number|null)[]}} Tokens one entry per sentence */
/**
 * @typedef {{rows: Record<string, number[][]>, rows_note: string|null, saliency: number[],
 *   rollout: Record<string, number[][]>, rollout_note: string|null, rho: Record<string, (number|null)[]>}} Detail
 */
/**
 * @typedef {{sentence: number, distance: number|null, overlap: number|null, gained: number[], lost: number[]}} Moved
 */

const KEPT = 600;

export function createApi() {
  /** @type {Map<string, Promise<any>>} the least recently used first */
  const kept = new Map();

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

  /** @param {number} [state] what has been added so far, where an answer grows with the training */
  function once(route, parameters, state = 0) {
    const key = JSON.stringify([route, parameters, state]);
    const answer = kept.get(key) ?? get(route, parameters);
    kept.delete(key);
    kept.set(key, answer);
    answer.catch(() => kept.delete(key));
    if (kept.size > KEPT) kept.delete(/** @type {string} */ (kept.keys().next().value));
    return answer;
  }

  return {
    /** @returns {Promise<{runs: Run[]}>} never kept: it tells what is new */
    runs: () => get("runs", {}),

    /** @returns {Promise<string[]>} the names of all of TensorBoard's runs, in its order */
    allRuns: () => get("../../runs", {}),

    /** @returns {Promise<Index>} */
    index: (run, tag, validations) => once("index", { run, tag }, validations),

    /** @returns {Promise<Tokens>} every sentence's readout row of one method and layer */
    tokens: (run, tag, index, method, layer) => once("tokens", { run, tag, index, method, layer }),

    /** @returns {Promise<Detail>} one sentence at one validation */
    detail: (run, tag, index, sentence) => once("detail", { run, tag, index, sentence }),

    /** @returns {Promise<{rho: Record<string, (number|null)[][]>}>} one sentence over all validations */
    sentence: (run, tag, sentence, validations) => once("sentence", { run, tag, sentence }, validations),

    /** @returns {Promise<{sentences: Moved[]}>} */
    movement: (run, tag, from, to, method, layer) => once("movement", { run, tag, from, to, method, layer, k: 5 }),
  };
}
