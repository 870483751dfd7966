/** What Tokens shows beside the rows: a reference, the sentence with its masked tokens, or signed scores. */

import { signedScale, signedStep } from "./colours.js";
import { html, setOptions, setText } from "./dom.js";
import { counted, inSpans } from "./shares.js";
import { besidesOf, SALIENCY } from "./state.js";
import { decimal, percent, valueAndRank, visible } from "./text.js";

const FAINT = 0.04; // shares below this have no sign that could be seen
const MOST_TOLD = 6;
const TITLES = { masked: "Masked sentence", signed: "Signed scores" };
const REFERENCES = {
  "saliency": "gradient × input at the first hidden states",
  "integrated gradients": "gradient × input, averaged on the way from the mean of the sentence’s first hidden states to these",
  "HTA": "how much the read row changes with the first hidden states",
  "exact HTA": "how much the read row changes with the first hidden states",
};
/** What the figures of the masked copies are called. */
export const MEASURES = {
  gain: "Gain over random",
  sufficiency_gain: "Sufficiency gain",
  log_odds: "Log-odds lost",
};

/** @param {string} name */
export function titleOf(name) {
  return TITLES[name] ?? (name === "HTA" ? name : name.charAt(0).toUpperCase() + name.slice(1));
}

/** @param {number} value @returns {string} with its sign */
export function withSign(value, digits = 3) {
  const text = decimal(value, digits);
  return value > 0 && Number(value.toFixed(digits)) !== 0 ? `+${text}` : text;
}

/**
 * What a row shows beside its attribution.
 * @typedef {{kind: "reference", name: string, values: number[]|null, said: string}
 *   | {kind: "masked", tokens: number[]|null, facts: [string, string][], said: string}
 *   | {kind: "signed", values: number[]|null, facts: [string, string][], said: string}} Beside said is why there is
 *   nothing; empty where there is
 */

/**
 * @param {import("./state.js").Selection} selection
 * @param {import("./api.js").Tokens|null} data
 * @param {number} i the sentence
 * @returns {Beside}
 */
export function besideOf({ beside, reference, method, index }, data, i) {
  if (beside === "masked") return maskedOf(data?.masked, method, index.sentences[i].tokens.length, i);
  if (beside === "signed") return signedOf(data?.signed, i);
  const values = data?.saliency[i] ?? null;
  const said = data && !values ? `${titleOf(reference)} is not stored for this sentence at this validation.` : "";
  return { kind: "reference", name: reference, values, said };
}

/** @returns {Beside} */
function maskedOf(masked, method, length, i) {
  const tokens = masked?.tokens[i] ?? null;
  if (!masked) return { kind: "masked", tokens, facts: [], said: "" };
  const { methods } = masked;
  let said = "";
  if (!methods.length) said = "No masked copies were made at this validation.";
  else if (!methods.includes(method)) {
    said = `No tokens were masked in the order of ${method}; they were in that of ${methods.join(", ")}.`;
  } else if (!tokens) said = "No masked copy is stored of this sentence, or it has fewer than two tokens to mask.";
  /** @type {[string, string][]} */
  const facts = [];
  if (tokens) {
    facts.push(["masked", `${tokens.length} of ${length} tokens`]);
    const both = masked.probability?.[i];
    if (both) facts.push(["probability", `${percent(both[0])} → ${percent(both[1])}`]);
    const gain = masked.gain?.[i] ?? null;
    facts.push(["gain over random", gain === null ? "left out: masking everything costs too little" : withSign(gain, 2)]);
    for (const name of ["sufficiency_gain", "log_odds"]) {
      const value = masked[name]?.[i] ?? null;
      if (value !== null) facts.push([MEASURES[name].toLowerCase(), withSign(value, 2)]);
    }
  }
  return { kind: "masked", tokens, facts, said };
}

