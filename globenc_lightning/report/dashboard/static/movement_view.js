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
  /** @type {{of: import("./api.js").Sentence[]|null, made: string[]}} */
  let texts = { of: null, made: [] };
  /** How many lines sentences take. @type {{of: import("./api.js").Sentence[]|null, room: number, made: number[]}} */
  let counts = { of: null, room: 0, made: [] };
  const lines = createLineCounter();
  const windowed = createWindowedList(list, {
    draw: (i) => shells[i].draw(),
    release: (i) => shells[i].release(),
  });

  /**
   * A place in the list, drawn or not. At another step another sentence has moved so far: the place stays, and what it
   * holds changes, so that a page with many sentences is not built anew.
   */
  function createShell(place, count) {
    const number = html("button", { class: "number", type: "button" });
    const facts = html("div", { class: "facts" }, number);
    const open = () => update({ view: "tokens", sentence: moved().sentence, token: null });
    const row = html(
      "article",
      { "class": "sentence", "aria-posinset": place, "aria-setsize": count, "on": { click: open } },
      facts,
    );
    /** Made when it is first needed. @type {HTMLElement|null} */
    let text = null;
    /** What is there instead of the text. @type {Node[]} */
    let parts = [];
    const moved = () => /** @type {NonNullable<typeof shown>} */ (shown).moved[place - 1];
    const name = () => `Sentence ${moved().sentence + 1}, place ${place}`;

    /** As long as a row is not laid out, it is read aloud by a name that holds its text. */
    function say() {
      const words = textOf(moved().sentence);
      text ??= html("p", { class: "chips", dir: "auto" });
      setText(text, words);
      row.setAttribute("aria-label", `${name()}: ${words}`);
    }

    return {
      row,
      facts,

      /** Another sentence is at this place, or the same. */
      renew() {
        const { sentence } = moved();
        const { selection } = /** @type {NonNullable<typeof shown>} */ (shown);
        row.classList.toggle("chosen", sentence === selection.sentence);
        if (row.dataset.sentence !== String(sentence)) {
          row.dataset.sentence = String(sentence);
          setText(number, String(sentence + 1));
          number.setAttribute("aria-label", `Open sentence ${sentence + 1}, place ${place}`);
          if (text?.isConnected) say();
        }
      },
      draw() {
        for (const part of parts) part.parentNode?.removeChild(part);
        text?.remove();
        row.setAttribute("aria-label", name());
        const { selection, before, after } = /** @type {NonNullable<typeof shown>} */ (shown);
        parts = createParts(moved(), selection, before, after);
        facts.append(parts[0]);
        row.append(parts[1]);
      },
      release() {
        for (const part of parts) part.parentNode?.removeChild(part);
        parts = [];
        say();
        row.append(/** @type {Node} */ (text));
      },
    };
  }

  /** A sentence's text, put together once. @param {number} i */
  function textOf(i) {
    const { sentences } = /** @type {NonNullable<typeof shown>} */ (shown).selection.index;
    if (texts.of !== sentences) texts = { of: sentences, made: [] };
    texts.made[i] ??= sentences[i].tokens.map(visible).join(" ");
    return texts.made[i];
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
      const chips = lineCount(selection.index.sentences, moved[i].sentence, room) * line;
      return frame + (stacked ? told + STACK_GAP + 2 * chips + besides : Math.max(told, 2 * chips + besides));
    };
  }

  /** Counted once for each sentence and width. */
  function lineCount(sentences, i, room) {
    if (counts.of !== sentences || counts.room !== room) counts = { of: sentences, room, made: [] };
    counts.made[i] ??= lines.count(sentences[i].tokens.map(visible), room);
    return counts.made[i];
  }

  /** @param {NonNullable<typeof shown>} scene */
  function build(scene) {
    const { moved, selection } = scene;
    const all = moved.reduce((sum, one) => sum + selection.index.sentences[one.sentence].tokens.length, 0) <= ALL;
    const same = shown !== null && shells.length === moved.length && windowed.isWhole() === all;
    shown = scene;
    if (same) {
      windowed.renew(() => shells.forEach((shell) => shell.renew()));
      return;
    }
    shells = moved.map((_, i) => createShell(i + 1, moved.length));
    for (const shell of shells) {
      shell.renew();
      if (!all) shell.release();
    }
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
export function both(before, after, method, count) {
  const instead = { ...before.instead, ...after.instead };
  const stored = Object.fromEntries(
    Object.keys(before.stored).map((one) => [one, Math.min(before.stored[one], after.stored[one] ?? 0)]),
  );
  if (stored[method]) stored[method] = count - Object.keys(instead).length;
  return { instead, stored, room: Math.max(before.room, after.room) };
}
