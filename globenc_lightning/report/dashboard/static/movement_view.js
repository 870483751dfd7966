/** Which sentences' attributions moved most between two validations: sorted, before above after. */

import { createChips } from "./chips.js";
import { html, labelledSelect, notice, setOptions, setText } from "./dom.js";
import { decisionOf, hasFigures, sentencesAt, whyEmpty } from "./state.js";
import { decimal, visible } from "./text.js";

const NAMED = 3;
const TOP = 5;

/** @param {import("./index.js").Context} context */
export function createMovementView({ api, update, theme }) {
  const from = labelledSelect("From", (value) => update({ from: Number(value) }));
  const to = html("strong");
  const message = html("div");
  const list = html("ol", { class: "moved" });
  const element = html(
    "section",
    { "class": "view movement-view", "aria-label": "Movement" },
    html(
      "div",
      { class: "card slim movement-head" },
      from.element,
      html("p", { class: "hint to" }, "to ", to, ", where the slider stands"),
      html(
        "p",
        { class: "hint" },
        "Sorted by 1 − ρ of a sentence’s two rows: 0 where the tokens keep their order, more where it changes. " +
          "A click opens the sentence.",
      ),
    ),
    message,
    list,
  );

  function createRow(moved, place, selection, before, after) {
    const { index, whole, validation } = selection;
    const sentence = index.sentences[moved.sentence];
    const start = index.validations[selection.from];
    const earlier = sentencesAt(whole, start)[moved.sentence];
    const first = createChips(earlier, `Sentence ${moved.sentence + 1} at step ${start.step}`);
    const second = createChips(sentence, `Sentence ${moved.sentence + 1} at step ${validation.step}`);
    first.paint(before.rows[moved.sentence], theme.scale());
    second.paint(after.rows[moved.sentence], theme.scale());
    const [was, is] = [start, validation].map((one) => decisionOf(index, one, moved.sentence));
    for (const k of was.marked) first.chips[k].classList.add("decided");
    for (const k of is.marked) second.chips[k].classList.add("decided");
    const gained = moved.gained.slice(0, NAMED);
    const lost = moved.lost.slice(0, NAMED);
    for (const k of gained) second.chips[k].classList.add("gained");
    for (const k of lost) second.chips[k].classList.add("lost");
    const bar = html("span", { class: "distance-bar" }, html("span"));
    // 1 - rho runs from 0 to 2; the bar is full at 1, where the orders have nothing in common.
    /** @type {HTMLElement} */ (bar.firstChild).style.width = `${100 * Math.min(moved.distance ?? 0, 1)}%`;
    const open = () => update({ view: "tokens", sentence: moved.sentence, token: null });
    const among = Math.min(TOP, sentence.tokens.length);
    const fact = (name, value) => html("p", {}, html("span", { class: "fact" }, name), value);
    return html(
      "li",
      { "class": "sentence", "data-sentence": moved.sentence, "on": { click: open } },
      html(
        "div",
        { class: "facts" },
        html(
          "button",
          { "class": "number", "type": "button", "aria-label": `Open sentence ${moved.sentence + 1}, place ${place}` },
          String(moved.sentence + 1),
        ),
        html(
          "div",
          {},
          ...(moved.other_text
            ? [html("p", { class: "other-text" }, "another text was shown")]
            : [
                fact("1 − ρ", html("strong", { class: "distance" }, decimal(moved.distance, 3))),
                bar,
                fact(
                  `top ${among}`,
                  moved.overlap === null ? "undefined" : `${Math.round(moved.overlap * among)} of ${among} stay`,
                ),
              ]),
          fact(is.name, was.answer === is.answer ? is.answer : `${was.answer} → ${is.answer}`),
        ),
      ),
      html(
        "div",
        { class: "pair" },
        html("span", { class: "fact" }, `step ${start.step}`),
        first.element,
        html("span", { class: "fact" }, `step ${validation.step}`),
        second.element,
        html("span", {}),
        html("p", { class: "changes" }, ...changes("▲ gain", gained, sentence), ...changes("▼ lose", lost, sentence)),
      ),
    );
  }

  function changes(name, positions, sentence) {
    if (!positions.length) return [];
    return [
      html("span", { class: "fact" }, name),
      html("span", {}, positions.map((k) => visible(sentence.tokens[k])).join(", ")),
    ];
  }

  return {
    element,

    /**
     * @param {import("./state.js").Selection} selection
     * @param {() => boolean} isCurrent
     */
    async show(selection, isCurrent) {
      const { run, tag, index, position, method, layer, validation } = selection;
      const start = index.validations[selection.from];
      const reason = [start, validation].filter((one) => !hasFigures(one)).map(whyEmpty)[0];
      const same = selection.from === position;
      const [moved, before, after] =
        reason || same
          ? [null, null, null]
          : await Promise.all([
              api.movement(run, tag, selection.from, position, method, layer),
              api.tokens(run, tag, selection.from, method, layer),
              api.tokens(run, tag, position, method, layer),
            ]);
      if (!isCurrent()) return;
      setOptions(
        from.select,
        index.validations
          .filter((one) => hasFigures(one) || one === start)
          .map((one) => ({
            value: String(one.ordinal),
            label: `step ${one.step} (validation ${index.validations.indexOf(one) + 1})`,
          })),
        String(start.ordinal),
      );
      setText(to, `step ${validation.step}`);
      if (reason) message.replaceChildren(notice("Nothing to compare", reason));
      else if (same) {
        message.replaceChildren(
          index.validations.length > 1
            ? notice(
                "Nothing to compare",
                "Both ends are the same validation: move the slider, or choose another one to start from.",
              )
            : notice("Nothing to compare yet", "So far there is one validation. Movement needs two."),
        );
      } else message.replaceChildren();
      list.replaceChildren(
        ...(moved ? moved.sentences.map((one, i) => createRow(one, i + 1, selection, before, after)) : []),
      );
      for (const row of list.children) {
        row.classList.toggle(
          "chosen",
          Number(/** @type {HTMLElement} */ (row).dataset.sentence) === selection.sentence,
        );
      }
    },
  };
}
