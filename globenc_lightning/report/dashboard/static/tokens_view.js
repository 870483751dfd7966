/** Every probe sentence in coloured tokens, what the method says on the left and the saliency on the right. */

import { createChips, createLegend } from "./chips.js";
import { html, notice, setText } from "./dom.js";
import { decisionOf, hasFigures, whyEmpty } from "./state.js";
import { className, decimal, percent, valueAndRank, visible } from "./text.js";

const PREFETCHED = [1, -1, 2, -2, 3];
const REST_MS = 150;
const NOTHING = { name: "predicted", answer: "–", right: null, chance: null, chanceName: "", where: "", marked: [] };

/** @param {import("./index.js").Context} context */
export function createTokensView({ api, update, theme, tooltip }) {
  const methodTitle = html("h2");
  const markKey = html("span", { class: "mark-key", hidden: true });
  const saliencyHint = html("p", { class: "hint" });
  const message = html("div");
  const list = html("div", { class: "sentences" });
  const element = html(
    "section",
    { "class": "view tokens-view", "aria-label": "Tokens" },
    html(
      "div",
      { class: "token-heads" },
      html("div", { class: "legend-cell" }, createLegend(theme), markKey),
      html("div", {}, methodTitle),
      html(
        "div",
        {},
        html("h2", {}, "Saliency"),
        saliencyHint,
      ),
    ),
    message,
    list,
  );
  const methodHint = html("p", { class: "hint" });
  methodTitle.after(methodHint);

  /** @type {ReturnType<typeof createRow>[]} */
  let rows = [];
  let built = "";
  /** @type {{selection: import("./state.js").Selection, own: number[]|null, data: import("./api.js").Tokens}|null} */
  let shown = null;

  function createRow(sentence, i, names) {
    const attribution = createChips(sentence, `Sentence ${i + 1}, attribution`);
    const saliency = createChips(sentence, `Sentence ${i + 1}, saliency`);
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
    const back = html(
      "button",
      { class: "link", type: "button", on: { click: () => update({ token: null }) } },
      "Back to the readout",
    );
    const banner = html("p", { class: "origin", hidden: true }, origin, back);
    const row = html(
      "article",
      { "class": "sentence", "data-sentence": i },
      html(
        "div",
        { class: "facts" },
        html(
          "button",
          { "class": "number", "type": "button", "aria-label": `Choose sentence ${i + 1}` },
          String(i + 1),
        ),
        html(
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
        ),
      ),
      html("div", {}, banner, attribution.element, ...sentence.others.map(([name, text]) => otherText(name, text))),
      html("div", {}, saliency.element),
    );
    for (const chip of attribution.chips) {
      chip.setAttribute("role", "button");
      chip.setAttribute("aria-pressed", "false");
      chip.setAttribute("tabindex", "-1");
    }
    const facts = { answerName, predicted, verdict, where, bar, fill, probability, chanceName, rho };
    return { row, attribution, saliency, ...facts, banner, origin };
  }

  /** What the data say; an earlier version of the package wrote classes alone. */
  function truthOf(sentence, names) {
    return sentence.truth === null ? className(names, sentence.label) : visible(sentence.truth);
  }

  /** A text of the example that the figures are not of. */
  function otherText(name, text) {
    return html(
      "p",
      { class: "other-text", dir: "auto" },
      html("span", { class: "fact" }, visible(name)),
      visible(text),
    );
  }

  /** Marks what was decided about; the words are part of the token's name for those who cannot see the frame. */
  function markDecided(row, sentence, marked, words) {
    for (const part of [row.attribution, row.saliency]) {
      for (const [k, chip] of part.chips.entries()) chip.classList.toggle("decided", marked.includes(k));
    }
    for (const [k, chip] of row.attribution.chips.entries()) {
      const what = marked.includes(k) && words ? ` (${words})` : "";
      chip.setAttribute("aria-label", `${visible(sentence.tokens[k])}${what}: show where it comes from`);
    }
  }

  function build({ index, run, tag }) {
    const key = JSON.stringify([run, tag, index.sentences, index.class_names]);
    if (key === built) return;
    built = key;
    rows = index.sentences.map((sentence, i) => createRow(sentence, i, index.class_names));
    list.replaceChildren(...rows.map(({ row }) => row));
  }

  /** @returns {HTMLElement|null} */
  function within(target, selector) {
    return target instanceof Element ? target.closest(selector) : null;
  }

  function chipAt(target) {
    const chip = within(target, ".chip");
    const article = within(target, ".sentence");
    if (!chip || !article) return null;
    return { chip, i: Number(article.dataset.sentence), k: Number(chip.dataset.k) };
  }

  function twins(i, k) {
    return [rows[i].attribution.chips[k], rows[i].saliency.chips[k]];
  }

  function describe(target, at) {
    const hit = chipAt(target);
    for (const chip of list.querySelectorAll(".chip.twin")) chip.classList.remove("twin");
    if (!hit || !shown) {
      tooltip.hide();
      return;
    }
    for (const chip of twins(hit.i, hit.k)) chip.classList.add("twin");
    const { selection, data, own } = shown;
    const values = own && hit.i === selection.sentence ? own : data.rows[hit.i];
    const tokens = selection.index.sentences[hit.i].tokens;
    const line = (name, numbers) => ({ name, value: numbers ? valueAndRank(numbers, hit.k) : "not stored" });
    const title =
      own && selection.token !== null && hit.i === selection.sentence
        ? `share in “${visible(tokens[selection.token])}”, ${selection.method}`
        : `${selection.method}, layer ${selection.layer + 1}`;
    tooltip.show(
      at,
      visible(tokens[hit.k]),
      [line(title, values), line("saliency", data.saliency[hit.i])],
      "1 is the row’s largest value.",
    );
  }

  list.addEventListener("pointermove", (event) => describe(event.target, { x: event.clientX, y: event.clientY }));
  list.addEventListener("pointerleave", () => describe(null, { x: 0, y: 0 }));
  list.addEventListener("focusin", (event) => {
    const target = /** @type {Element} */ (event.target);
    const box = target.getBoundingClientRect();
    if (chipAt(target)) target.setAttribute("aria-describedby", tooltip.element.id);
    describe(target, { x: box.left, y: box.bottom });
  });
  list.addEventListener("focusout", () => describe(null, { x: 0, y: 0 }));

  function choose(target) {
    const hit = chipAt(target);
    if (hit?.chip.hasAttribute("role")) {
      const same = shown?.selection.sentence === hit.i && shown.selection.token === hit.k;
      update({ sentence: hit.i, token: same ? null : hit.k });
      return;
    }
    const article = within(target, ".sentence");
    if (article && !within(target, "button.link")) update({ sentence: Number(article.dataset.sentence), token: null });
  }
  list.addEventListener("click", (event) => {
    if (!window.getSelection()?.toString()) choose(event.target);
  });
  list.addEventListener("keydown", (event) => {
    if ((event.key === "Enter" || event.key === " ") && chipAt(event.target)) {
      choose(event.target);
      event.preventDefault();
      event.stopPropagation();
    }
  });

  /**
   * The own row of the chosen token, or why there is none.
   * @param {import("./state.js").Selection} selection
   */
  async function ownRow({ run, tag, position, sentence, token, method }) {
    if (token === null) return { own: null, note: "" };
    const detail = await api.detail(run, tag, position, sentence);
    const map = detail.rollout[method];
    return { own: map ? map[token] : null, note: map ? "" : (detail.rollout_note ?? "it was not stored") };
  }

  /** @param {import("./state.js").Selection} selection */
  function paint(selection, data, own, note) {
    const { index, sentence, token, layer, validation, method } = selection;
    const scale = theme.scale();
    const last = layer === index.layers - 1;
    for (const [i, row] of rows.entries()) {
      const chosen = i === sentence;
      row.row.classList.toggle("chosen", chosen);
      if (chosen) row.row.setAttribute("aria-current", "true");
      else row.row.removeAttribute("aria-current");
      row.attribution.paint(data ? (chosen && own) || data.rows[i] : null, scale);
      row.saliency.paint(data ? data.saliency[i] : null, scale);
      const marked = chosen ? token : null;
      row.banner.hidden = marked === null || !data;
      for (const [k, chip] of row.attribution.chips.entries()) {
        chip.classList.toggle("source", k === marked);
        chip.setAttribute("aria-pressed", String(k === marked));
        chip.tabIndex = chosen ? 0 : -1;
      }
      if (marked !== null && data) {
        const name = visible(index.sentences[i].tokens[marked]);
        if (own)
          setText(
            row.origin,
            `Where “${name}” itself comes from: its own row${last ? "" : ", always of the last layer"}.`,
          );
        else setText(row.origin, `The own row of “${name}” is not there: ${note}.`);
      }
      const decision = data ? decisionOf(index, validation, i) : NOTHING;
      const { right, chance } = decision;
      setText(row.answerName, decision.name);
      setText(row.predicted, decision.answer);
      setText(row.where, visible(decision.where));
      row.where.hidden = !decision.where;
      markDecided(row, index.sentences[i], decision.marked, index.words.marked);
      setText(row.verdict, right === null ? "" : right ? "✓" : "✗");
      row.verdict.title = right === null ? "" : right ? "right" : "wrong";
      row.verdict.classList.toggle("wrong", right === false);
      row.bar.hidden = chance === null;
      row.fill.style.width = `${100 * (chance ?? 0)}%`;
      setText(row.probability, chance === null ? "" : percent(chance));
      setText(row.chanceName, decision.chanceName ? ` ${decision.chanceName}` : "");
      setText(row.rho, data ? decimal(data.rho[i]) : "–");
    }
    setText(methodTitle, method === "N-Enc" ? "N-Enc (GlobEnc)" : method);
    const { readout, text, score, marked, shown } = index.words;
    const of = [readout, text, shown].filter(Boolean).map((words) => `; ${visible(words)}`);
    setText(methodHint, `what the readout is made of after layer ${layer + 1} of ${index.layers}${of.join("")}`);
    setText(saliencyHint, `gradient × input at the first hidden states${score ? `, of ${visible(score)}` : ""}`);
    setText(markKey, marked ?? "");
    markKey.hidden = !marked;
  }

  /** Fetches what the next steps need, unless the slider is already somewhere else. */
  async function prefetch({ run, tag, index, position, method, layer }, isCurrent) {
    await new Promise((resolve) => setTimeout(resolve, REST_MS));
    if (!isCurrent()) return;
    for (const offset of PREFETCHED) {
      const next = index.validations[position + offset];
      // A failure shows when that validation is chosen.
      if (next && hasFigures(next)) api.tokens(run, tag, position + offset, method, layer).catch(() => {});
    }
  }

  let scrolledTo = -1;

  return {
    element,

    /**
     * @param {import("./state.js").Selection} selection
     * @param {() => boolean} isCurrent
     */
    async show(selection, isCurrent) {
      const { run, tag, position, method, layer, validation, sentence } = selection;
      const usable = hasFigures(validation);
      const data = usable ? await api.tokens(run, tag, position, method, layer) : null;
      const { own, note } = usable ? await ownRow(selection) : { own: null, note: "" };
      if (!isCurrent()) return;
      build(selection);
      shown = data ? { selection, data, own } : null;
      message.replaceChildren(...(usable ? [] : [notice("No figures here", whyEmpty(validation))]));
      paint(selection, data, own, note);
      if (scrolledTo !== sentence) {
        if (scrolledTo >= 0 || sentence > 0) rows[sentence].row.scrollIntoView({ block: "nearest" });
        scrolledTo = sentence;
      }
      prefetch(selection, isCurrent);
    },
  };
}
