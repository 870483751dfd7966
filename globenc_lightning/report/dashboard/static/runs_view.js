/** Many runs at once: correlation, drift and the share of chosen tokens, as means over runs with bands over runs. */

import { average, typedTokens } from "./aggregate.js";
import { methodStyle } from "./colours.js";
import { dot } from "./correlation_view.js";
import { html, labelledSelect, notice, setOptions, setText } from "./dom.js";
import { createLineChart, sample } from "./line_chart.js";
import { shorten, visible } from "./text.js";

const HEIGHT = 340;
const LABEL_LIMIT = 12;
const TYPING_MS = 350;
const MOST_WORDS = 200;
const CHANCE_STYLE = { light: "#717581", dark: "#a9adb8", marker: "circle", dash: "3 4", hollow: true };
const RUN_STYLE = { marker: "circle", dash: "", hollow: false };
const PRESETS = {
  "Negations": "not no never n't nor none nothing nobody neither without cannot",
  "Punctuation": "[punctuation]",
  "Special tokens": "[special]",
};
const AGAINST = { previous: "the validation before", first: "the first validation", last: "the last validation" };
const MEASURES = { spearman: "1 − Spearman’s ρ", jaccard: "1 − Jaccard of the top 25 %" };

/**
 * @typedef {{selection: import("./state.js").Selection, state: import("./state.js").State,
 *   tables: import("./api.js").Table[], dynamics: import("./api.js").Dynamics[], methods: string[], words: string[]}}
 *   Scene
 */