/** @returns {Beside} */
function signedOf(signed, i) {
  const values = signed?.rows[i] ?? null;
  const said = signed && !values ? "Signed scores are not stored for this sentence at this validation." : "";
  /** @type {[string, string][]} */
  const facts = [];
  if (values) {
    const sum = values.reduce((total, one) => total + one, 0);
    const rest = signed.left_out[i] ?? 0;
    facts.push(["sum", withSign(sum)], ["left out (biases)", withSign(rest)], ["score", withSign(sum + rest)]);
  }
  return { kind: "signed", values, facts, said };
}

/**
 * The lines of the box at the pointer.
 * @param {Beside} beside
 * @param {number} k the token
 * @returns {{name: string, value: string}}
 */
export function describedBeside(beside, k) {
  if (beside.kind === "masked") {
    return { name: "masked copy", value: !beside.tokens ? "not stored" : beside.tokens.includes(k) ? "masked" : "kept" };
  }
  if (beside.kind === "signed") {
    return { name: "signed score", value: beside.values ? withSign(beside.values[k]) : "not stored" };
  }
  return { name: beside.name, value: beside.values ? valueAndRank(beside.values, k) : "not stored" };
}

/**
 * Colours and marks a sentence's tokens; only what changes is touched.
 * @param {ReturnType<typeof import("./chips.js").createChips>} part
 * @param {HTMLElement} told where the figures are said
 * @param {Beside} beside
 * @param {import("./api.js").Sentence} sentence
 * @param {string} label of the sentence, for those who cannot see it
 * @param {import("./index.js").Context["theme"]} theme
 */
export function paintBeside(part, told, beside, sentence, label, theme) {
  const masked = new Set(beside.kind === "masked" ? beside.tokens : []);
  const signs = beside.kind === "signed" ? beside.values : null;
  if (beside.kind === "reference") part.paint(beside.values, theme.scale());
  else part.paint(null, theme.scale());
  part.element.classList.toggle("empty", beside.kind === "masked" ? !beside.tokens : !beside.values);
  if (signs) paintSigned(part.chips, signs, signedScale(theme.isDark()));
  for (const [k, chip] of part.chips.entries()) {
    mask(chip, masked.has(k), visible(sentence.tokens[k]));
    const share = signs ? signs[k] / (largest(signs) || 1) : 0;
    chip.classList.toggle("for", share > FAINT);
    chip.classList.toggle("against", share < -FAINT);
  }
  const name = `${label}, ${aloud(beside, sentence)}`;
  if (part.element.getAttribute("aria-label") !== name) part.element.setAttribute("aria-label", name);
  const facts = beside.kind === "reference" ? [] : beside.facts;
  if (told.hidden && !facts.length && !beside.said) return;
  told.hidden = !facts.length && !beside.said;
  told.replaceChildren(
    beside.said,
    ...facts.map(([name, value]) => html("span", { class: "told-fact" }, html("span", { class: "fact" }, name), value)),
  );
}

function largest(values) {
  return values.reduce((most, one) => Math.max(most, Math.abs(one)), 0);
}

function paintSigned(chips, values, scale) {
  const most = largest(values) || 1;
  for (const [k, chip] of chips.entries()) {
    const shade = scale.shades[signedStep(values[k] / most)];
    chip.style.backgroundColor = shade.background;
    chip.style.color = shade.ink;
  }
}

/** A masked token stays readable: it is struck through, and says that it is masked. */
function mask(chip, isMasked, text) {
  if (chip.classList.contains("masked") === isMasked) return;
  chip.classList.toggle("masked", isMasked);
  chip.replaceChildren(...(isMasked ? [html("span", { class: "unseen" }, "masked: "), html("s", {}, text)] : [text]));
}

