/** Which sentences' attributions moved most between two validations: sorted, before above after. */

import { createChips } from "./chips.js";
import { html, labelledSelect, notice, setOptions, setText } from "./dom.js";
import { counted, createShare, shownOf, storedOf } from "./shares.js";
import { decisionOf, hasFigures, sentencesAt, whyEmpty } from "./state.js";
import { decimal, visible } from "./text.js";
import { createLineCounter, createWindowedList, frameOf } from "./windowed.js";

const ALL = 750; // so many tokens, each of them twice, are drawn at once, wherever the window is
const NAMED = 3;
const TOP = 5;
const PAIR_GAP = 4;
const STACK_GAP = 8;

/** @param {import("./index.js").Context} context */
export function createMovementView({ api, update, theme }) {
  const from = labelledSelect("From", (value) => update({ from: Number(value) }));
  const to = html("strong");
  const message = html("div");
  const share = createShare();
  const list = html("div", { "class": "moved", "role": "feed", "aria-label": "Sentences, the most moved first" });
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
    share.element,
    message,
    list,
  );

  /** @type {{moved: import("./api.js").Moved[], selection: import("./state.js").Selection,
   *   before: import("./api.js").Tokens, after: import("./api.js").Tokens}|null} */
  let shown = null;
  /** @type {ReturnType<typeof createShell>[]} */
  let shells = [];
  const lines = createLineCounter();
  const windowed = createWindowedList(list, {
    draw: (i) => shells[i].draw(),
    release: (i) => shells[i].release(),
  });

  /** A row with its number and its text, drawn or not. */
  function createShell(moved, place, count, selection, before, after) {
    const { index } = selection;
    const sentence = index.sentences[moved.sentence];
    const label = `Open sentence ${moved.sentence + 1}, place ${place}`;
    const number = html("button", { "class": "number", "type": "button", "aria-label": label }, String(moved.sentence + 1));
    const facts = html("div", { class: "facts" }, number);
    const open = () => update({ view: "tokens", sentence: moved.sentence, token: null });
    const name = `Sentence ${moved.sentence + 1}, place ${place}`;
    const row = html(
      "article",
      {
        "class": "sentence",
        "data-sentence": moved.sentence,
        "aria-label": name,
        "aria-posinset": place,
        "aria-setsize": count,
        "on": { click: open },
      },
      facts,
    );
    /** @type {Node[]} */
    let parts = [];
    return {
      row,
      facts,
      draw() {
        for (const part of parts) part.parentNode?.removeChild(part);
        row.setAttribute("aria-label", name);
        parts = createParts(moved, selection, before, after);
        facts.append(parts[0]);
        row.append(parts[1]);
      },
      release() {
        for (const part of parts) part.parentNode?.removeChild(part);
        const text = sentence.tokens.map(visible).join(" ");
        parts = [html("p", { class: "chips", dir: "auto" }, text)];
        row.append(parts[0]);
        // As long as it is not laid out, it is read aloud by this name.
        row.setAttribute("aria-label", `${name}: ${text}`);
      },
    };
  }

  /** What a row shows: its figures, and its tokens before and after. */
  function createParts(moved, selection, before, after) {
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
    const among = Math.min(TOP, sentence.tokens.length);
    const fact = (name, value) => html("p", {}, html("span", { class: "fact" }, name), value);
    const figures = html(
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
    );
    const pair = html(
      "div",
      { class: "pair" },
      html("span", { class: "fact" }, `step ${start.step}`),
      first.element,
      html("span", { class: "fact" }, `step ${validation.step}`),
      second.element,
      html("span", {}),
      html("p", { class: "changes" }, ...changes("▲ gain", gained, sentence), ...changes("▼ lose", lost, sentence)),
    );
    return [figures, pair];
  }

  /** What rows take that are not drawn, by what the first one takes. */
  function heights() {
    const { row, facts } = shells[0];
    const [first, second] = [...row.querySelectorAll(".chips")];
    const named = /** @type {HTMLElement} */ (row.querySelector(".changes"));
    const style = getComputedStyle(first);
    lines.use(`${style.fontSize} ${style.fontFamily}`);
    const [room, line, frame, told] = [first.clientWidth, Number.parseFloat(style.lineHeight), frameOf(row), facts.offsetHeight];
    const besides = named.offsetHeight + second.offsetTop - first.offsetTop - first.offsetHeight + PAIR_GAP;
    const stacked = facts.getBoundingClientRect().bottom <= first.getBoundingClientRect().top;
    return (i) => {
      const { moved, selection } = /** @type {NonNullable<typeof shown>} */ (shown);
      const chips = lines.count(selection.index.sentences[moved[i].sentence].tokens.map(visible), room) * line;
      return frame + (stacked ? told + STACK_GAP + 2 * chips + besides : Math.max(told, 2 * chips + besides));
    };
  }

  /** @param {NonNullable<typeof shown>} scene */
  function build(scene) {
    const { moved, selection, before, after } = scene;
    shown = scene;
    shells = moved.map((one, i) => createShell(one, i + 1, moved.length, selection, before, after));
    const all = moved.reduce((sum, one) => sum + selection.index.sentences[one.sentence].tokens.length, 0) <= ALL;
    if (!all) for (const shell of shells) shell.release();
    for (const [i, { row }] of shells.entries()) row.classList.toggle("chosen", moved[i].sentence === selection.sentence);
    windowed.replace(shells.map(({ row }) => row), { all, height: heights });
    if (moved.length) windowed.pin(0);
    windowed.update();
  }

  /** What is compared of what, and why not more. */
  function said(selection, answer, data) {
    const { index, method } = selection;
    const compared = answer.sentences.filter((moved) => !moved.other_text).length;
    const all = counted(index.examples);
    if (compared === index.examples) return "";
    const which = compared < index.sentences.length ? `${counted(compared)} of ${all} sentences are compared.` : "";
    return `${which} ${shownOf(index)} ${answer.lacking.length ? storedOf(method, index.sentences.length, data) : ""}`.trim();
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
      const answers =
        reason || same
          ? null
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
      const [answer, before, after] = answers ?? [null, null, null];
      share.say(answer ? said(selection, answer, both(before, after, method, index.sentences.length)) : shownOf(index));
      if (answer) build({ moved: answer.sentences, selection, before, after });
      else {
        windowed.replace([], { all: true, height: heights });
        shown = null;
      }
    },
  };
}

/** What is stored at two validations: a sentence counts where both have its rows. */
function both(before, after, method, count) {
  const instead = { ...before.instead, ...after.instead };
  const stored = Object.fromEntries(
    Object.keys(before.stored).map((one) => [one, Math.min(before.stored[one], after.stored[one] ?? 0)]),
  );
  if (stored[method]) stored[method] = count - Object.keys(instead).length;
  return { instead, stored, room: Math.max(before.room, after.room) };
}
