/**
 * What a person has chosen, its form in the address, and what it means for the data that there is.
 *
 * In the address everything counts from 1, as on the page. What was not chosen is not written: the last layer and the
 * latest validation are then whatever is last at the time, so that a view of a running training follows it.
 */

import { className, visible } from "./text.js";

/**
 * @typedef {object} State
 * @property {string} view
 * @property {string|null} run
 * @property {string|null} tag
 * @property {string|null} method
 * @property {number|null} layer from 0; null for the last
 * @property {number|null} validation ordinal; null for the latest
 * @property {number} sentence from 0
 * @property {number|null} token from 0, the token whose own row is shown; null for the readout
 * @property {number|null} from ordinal of the validation that Movement compares with; null for the first
 * @property {string[]} overlay further runs in Correlation
 * @property {string[]|null} methods drawn in Correlation; null for the usual ones
 * @property {boolean} curve whether Correlation shows one sentence's curve
 * @property {string[]|null} runs averaged in Runs; null for all that TensorBoard shows
 * @property {boolean} single whether Runs draws each run beside the mean
 * @property {boolean} near whether the scale of drift leaves the chance level out
 * @property {string} against what drift compares with: "previous", "first" or "last"
 * @property {string} by how drift is measured: "spearman" or "jaccard"
 * @property {string} tokens the typed tokens whose share Runs shows
 * @property {string|null} reference what the rows are compared with; null for the saliency
 * @property {string|null} beside what Tokens shows beside the rows: "masked", "signed", or null for the reference
 * @property {string} measure which figure of the masked copies Correlation draws
 */

export const VIEWS = ["tokens", "maps", "correlation", "movement", "runs"];
const CHOICES = {
  against: ["previous", "first", "last"],
  by: ["spearman", "jaccard"],
  measure: ["gain", "sufficiency_gain", "log_odds"],
};
const BESIDE = ["masked", "signed"];
export const SALIENCY = "saliency";
const MOST_TYPED = 2000;

/** @returns {State} */
function initialState() {
  return {
    view: VIEWS[0],
    run: null,
    tag: null,
    method: null,
    layer: null,
    validation: null,
    sentence: 0,
    token: null,
    from: null,
    overlay: [],
    methods: null,
    curve: false,
    runs: null,
    single: false,
    near: false,
    against: CHOICES.against[0],
    by: CHOICES.by[0],
    tokens: "",
    reference: null,
    beside: null,
    measure: CHOICES.measure[0],
  };
}

/**
 * @param {Record<string, string>} link
 * @returns {State} whatever the link holds: what makes no sense is taken as not chosen
 */
export function stateFromLink(link) {
  const count = (name, least) => {
    const number = Number(link[name] ?? NaN);
    return Number.isInteger(number) && number >= least ? number - least : null;
  };
  const list = (name) => {
    try {
      const value = JSON.parse(link[name] ?? "null");
      return Array.isArray(value) && value.every((entry) => typeof entry === "string") ? value : null;
    } catch {
      return null;
    }
  };
  return {
    view: VIEWS.includes(link.view) ? link.view : VIEWS[0],
    run: link.run ?? null,
    tag: link.tag ?? null,
    method: link.method ?? null,
    layer: count("layer", 1),
    validation: count("validation", 0),
    sentence: count("sentence", 1) ?? 0,
    token: count("token", 1),
    from: count("from", 0),
    overlay: list("overlay") ?? [],
    methods: list("methods"),
    curve: link.curve === "1",
    runs: list("runs"),
    single: link.single === "1",
    near: link.near === "1",
    against: CHOICES.against.includes(link.against) ? link.against : CHOICES.against[0],
    by: CHOICES.by.includes(link.by) ? link.by : CHOICES.by[0],
    tokens: (link.tokens ?? "").slice(0, MOST_TYPED),
    reference: link.reference ?? null,
    beside: BESIDE.includes(link.beside) ? link.beside : null,
    measure: CHOICES.measure.includes(link.measure) ? link.measure : CHOICES.measure[0],
  };
}

/**
 * @param {State} state
 * @returns {Record<string, string>}
 */
export function linkFromState(state) {
  const start = initialState();
  /** @type {Record<string, string>} */
  const link = { view: state.view };
  for (const name of ["run", "tag", "method", "reference", "beside"]) if (state[name] !== null) link[name] = state[name];
  for (const name of ["validation", "from"]) if (state[name] !== null) link[name] = String(state[name]);
  for (const name of ["layer", "sentence", "token"]) {
    if (state[name] !== start[name]) link[name] = String(state[name] + 1);
  }
  if (state.overlay.length) link.overlay = JSON.stringify(state.overlay);
  if (state.methods) link.methods = JSON.stringify(state.methods);
  if (state.curve) link.curve = "1";
  if (state.runs) link.runs = JSON.stringify(state.runs);
  if (state.single) link.single = "1";
  if (state.near) link.near = "1";
  for (const name of ["against", "by", "tokens", "measure"]) if (state[name] !== start[name]) link[name] = state[name];
  return link;
}