/** What is shown, in words. @param {Beside} beside */
function aloud(beside, { tokens }) {
  if (beside.kind === "reference") return beside.name;
  if (beside.said) return beside.said;
  if (beside.kind === "masked") {
    return `masked copy: ${(beside.tokens ?? []).map((k) => visible(tokens[k])).join(", ")} masked`;
  }
  const values = beside.values ?? [];
  const order = [...values.keys()].sort((a, b) => Math.abs(values[b]) - Math.abs(values[a])).slice(0, MOST_TOLD);
  return `signed scores, the largest: ${order.map((k) => `${visible(tokens[k])} ${withSign(values[k])}`).join(", ")}`;
}

/**
 * Of how many sentences there is what is shown beside.
 * @param {Beside[]} all
 */
export function besideStored(all) {
  const missing = [...all.keys()].filter((i) => {
    const one = all[i];
    return one.kind === "masked" ? !one.tokens : !one.values;
  });
  if (!missing.length) return "";
  const what = all[0].kind === "reference" ? titleOf(all[0].name) : TITLES[all[0].kind];
  if (missing.length === all.length) return all[0].kind === "masked" ? all[0].said : `${what}: nothing is stored here.`;
  const there = counted(all.length - missing.length);
  return `${what}: stored for ${there} of ${counted(all.length)} sentences, not for ${inSpans(missing)}.`;
}

/**
 * The head of the column: its title, what it is, and where there are several things to show, the choice.
 * @param {{update: import("./index.js").Context["update"], theme: import("./index.js").Context["theme"]}} context
 */
export function createBesideHead({ update, theme }) {
  const title = html("h2");
  const hint = html("p", { class: "hint" });
  const select = /** @type {HTMLSelectElement} */ (
    html("select", {
      "aria-label": "Shown beside the attribution",
      "on": {
        change() {
          const { value } = select;
          if (value in TITLES) update({ beside: value });
          else update({ beside: null, reference: value === SALIENCY ? null : value });
        },
      },
    })
  );
  const bar = html("span", { class: "scale-bar wide" });
  theme.onChange(() => bar.style.setProperty("background", signedScale(theme.isDark()).gradient));
  const legend = html(
    "div",
    { "class": "legend signed-legend", "role": "img", "aria-label": "Two-sided scale: against, 0, for" },
    html("span", { class: "sign against" }, "−"),
    html("span", {}, "against"),
    bar,
    html("span", {}, "for"),
    html("span", { class: "sign for" }, "+"),
    html("span", {}, "middle: 0; ends: the sentence’s largest"),
  );
  const key = html("p", { class: "hint masked-key" }, html("s", { class: "chip masked" }, "token"), html("span"));
  const element = html("div", {}, html("div", { class: "beside-head" }, title, select), hint, legend, key);
  return {
    element,

    /** @param {import("./state.js").Selection} selection */
    paint({ index, reference, beside, method }) {
      const names = [SALIENCY, ...index.references, ...besidesOf(index)];
      select.hidden = names.length < 2;
      setOptions(select, names.map((value) => ({ value, label: titleOf(value) })), beside ?? reference);
      title.hidden = !select.hidden;
      setText(title, titleOf(reference));
      const { score, signed } = index.words;
      const of = score ? `, of ${visible(score)}` : "";
      setText(
        hint,
        beside === "signed"
          ? `contributions of the tokens to ${visible(signed)}: for it or against it`
          : beside === "masked"
            ? `the first ${Math.round(100 * (index.masking?.share ?? 0))} % of the tokens by ${method} in the last layer, masked`
            : `${REFERENCES[reference] ?? reference}${of}`,
      );
      legend.hidden = beside !== "signed";
      key.hidden = beside !== "masked";
      setText(/** @type {Node} */ (key.lastChild), ` masked: ${maskingOf(index.masking)}; the decision is made again on this copy`);
    },
  };
}

/** How tokens were masked, in words. */
function maskingOf(masking) {
  return masking?.masking === "attention mask"
    ? "hidden by the attention mask"
    : masking?.masking
      ? "replaced by the tokenizer’s mask token"
      : "replaced by the mask token, or hidden";
}
