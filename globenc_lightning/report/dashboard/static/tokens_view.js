/**
 * Every probe sentence in coloured tokens: what the method says on the left; on the right the saliency, or what else was
 * asked for.
 */

import { besideOf, besideStored, createBesideHead, describedBeside } from "./beside.js";
import { createLegend } from "./chips.js";
import { html, notice, setText } from "./dom.js";
import { createSentenceRow } from "./sentence_row.js";
import { createShare, shownOf, storedOf } from "./shares.js";
import { decisionOf, hasFigures, whyEmpty } from "./state.js";
import { valueAndRank, visible } from "./text.js";
import { createLineCounter, createWindowedList, frameOf } from "./windowed.js";

const ALL = 1500; // so many tokens are drawn at once, wherever the window is
const PREFETCHED = [1, -1, 2, -2, 3];
const REST_MS = 150;
const STACK_GAP = 8;
const OTHER = { letter: 6.3, line: 19, above: 6 }; // of another text of an example, about
const NOTHING = { name: "predicted", answer: "–", right: null, chance: null, chanceName: "", where: "", marked: [] };

/**
 * What is on the page; the data are null where the validation has no figures.
 * @typedef {{selection: import("./state.js").Selection, data: import("./api.js").Tokens|null, own: number[]|null,
 *   note: string}} Scene own is the row of the chosen token, note why there is none
 */

