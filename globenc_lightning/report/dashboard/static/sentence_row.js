/** One sentence in the view Tokens: its number and text, and once it is drawn its facts and its coloured tokens. */

import { paintBeside } from "./beside.js";
import { createChips } from "./chips.js";
import { html, selectedIn, selectIn, setText } from "./dom.js";
import { className, decimal, percent, visible } from "./text.js";

/**
 * What one row shows at a validation.
 * @typedef {object} RowContent
 * @property {boolean} chosen
 * @property {number|null} token the token whose own row is shown
 * @property {string} origin what is said of that row; empty where there is none
 * @property {number[]|null} attribution
 * @property {import("./beside.js").Beside} beside
 * @property {string} absent why there is no attribution; empty where there is one
 * @property {{name: string, answer: string, right: boolean|null, chance: number|null, chanceName: string, where: string,
 *   marked: number[]}} decision
 * @property {string|undefined} markedWords what the marked tokens are
 * @property {number|null|undefined} rho undefined where there are no figures
 * @property {import("./index.js").Context["theme"]} theme
 */

/**
 * @param {import("./api.js").Sentence} sentence
 * @param {{i: number, count: number, names: string[]|null, back: () => void}} of back shows the readout's row again
 */
export function createSentenceRow(sentence, { i, count, names, back }) {
  const number = html(
    "button",
    { "class": "number", "type": "button", "aria-label": `Choose sentence ${i + 1}` },
    String(i + 1),
  );
  const facts = html("div", { class: "facts" }, number);
  const row = html(
    "article",
    {
      "class": "sentence",
      "data-sentence": i,
      "aria-label": `Sentence ${i + 1}`,
      "aria-posinset": i + 1,
      "aria-setsize": count,
    },
    facts,
  );
  /** @type {HTMLElement|null} made when it is first needed */
  let text = null;
  /** @type {ReturnType<typeof createParts>|null} */
  let parts = null;

  function createParts() {
    const attribution = createChips(sentence, `Sentence ${i + 1}, attribution`);
    const saliency = createChips(sentence, `Sentence ${i + 1}, saliency`);
    const told = html("p", { class: "told", hidden: true });
    const answerName = html("span", { class: "fact" });
    const predicted = html("span", { class: "predicted" });
    const where = html("p", { class: "where" });
    const verdict = html("span", { class: "verdict" });
    const fill = html("span");
    const probability = html("span");
    const chanceName = html("span", { class: "chance-name" });
    const bar = html(
      "p",
      { class: "probability" },
      html("span", { "class": "meter", "aria-hidden": "true" }, fill),
      probability,
      chanceName,
    );
    const rho = html("span", { class: "rho" });
    const origin = html("span");
    const button = html("button", { class: "link", type: "button", on: { click: back } }, "Back to the readout");
    const banner = html("p", { class: "origin", hidden: true }, origin, button);
    const absent = html("p", { class: "absent", hidden: true });
    const details = html(
      "div",
      {},
      where,
      sentence.truth === null || sentence.truth
        ? html(
            "p",
            {},
            html("span", { class: "fact" }, sentence.truth_name),
            html("span", { class: "label" }, truthOf(sentence, names)),
          )
        : null,
      html("p", {}, answerName, predicted, verdict),
      bar,
      html("p", {}, html("span", { class: "fact" }, "ρ"), rho),
    );
    const others = sentence.others.map(([name, other]) => otherText(name, other));
    const columns = [
      html("div", {}, banner, absent, attribution.element, ...others),
      html("div", {}, saliency.element, told),
    ];
    for (const chip of attribution.chips) {
      chip.setAttribute("role", "button");
      chip.setAttribute("aria-pressed", "false");
      chip.setAttribute("tabindex", "-1");
    }
    const named = { answerName, predicted, verdict, where, bar, fill, probability, chanceName, rho };
    return { attribution, saliency, told, ...named, banner, origin, absent, details, columns };
  }

  /** Marks what was decided about; the words are part of the token's name for those who cannot see the frame. */
  function markDecided({ attribution, saliency }, marked, words) {
    for (const part of [attribution, saliency]) {
      for (const [k, chip] of part.chips.entries()) chip.classList.toggle("decided", marked.includes(k));
    }
    for (const [k, chip] of attribution.chips.entries()) {
      const what = marked.includes(k) && words ? ` (${words})` : "";
      chip.setAttribute("aria-label", `${visible(sentence.tokens[k])}${what}: show where it comes from`);
    }
  }

  return {
    row,
    facts,

    /** @returns {{attribution: HTMLElement[], saliency: HTMLElement[]}|null} the tokens, where they are drawn */
    chips: () => parts && { attribution: parts.attribution.chips, saliency: parts.saliency.chips },

    /** Only the text, as it is searched for and read aloud. */
    release() {
      parts?.details.remove();
      for (const column of parts?.columns ?? []) column.remove();
      parts = null;
      text ??= html("p", { class: "chips", dir: "auto" }, sentence.tokens.map(visible).join(" "));
      row.append(text);
    },

    /** The facts and the tokens, without colours. */
    draw() {
      const selected = text && selectedIn(text);
      text?.remove();
      parts = createParts();
      facts.append(parts.details);
      row.append(...parts.columns);
      // What the browser's search has found stays selected: the tokens make up the same text.
      if (selected) selectIn(parts.attribution.element, ...selected);
    },

    /** @param {boolean} chosen */
    choose(chosen) {
      row.classList.toggle("chosen", chosen);
      if (chosen) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
    },

    /** @param {RowContent} content of a row that is drawn */
    paint({ chosen, token, origin, attribution, beside, absent, decision, markedWords, rho, theme }) {
      if (!parts) return;
      parts.attribution.paint(attribution, theme.scale());
      paintBeside(parts.saliency, parts.told, beside, sentence, `Sentence ${i + 1}`, theme);
      parts.banner.hidden = !origin;
      setText(parts.origin, origin);
      parts.absent.hidden = !absent;
      setText(parts.absent, absent);
      for (const [k, chip] of parts.attribution.chips.entries()) {
        chip.classList.toggle("source", k === token);
        chip.setAttribute("aria-pressed", String(k === token));
        chip.tabIndex = chosen ? 0 : -1;
      }
      const { right, chance } = decision;
      setText(parts.answerName, decision.name);
      setText(parts.predicted, decision.answer);
      setText(parts.where, visible(decision.where));
      parts.where.hidden = !decision.where;
      markDecided(parts, decision.marked, markedWords);
      setText(parts.verdict, right === null ? "" : right ? "✓" : "✗");
      parts.verdict.title = right === null ? "" : right ? "right" : "wrong";
      parts.verdict.classList.toggle("wrong", right === false);
      parts.bar.hidden = chance === null;
      parts.fill.style.width = `${100 * (chance ?? 0)}%`;
      setText(parts.probability, chance === null ? "" : percent(chance));
      setText(parts.chanceName, decision.chanceName ? ` ${decision.chanceName}` : "");
      setText(parts.rho, rho === undefined ? "–" : decimal(rho));
    },
  };
}

/** What the data say; an earlier version of the package wrote classes alone. */
function truthOf(sentence, names) {
  return sentence.truth === null ? className(names, sentence.label) : visible(sentence.truth);
}

/** A text of the example that the figures are not of. */
function otherText(name, text) {
  return html("p", { class: "other-text", dir: "auto" }, html("span", { class: "fact" }, visible(name)), visible(text));
}