/** @param {import("./index.js").Context} context */
export function createRunsView({ api, update, theme, tooltip, runs }) {
  const message = html("div");
  const methodChips = html("div", { "class": "toggles", "role": "group", "aria-label": "Methods that are drawn" });
  const runChips = html("div", { "class": "toggles", "role": "group", "aria-label": "Runs that are averaged" });
  const singleBox = /** @type {HTMLInputElement} */ (
    html("input", { type: "checkbox", on: { change: () => update({ single: singleBox.checked }) } })
  );
  const everyRun = html("button", { class: "link", type: "button", on: { click: () => update({ runs: null }) } }, "All");
  const against = labelledSelect("Compared with", (value) => update({ against: value }));
  const by = labelledSelect("Measured by", (value) => update({ by: value }));
  let typing = 0;
  const typed = /** @type {HTMLInputElement} */ (
    html("input", {
      "type": "text",
      "class": "typed",
      "aria-label": "Tokens whose share is shown",
      "placeholder": "not, never, no",
      "maxlength": 2000,
      "spellcheck": "false",
      "autocomplete": "off",
      "on": {
        input() {
          window.clearTimeout(typing);
          typing = window.setTimeout(() => update({ tokens: typed.value }), TYPING_MS);
        },
        change() {
          window.clearTimeout(typing);
          update({ tokens: typed.value });
        },
      },
    })
  );
  const presets = Object.entries(PRESETS).map(([name, words]) =>
    html("button", { class: "toggle", type: "button", on: { click: () => update({ tokens: words }) } }, name),
  );

  /** A card with a title, hints and a chart. */
  function createCard(label, nameX, onPick, ...controls) {
    const title = html("h2");
    const hint = html("p", { class: "hint" });
    const chart = createLineChart({ label, tooltip, nameX, onPick });
    const rows = controls.length ? [html("div", { class: "toggle-row" }, ...controls)] : [];
    const element = html("div", { class: "card" }, title, ...rows, hint, chart.element);
    return { element, title, hint, chart };
  }

  /** @type {Scene|null} */
  let shown = null;
  const toStep = (x) => {
    const validation = shown?.selection.index.validations.findLast(({ step }) => step <= x);
    if (validation) update({ validation: validation.ordinal });
  };
  const nameStep = (x) => `step ${x}`;
  const training = createCard("Correlation over the training, mean over runs", nameStep, toStep);
  const layers = createCard("Correlation by layer, mean over runs", (x) => `layer ${x}`, (x) => update({ layer: x - 1 }));
  const drift = createCard("Drift over the training, mean over runs", nameStep, toStep, against.element, by.element);
  const mass = createCard("Share of chosen tokens, mean over runs", nameStep, toStep, typed, ...presets);
  const cards = html("div", { class: "cards" }, training.element, drift.element, layers.element, mass.element);
  const element = html(
    "section",
    { "class": "view runs-view", "aria-label": "Runs" },
    html(
      "div",
      { class: "card slim" },
      html(
        "div",
        { class: "toggle-row" },
        html("span", { class: "field-name" }, "Methods"),
        methodChips,
        html("label", { class: "check" }, singleBox, "Single runs"),
      ),
      html("div", { class: "toggle-row" }, html("span", { class: "field-name" }, "Runs"), runChips, everyRun),
    ),
    message,
    cards,
  );

  function toggle(text, pressed, mark, press) {
    return html(
      "button",
      { "class": "toggle", "type": "button", "aria-pressed": String(pressed), "on": { click: press } },
      mark,
      text,
    );
  }

  /** @param {Scene} scene @param {string[]} chosen @param {string[]} offered */
  function paintChoices({ selection, state, methods, words }, chosen, offered) {
    const dark = theme.isDark();
    const all = selection.index.methods;
    const flipped = (list, one) => (list.includes(one) ? list.filter((other) => other !== one) : [...list, one]);
    methodChips.replaceChildren(
      ...all.map((method) =>
        toggle(
          method,
          methods.includes(method),
          sample(methodStyle(method), methodStyle(method)[dark ? "dark" : "light"]),
          () => update({ methods: all.filter((one) => flipped(methods, method).includes(one)) }),
        ),
      ),
    );
    const hidden = runs.names().length - offered.length;
    runChips.replaceChildren(
      ...offered.map((name) =>
        toggle(visible(name), chosen.includes(name), dot(runs.colour(name)), () =>
          update({ runs: flipped(chosen, name) }),
        ),
      ),
      ...(hidden > 0 ? [html("span", { class: "hint" }, `${hidden} more hidden by TensorBoard’s run filter`)] : []),
    );
    everyRun.hidden = state.runs === null;
    singleBox.checked = state.single;
    setOptions(against.select, Object.entries(AGAINST).map(([value, label]) => ({ value, label })), state.against);
    setOptions(by.select, Object.entries(MEASURES).map(([value, label]) => ({ value, label })), state.by);
    if (document.activeElement !== typed) typed.value = state.tokens;
    for (const [i, preset] of presets.entries()) {
      preset.setAttribute("aria-pressed", String(typedTokens(Object.values(PRESETS)[i]).join() === words.join()));
    }
  }

  /**
   * The mean of each drawn method, and of each run if that is asked for.
   * @param {Scene} scene
   * @param {(method: string, place: number) => {x: number[], y: (number|null)[]}} curve of the run at a place
   */
  function lines({ tables, methods, state, selection }, curve) {
    const dark = theme.isDark();
    return methods.flatMap((method) => {
      const curves = tables.map((_, place) => curve(method, place));
      const { x, mean, low, high, n } = average(curves);
      const several = tables.length > 1;
      const style = methodStyle(method);
      const whole = {
        name: several ? `${method}, mean over runs` : method,
        label: method,
        colour: style[dark ? "dark" : "light"],
        style,
        x,
        y: mean,
        low,
        high,
        n: several ? n : undefined,
        weight: /** @type {"strong"|"usual"} */ (method === selection.method ? "strong" : "usual"),
      };
      // Those of every method would hide each other.
      if (!state.single || !several || method !== (methods.includes(selection.method) ? selection.method : methods[0]))
        return [whole];
      const single = curves.map((one, place) => ({
        name: `${visible(tables[place].run)}, ${method}`,
        label: "",
        colour: runs.colour(tables[place].run),
        style: { ...RUN_STYLE, light: "", dark: "" },
        x: one.x,
        y: one.y,
        low: null,
        high: null,
        weight: /** @type {"quiet"} */ ("quiet"),
        unnamed: true,
      }));
      return [...single, whole];
    });
  }

  function paint() {
    if (!shown || training.element.clientWidth === 0) return;
    const { selection, state, tables, dynamics, words, methods } = shown;
    const { layer, validation } = selection;
    const width =
      training.element.clientWidth - 2 * Number.parseFloat(getComputedStyle(training.element).paddingLeft);
    const size = { width, height: HEIGHT, whole: true };
    const steps = { xName: "training step", marked: validation.step };
    const over =
      tables.length > 1
        ? `Mean over ${tables.length} runs; band: ± 1 standard deviation over runs.`
        : "One run: no band over runs. The view Correlation has the interval over sentences.";

    const correlation = lines(shown, (method, place) => ({
      x: tables[place].steps,
      y: tables[place].mean[method].map((row) => row?.[layer] ?? null),
    }));
    setText(training.title, `Correlation over the training, layer ${layer + 1}`);
    setText(training.hint, over);
    training.chart.draw({ lines: correlation, ...steps, ...size, ...scaleOf(correlation, -1, 1) });

    const moved = lines(shown, (method, place) => ({ x: tables[place].steps, y: dynamics[place].drift[method] }));
    const chance = dynamics[0]?.chance ?? null;
    setText(drift.title, `Drift, layer ${layer + 1}`);
    setText(
      drift.hint,
      `How far each sentence’s row is from that of ${AGAINST[state.against]}, without special tokens: mean over ` +
        "sentences. 0: it has not moved. Dotted: rows whose tokens were shuffled.",
    );
    const withChance = [...moved, ...chanceLine(chance, moved)];
    drift.chart.draw({ lines: withChance, ...steps, ...size, ...scaleOf(withChance, 0, 2) });

    const numbers = Array.from({ length: selection.index.layers }, (_, l) => l + 1);
    const at = tables.map(({ steps: there }) => there.lastIndexOf(validation.step));
    const layered = lines(shown, (method, place) => ({
      x: numbers,
      y: numbers.map((_, l) => tables[place].mean[method][at[place]]?.[l] ?? null),
    }));
    const without = at.filter((place) => place < 0).length;
    setText(layers.title, `Correlation by layer, at step ${validation.step}`);
    setText(layers.hint, without ? `${over} ${without} of them have no validation at this step.` : over);
    layers.chart.draw({
      lines: layered,
      xName: "layer",
      marked: layer + 1,
      ...size,
      ...scaleOf(layered, -1, 1),
    });

    const shares = lines(shown, (method, place) => ({ x: tables[place].steps, y: dynamics[place].mass[method] }));
    const counts = dynamics[0]?.chosen ?? [];
    const found = counts.reduce((sum, one) => sum + one, 0);
    setText(mass.title, `Share of chosen tokens, layer ${layer + 1}`);
    setText(
      mass.hint,
      words.length
        ? `${found} tokens in ${counts.filter((one) => one).length} of ${counts.length} sentences: their share of the ` +
            `attribution of ${methods.length === 1 ? methods[0] : "each method"}, mean over all sentences.`
        : "Type tokens or whole words, parted by spaces or commas, or choose a set.",
    );
    mass.chart.element.hidden = !words.length;
    mass.chart.draw({ lines: shares, ...steps, ...size, ...scaleOf(shares, 0, 1) });
  }

  /** @returns {import("./line_chart.js").Line[]} */
  function chanceLine(chance, drawn) {
    const xs = [...new Set(drawn.flatMap(({ x, y }) => x.filter((_, i) => y[i] !== null)))].sort((a, b) => a - b);
    if (chance === null || !xs.length) return [];
    const ends = xs.length > 1 ? [xs[0], xs[xs.length - 1]] : xs;
    return [
      {
        name: "chance: shuffled tokens",
        label: "chance",
        colour: CHANCE_STYLE[theme.isDark() ? "dark" : "light"],
        style: CHANCE_STYLE,
        x: ends,
        y: ends.map(() => chance),
        low: null,
        high: null,
        weight: "quiet",
      },
    ];
  }

  new ResizeObserver(() => element.isConnected && paint()).observe(element);

  return {
    element,

    /**
     * @param {import("./state.js").Selection} selection
     * @param {() => boolean} isCurrent
     * @param {import("./state.js").State} state
     */
    async show(selection, isCurrent, state) {
      const { run, tag, index, layer } = selection;
      const names = runs.names();
      const offered = names.filter((name) => name === run || runs.isShown(name) || state.runs?.includes(name));
      const wanted = state.runs === null ? offered : names.filter((name) => state.runs?.includes(name));
      const asked = [...new Set([run, ...wanted])];
      const all = await Promise.all(asked.map((name) => runs.table(name, tag)));
      if (!isCurrent()) return;
      const own = all[0];
      const fits = (one) => one && own && one.probe === own.probe && one.layers === own.layers;
      const chosen = wanted.filter((name) => fits(all[asked.indexOf(name)]));
      const others = wanted.filter((name) => !fits(all[asked.indexOf(name)]));
      const methods = (state.methods ?? [selection.method]).filter((one) => index.methods.includes(one));
      const tables = /** @type {import("./api.js").Table[]} */ (chosen.map((name) => all[asked.indexOf(name)])).filter(
        (one) => methods.every((method) => method in one.mean),
      );
      const words = typedTokens(state.tokens).slice(0, MOST_WORDS);
      const dynamics = await Promise.all(
        tables.map((one) => runs.dynamics(one.run, one.tag, layer, methods, state.against, state.by, words)),
      );
      if (!isCurrent()) return;
      const known = tables.flatMap((one, place) => {
        const answer = dynamics[place];
        return answer ? [{ table: one, answer: onSteps(answer, one.places) }] : [];
      });
      shown = {
        selection,
        state,
        tables: known.map(({ table }) => table),
        dynamics: known.map(({ answer }) => answer),
        methods,
        words,
      };
      paintChoices(shown, wanted, offered);
      const lost = [...others, ...chosen.filter((name) => !known.some(({ table }) => table.run === name))];
      message.replaceChildren(
        ...(lost.length
          ? [
              notice(
                `${lost.length} of ${wanted.length} runs are not averaged with ${visible(run)}`,
                `They have another probe, another number of layers or no figures that can be read: ` +
                  `${shorten(lost.map(visible).join(", "), 400)}.`,
              ),
            ]
          : []),
        ...(known.length ? [] : [notice("No run is chosen", "Choose at least one run.")]),
      );
      cards.hidden = !known.length || !methods.length;
      paint();
    },
  };
}

/** Only the validations that have a step, as the table has them. */
function onSteps(answer, places) {
  const picked = (byMethod) =>
    Object.fromEntries(Object.entries(byMethod).map(([method, values]) => [method, places.map((at) => values[at] ?? null)]));
  return { ...answer, drift: picked(answer.drift), mass: picked(answer.mass) };
}

/** A scale with round ends around all that is drawn, between two limits. */
function scaleOf(drawn, least, most) {
  const values = drawn
    .flatMap(({ y, low, high }) => [...y, ...(low ?? []), ...(high ?? [])])
    .filter((value) => value !== null);
  const top = Math.max(...values, 0.02);
  const bottom = Math.min(...values, 0);
  if (least < 0) return { floor: Math.max(Math.floor(2 * bottom) / 2, -1), ceiling: 1, step: 0.5 };
  const step = [0.02, 0.05, 0.1, 0.25, 0.5].find((size) => top / size <= 4.5) ?? 0.5;
  return { floor: 0, ceiling: Math.min(Math.ceil(top / step - 1e-9) * step, most), step };
}