/** @param {import("./index.js").Context} context */
export function createTokensView({ api, update, theme, tooltip }) {
  const methodTitle = html("h2");
  const markKey = html("span", { class: "mark-key", hidden: true });
  const besideHead = createBesideHead({ update, theme });
  const message = html("div");
  const list = html("div", { "class": "sentences", "role": "feed", "aria-label": "Sentences" });
  const share = createShare();
  const element = html(
    "section",
    { "class": "view tokens-view", "aria-label": "Tokens" },
    html(
      "div",
      { class: "token-heads" },
      html("div", { class: "legend-cell" }, createLegend(theme), markKey),
      html("div", {}, methodTitle),
      besideHead.element,
      share.element,
    ),
    message,
    list,
  );
  const methodHint = html("p", { class: "hint" });
  methodTitle.after(methodHint);

  /** @type {ReturnType<typeof createSentenceRow>[]} */
  let rows = [];
  let chosenRow = -1;
  /** @type {{key: string, sentences: import("./api.js").Sentence[]}|null} */
  let built = null;
  /** @type {Scene|null} */
  let shown = null;
  const lines = createLineCounter();
  const windowed = createWindowedList(list, {
    draw(i) {
      rows[i].draw();
      paintRow(i);
    },
    release: (i) => rows[i].release(),
  });

  /** @param {import("./state.js").Selection} selection */
  function build({ index, run, tag }) {
    const key = JSON.stringify([run, tag, index.class_names]);
    const same = (one) => one === index.sentences || JSON.stringify(one) === JSON.stringify(index.sentences);
    if (built?.key === key && same(built.sentences)) {
      built.sentences = index.sentences;
      return;
    }
    built = { key, sentences: index.sentences };
    const count = index.sentences.length;
    const back = () => update({ token: null });
    rows = index.sentences.map((one, i) => createSentenceRow(one, { i, count, names: index.class_names, back }));
    const all = index.sentences.reduce((sum, { tokens }) => sum + tokens.length, 0) <= ALL;
    if (!all) for (const row of rows) row.release();
    chosenRow = -1;
    windowed.replace(rows.map(({ row }) => row), { all, height: heights });
  }

  /** What rows take that are not drawn, by what the chosen one takes. */
  function heights() {
    const { row, facts } = rows[chosenRow];
    const [first, second] = [...row.querySelectorAll(".chips")];
    const style = getComputedStyle(first);
    lines.use(`${style.fontSize} ${style.fontFamily}`);
    const [room, line] = [first.clientWidth, Number.parseFloat(style.lineHeight)];
    const stacked = second.getBoundingClientRect().top >= first.getBoundingClientRect().bottom;
    const frame = frameOf(row);
    const told = facts.offsetHeight;
    return (i) => {
      const { sentences } = /** @type {NonNullable<typeof built>} */ (built);
      const { tokens, others } = sentences[i];
      const chips = lines.count(tokens.map(visible), room) * line;
      const beside = others.reduce((sum, [name, text]) => sum + otherHeight(name.length + text.length, room), 0);
      return frame + (stacked ? told + 2 * chips + beside + 2 * STACK_GAP : Math.max(told, chips + beside));
    };
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
    const chips = rows[i].chips();
    return chips ? [chips.attribution[k], chips.saliency[k]] : [];
  }

  function describe(target, at) {
    const hit = chipAt(target);
    for (const chip of list.querySelectorAll(".chip.twin")) chip.classList.remove("twin");
    if (!hit || !shown?.data) {
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
      [line(title, values), describedBeside(besideOf(selection, data, hit.i), hit.k)],
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

  /** @param {number} i a row that is drawn */
  function paintRow(i) {
    if (!shown) return;
    const { selection, data, own, note } = shown;
    const { index, sentence, layer, validation, method } = selection;
    const chosen = i === sentence;
    const token = chosen ? selection.token : null;
    const row = data?.rows[i] ?? null;
    rows[i].paint({
      chosen,
      token,
      origin: token === null || !data ? "" : originOf(index, i, token, layer, own, note),
      attribution: (chosen && own) || row,
      beside: besideOf(selection, data, i),
      absent: !data || row || (chosen && own) ? "" : absentOf(method, data.instead[i]),
      decision: data ? decisionOf(index, validation, i) : NOTHING,
      markedWords: index.words.marked,
      rho: data?.rho[i],
      theme,
    });
  }

  function originOf(index, i, token, layer, own, note) {
    const name = visible(index.sentences[i].tokens[token]);
    const last = layer === index.layers - 1;
    return own
      ? `Where “${name}” itself comes from: its own row${last ? "" : ", always of the last layer"}.`
      : `The own row of “${name}” is not there: ${note}.`;
  }

  function absentOf(method, stored) {
    return `${method} is not stored for this sentence; ${stored?.length ? `${stored.join(", ")} are.` : "no method is."}`;
  }

  function paint() {
    const { selection, data } = /** @type {Scene} */ (shown);
    const { index, sentence, layer, method } = selection;
    if (chosenRow !== sentence) {
      rows[chosenRow]?.choose(false);
      rows[sentence].choose(true);
      chosenRow = sentence;
    }
    windowed.pin(sentence);
    for (const i of windowed.drawn()) paintRow(i);
    share.say(
      shownOf(index),
      data ? storedOf(method, index.sentences.length, data) : "",
      data ? besideStored(index.sentences.map((_, i) => besideOf(selection, data, i))) : "",
    );
    setText(methodTitle, method === "N-Enc" ? "N-Enc (GlobEnc)" : method);
    const { readout, text, marked } = index.words;
    const of = [readout, text].filter(Boolean).map((words) => `; ${visible(words)}`);
    setText(methodHint, `what the readout is made of after layer ${layer + 1} of ${index.layers}${of.join("")}`);
    besideHead.paint(selection);
    setText(markKey, marked ?? "");
    markKey.hidden = !marked;
  }

  /** Fetches what the next steps need, unless the slider is already somewhere else. */
  async function prefetch({ run, tag, index, position, method, layer, reference, beside }, isCurrent) {
    await new Promise((resolve) => setTimeout(resolve, REST_MS));
    if (!isCurrent()) return;
    for (const offset of PREFETCHED) {
      const next = index.validations[position + offset];
      // A failure shows when that validation is chosen.
      if (next && hasFigures(next)) {
        api.tokens(run, tag, position + offset, method, layer, { reference, asked: beside }).catch(() => {});
      }
    }
  }

  let scrolledTo = -1;

  return {
    element,

    /** The view takes another's place, at the top of the page: the chosen sentence is to be seen. */
    attached: () => (scrolledTo = -1),

    /**
     * @param {import("./state.js").Selection} selection
     * @param {() => boolean} isCurrent
     */
    async show(selection, isCurrent) {
      const { run, tag, position, method, layer, validation, sentence, reference, beside } = selection;
      const usable = hasFigures(validation);
      const data = usable ? await api.tokens(run, tag, position, method, layer, { reference, asked: beside }) : null;
      const { own, note } = usable ? await ownRow(selection) : { own: null, note: "" };
      if (!isCurrent()) return;
      shown = { selection, data, own, note };
      build(selection);
      message.replaceChildren(...(usable ? [] : [notice("No figures here", whyEmpty(validation))]));
      paint();
      if (scrolledTo !== sentence) {
        if (scrolledTo >= 0 || sentence > 0) {
          rows[sentence].row.scrollIntoView({ block: "nearest" });
          // What is around it now has another height than was thought.
          windowed.update();
          rows[sentence].row.scrollIntoView({ block: "nearest" });
        }
        scrolledTo = sentence;
      }
      windowed.update();
      prefetch(selection, isCurrent);
    },
  };
}

/** What another text of an example takes, about. */
function otherHeight(letters, room) {
  return OTHER.above + OTHER.line * Math.max(Math.ceil((letters * OTHER.letter) / Math.max(room, 1)), 1);
}