/**
 * The state, made fit for one run's data.
 * @typedef {object} Selection
 * @property {import("./api.js").Index} index with the sentences as the chosen validation shows them
 * @property {import("./api.js").Index} whole with the sentences as the newest validation shows them
 * @property {string} run
 * @property {string} tag
 * @property {string} method
 * @property {number} layer
 * @property {number} position of the chosen validation in the run's list
 * @property {import("./api.js").Validation} validation
 * @property {number} from position of the validation that Movement compares with
 * @property {number} sentence
 * @property {number|null} token
 * @property {string} reference
 * @property {string|null} beside "masked", "signed", or null for the reference
 */

/**
 * @param {State} state
 * @param {import("./api.js").Index} index with at least one validation and sentence
 * @returns {Selection}
 */
export function select(state, index) {
  const { validations, methods, layers } = index;
  const position = positionOf(validations, state.validation, validations.length - 1);
  const sentences = sentencesAt(index, validations[position]);
  const sentence = Math.min(state.sentence, sentences.length - 1);
  const usual = methods.includes(index.drawn_method) ? index.drawn_method : methods[methods.length - 1];
  return {
    index: { ...index, sentences },
    whole: index,
    run: index.run,
    tag: index.tag,
    method: state.method !== null && methods.includes(state.method) ? state.method : usual,
    layer: Math.min(state.layer ?? layers - 1, layers - 1),
    position,
    validation: validations[position],
    from: positionOf(validations, state.from, Math.max(validations.findIndex(hasFigures), 0)),
    sentence,
    token: state.token !== null && state.token < sentences[sentence].tokens.length ? state.token : null,
    reference: state.reference !== null && index.references.includes(state.reference) ? state.reference : SALIENCY,
    beside: besidesOf(index).includes(state.beside ?? "") ? state.beside : null,
  };
}

/**
 * What Tokens can show beside the rows instead of a reference.
 * @param {import("./api.js").Index} index
 * @returns {string[]} nothing where nothing was asked for
 */
export function besidesOf({ masking, words }) {
  return BESIDE.filter((one) => (one === "masked" ? masking : words.signed));
}

/**
 * The probe as one validation shows it: of several texts that can be chosen, another one may have been.
 * @param {import("./api.js").Index} index
 * @param {import("./api.js").Validation} validation
 * @returns {import("./api.js").Sentence[]}
 */
export function sentencesAt(index, validation) {
  if (!Object.keys(validation.other_texts).length) return index.sentences;
  return index.sentences.map((sentence, i) => validation.other_texts[i] ?? sentence);
}

/**
 * What a sentence was decided to be, whichever version of the package wrote it.
 * @param {import("./api.js").Index} index
 * @param {import("./api.js").Validation} validation
 * @param {number} i the sentence
 * @returns {{name: string, answer: string, right: boolean|null, chance: number|null, chanceName: string,
 *   where: string, marked: number[]}}
 */
export function decisionOf(index, validation, i) {
  if (validation.decided) {
    const [name, answer, right, chance, chanceName, where, marked] = validation.decided[i];
    return { name, answer: visible(answer), right, chance, chanceName, where, marked };
  }
  const predicted = validation.predicted?.[i] ?? null;
  const { label } = index.sentences[i];
  return {
    name: "predicted",
    answer: className(index.class_names, predicted),
    right: label === null || predicted === null ? null : label === predicted,
    chance: validation.probability?.[i] ?? null,
    chanceName: "",
    where: "",
    marked: [],
  };
}

/** The validation with this ordinal, or the last one before it. */
function positionOf(validations, ordinal, otherwise) {
  if (ordinal === null) return otherwise;
  let found = 0;
  for (const [position, validation] of validations.entries()) if (validation.ordinal <= ordinal) found = position;
  return found;
}

/**
 * @param {import("./api.js").Validation} validation
 * @returns {boolean}
 */
export function hasFigures(validation) {
  return !validation.missing && !validation.damaged;
}

/**
 * @param {import("./api.js").Validation} validation
 * @returns {string} why it has no figures
 */
export function whyEmpty(validation) {
  if (validation.damaged) return `The record of this validation cannot be read: ${validation.damaged}`;
  const failed = `The analysis of this validation${validation.step === null ? "" : `, at step ${validation.step},`} failed.`;
  return validation.reason ? `${failed}\n${validation.reason}` : failed;
}
