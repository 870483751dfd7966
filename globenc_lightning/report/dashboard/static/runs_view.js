/** Many runs at once: correlation, drift and the share of chosen tokens, as means over runs with bands over runs. */

import { average, typedTokens, whyApart } from "./aggregate.js";
import { methodStyle } from "./colours.js";
import { dot } from "./correlation_view.js";
import { html, labelledSelect, notice, replaceButtons, setOptions, setText } from "./dom.js";
import { createLineChart, sample } from "./line_chart.js";
import { counted } from "./shares.js";
import { decimal, shorten, visible } from "./text.js";

const HEIGHT = 340;
const REASON_LIMIT = 400;
const SMALLEST = 0.005;
const STEPS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5];
const MOST_RULES = 5;
const TYPING_MS = 350;
const SOON_MS = 150; // what comes as soon as this is not announced
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
 *   tables: import("./api.js").Table[], dynamics: (import("./api.js").Dynamics|null)[]|null, methods: string[],
 *   words: string[], alone: import("./api.js").Index|null}} Scene the dynamics are null while they are read, and null
 *   for a run whose attributions cannot be read; alone is the index of a single run
 */

/** @param {import("./index.js").Context} context */
export function createRunsView({ api, update, theme, tooltip, runs }) {
  const message = html("div");
  const methodChips = html("div", { "class": "toggles", "role": "group", "aria-label": "Methods that are drawn" });
  const runChips = html("div", { "class": "toggles", "role": "group", "aria-label": "Runs that are averaged" });
  const singleBox = /** @type {HTMLInputElement} */ (
    html("input", { type: "checkbox", on: { change: () => update({ single: singleBox.checked }) } })
  );
  const singleName = html("span");
  const nearBox = /** @type {HTMLInputElement} */ (
    html("input", { type: "checkbox", on: { change: () => update({ near: nearBox.checked }) } })
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
    const head = html("div", { class: "card-head" }, title);
    const hint = html("p", { class: "hint" });
    const chart = createLineChart({ label, tooltip, nameX, onPick });
    const rows = controls.length ? [html("div", { class: "toggle-row" }, ...controls)] : [];
    const element = html("div", { class: "card" }, head, ...rows, hint, chart.element);
    return { element, title, hint, chart };
  }

  /** @type {Scene|null} */
  let shown = null;
  /** @type {{of: any[], value: number}} */
  let floor = { of: [], value: 0 };
  const toStep = (x) => {
    const validation = shown?.selection.index.validations.findLast(({ step }) => step <= x);
    if (validation) update({ validation: validation.ordinal });
  };
  const nameStep = (x) => `step ${x}`;
  const training = createCard("Correlation over the training, mean over runs", nameStep, toStep);
  const layers = createCard("Correlation by layer, mean over runs", (x) => `layer ${x}`, (x) => update({ layer: x - 1 }));
  const near = html("label", { class: "check" }, nearBox, "Close up");
  const drift = createCard("Drift over the training, mean over runs", nameStep, toStep, against.element, by.element);
  drift.title.after(near);
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
        html("label", { class: "check" }, singleBox, singleName),
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
    replaceButtons(
      methodChips,
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
    replaceButtons(
      runChips,
      ...offered.map((name) =>
        toggle(visible(name), chosen.includes(name), dot(runs.colour(name)), () =>
          update({ runs: flipped(chosen, name) }),
        ),
      ),
      ...(hidden > 0 ? [html("span", { class: "hint" }, `${hidden} more hidden by TensorBoard’s run filter`)] : []),
    );
    everyRun.hidden = state.runs === null;
    singleBox.checked = state.single;
    setText(singleName, `Single runs of ${prominent({ methods, selection })}`);
    nearBox.checked = state.near;
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
   * @param {(method: string, place: number) => import("./aggregate.js").Curve} curve of the run at a place
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
      if (!state.single || !several || method !== prominent({ methods, selection })) return [whole];
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

  /** @param {Scene} scene */
  function knownFloor(scene) {
    const of = [scene.alone, ...scene.methods, ...scene.tables];
    if (of.length !== floor.of.length || of.some((one, i) => one !== floor.of[i])) floor = { of, value: floorOf(scene) };
    return floor.value;
  }

  /** @param {Map<string, string[]>} apart @param {number} count @param {string} run */
  function paintApart(apart, count, run) {
    const lost = [...apart.values()].flat().length;
    const reasons = [...apart].map(
      ([reason, names]) => `${shorten(names.map(visible).join(", "), REASON_LIMIT)}: ${reason}.`,
    );
    message.replaceChildren(
      ...(lost ? [notice(`${lost} of ${count} runs are not averaged with ${visible(run)}`, ...reasons)] : []),
    );
  }

  function paint() {
    if (!shown || training.element.clientWidth === 0) return;
    const { selection, state, tables, dynamics, words, methods, alone } = shown;
    const { layer, validation } = selection;
    const width =
      training.element.clientWidth - 2 * Number.parseFloat(getComputedStyle(training.element).paddingLeft);
    const size = { width, height: HEIGHT, whole: true };
    const steps = { xName: "training step", marked: validation.step };
    const over =
      tables.length > 1
        ? `Mean over ${tables.length} runs; band: ± 1 standard deviation over runs.`
        : `One run, so no band over runs: the band is the 95 % interval of the mean over its ` +
          `${counted(tables[0]?.examples ?? 0)} sentences.`;
    const ends = (method, place, l) => {
      const of = alone?.correlation[method];
      return of ? { low: of.low[place]?.[l] ?? null, high: of.high[place]?.[l] ?? null } : { low: null, high: null };
    };
    const banded = (x, y, all) => ({ x, y, low: all.map(({ low }) => low), high: all.map(({ high }) => high) });
    const least = knownFloor(shown);

    const correlation = lines(shown, (method, place) =>
      banded(
        tables[place].steps,
        tables[place].mean[method].map((row) => row?.[layer] ?? null),
        tables[place].places.map((at) => ends(method, at, layer)),
      ),
    );
    setText(training.title, `Correlation over the training, layer ${layer + 1}`);
    setText(training.hint, over);
    training.chart.draw({ lines: correlation, ...steps, ...size, floor: least });

    for (const { element: card } of [drift, mass]) card.classList.toggle("waiting", dynamics === null);
    const reads = "The attributions of these runs are being read …";
    // Of a run whose attributions cannot be read there are correlations alone.
    const read = tables.map((table, place) => ({ table, answer: dynamics?.[place] ?? null }));
    const readable = read.filter(({ answer }) => answer !== null);
    const unread = dynamics === null ? 0 : tables.length - readable.length;
    const besides = unread ? ` The attributions of ${unread} of ${tables.length} runs cannot be read.` : "";
    const answers = /** @type {import("./api.js").Dynamics[]} */ (readable.map(({ answer }) => answer));
    const readScene = { ...shown, tables: readable.map(({ table }) => table) };
    const bandName = answers.length > 1 ? " Band: ± 1 standard deviation over runs." : " One run, so no band.";
    const moved = lines(readScene, (method, place) => ({
      x: readScene.tables[place].steps,
      y: answers[place].drift[method],
    }));
    const part = partsOf(readScene.tables);
    const averaged = part || "sentences";
    const lacking = lackingOf(methods, readScene.tables, answers);
    const chance = answers[0]?.chance ?? null;
    const far = state.near && chance !== null;
    setText(drift.title, `Drift, layer ${layer + 1}`);
    setText(
      drift.hint,
      dynamics === null
        ? reads
        : `How far a sentence’s row is from that of ${AGAINST[state.against]}: mean over ${averaged}, special tokens ` +
            `left out.${lacking}${bandName} ` +
            (far ? `Chance, shuffled tokens: ${decimal(chance)}, not drawn here.` : "Dotted: chance, shuffled tokens.") +
            besides,
    );
    const withChance = far ? moved : [...moved, ...chanceLine(chance, moved)];
    drift.chart.draw({ lines: withChance, ...steps, ...size, ...scaleOf(withChance, 2) });

    const numbers = Array.from({ length: selection.index.layers }, (_, l) => l + 1);
    const at = tables.map(({ steps: there }) => there.lastIndexOf(validation.step));
    const layered = lines(shown, (method, place) =>
      banded(
        numbers,
        numbers.map((_, l) => tables[place].mean[method][at[place]]?.[l] ?? null),
        numbers.map((_, l) => ends(method, tables[place].places[at[place]], l)),
      ),
    );
    const without = at.filter((place) => place < 0).length;
    setText(layers.title, `Correlation by layer, at step ${validation.step}`);
    setText(layers.hint, without ? `${over} ${without} of them have no validation at this step.` : over);
    layers.chart.draw({
      lines: layered,
      xName: "layer",
      marked: layer + 1,
      ...size,
      floor: least,
    });

    const shares = lines(readScene, (method, place) => ({
      x: readScene.tables[place].steps,
      y: answers[place].mass[method],
    }));
    const counts = answers[0]?.chosen ?? [];
    const found = counts.reduce((sum, one) => sum + one, 0);
    const among = part ? averaged : `${counted(counts.length)} sentences`;
    setText(mass.title, `Share of chosen tokens, layer ${layer + 1}`);
    setText(
      mass.hint,
      words.length && dynamics === null
        ? reads
        : words.length
        ? `${counted(found)} tokens in ${counts.filter((one) => one).length} of ${among}: their share of the ` +
            `attribution of ${methods.length === 1 ? methods[0] : "each method"}, mean over ` +
            `${part ? "these" : "all"} sentences.${lacking}${bandName}${besides}`
        : "Type tokens or whole words, parted by spaces or commas, or choose a set.",
    );
    mass.chart.element.hidden = !words.length;
    mass.chart.draw({ lines: shares, ...steps, ...size, ...scaleOf(shares, 1) });
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
        weight: "usual",
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
      const methods = (state.methods ?? [selection.method]).filter((one) => index.methods.includes(one));
      /** @type {Map<string, string[]>} reason -> runs */
      const apart = new Map();
      const tables = wanted.flatMap((name) => {
        const table = all[asked.indexOf(name)];
        const reason = whyApart(table, all[0], methods);
        if (reason) apart.set(reason, [...(apart.get(reason) ?? []), name]);
        return table && !reason ? [table] : [];
      });
      const words = typedTokens(state.tokens).slice(0, MOST_WORDS);
      const alone = tables.length === 1 ? await runs.index(tables[0].run, tag) : null;
      const asking = Promise.all(
        tables.map((one) => runs.dynamics(one.run, one.tag, layer, methods, state.against, state.by, words)),
      );
      /** @param {(import("./api.js").Dynamics|null)[]|null} answers */
      function draw(answers) {
        const dynamics =
          answers && tables.map((one, place) => (answers[place] ? onSteps(answers[place], one.places) : null));
        shown = { selection, state, tables, dynamics, methods, words, alone };
        paintChoices(shown, wanted, offered);
        paintApart(apart, wanted.length, run);
        if (!tables.length) message.append(notice("No run is drawn", "Choose at least one run of this probe."));
        cards.hidden = !tables.length || !methods.length;
        paint();
      }
      // Attributions take longer to read than correlations.
      const early = await Promise.race([asking, new Promise((resolve) => window.setTimeout(resolve, SOON_MS, null))]);
      if (!isCurrent()) return;
      draw(early);
      if (early) return;
      const answers = await asking;
      if (isCurrent()) draw(answers);
    },
  };
}

/** Only the validations that have a step, as the table has them. */
function onSteps(answer, places) {
  const picked = (byMethod) =>
    Object.fromEntries(Object.entries(byMethod).map(([method, values]) => [method, places.map((at) => values[at] ?? null)]));
  return { ...answer, drift: picked(answer.drift), mass: picked(answer.mass) };
}

/** A scale from 0 to a round number above all that is drawn. */
function scaleOf(drawn, most) {
  let top = SMALLEST;
  for (const { y, high } of drawn) for (const value of [...y, ...(high ?? [])]) top = Math.max(top, value ?? 0);
  const step = STEPS.find((size) => top / size <= MOST_RULES) ?? 0.5;
  return { floor: 0, ceiling: Math.min(Math.ceil(top / step - 1e-9) * step, most), step };
}

/**
 * The round number below all that these runs ever show, bands included, so that the scale stands still while the slider
 * moves.
 * @param {Scene} scene
 */
function floorOf({ tables, methods, alone }) {
  let least = 0;
  const note = (values) => {
    for (const value of values ?? []) least = Math.min(least, value ?? 0);
  };
  for (const method of methods) {
    for (const row of alone?.correlation[method].low ?? []) note(row);
    for (let l = 0; l < (tables[0]?.layers ?? 0); l += 1) {
      const { mean, low } = average(
        tables.map((table) => ({ x: table.steps, y: table.mean[method].map((row) => row?.[l] ?? null) })),
      );
      note(mean);
      note(low);
    }
    for (const table of tables) for (const row of table.mean[method]) note(row);
  }
  return Math.max(Math.floor(2 * least) / 2, -1);
}

/** The method whose line stands out. */
function prominent({ methods, selection }) {
  return methods.includes(selection.method) ? selection.method : (methods[0] ?? selection.method);
}

/** Which sentences the attributions are of, where they are not of all. @param {import("./api.js").Table[]} tables */
function partsOf(tables) {
  const shown = tables.map((table) => table.shown);
  const [least, most, all] = [Math.min(...shown), Math.max(...shown), tables[0]?.examples ?? 0];
  if (!tables.length || least >= all) return "";
  return `the first ${least === most ? counted(most) : `${counted(least)} to ${counted(most)}`} of ${counted(all)} sentences`;
}

/**
 * Which methods’ rows are stored of fewer sentences than are shown.
 * @param {string[]} methods
 * @param {import("./api.js").Table[]} tables
 * @param {import("./api.js").Dynamics[]} answers of the same runs
 */
export function lackingOf(methods, tables, answers) {
  const fewer = methods.flatMap((method) => {
    const of = answers.map(({ sentences }, place) => ({ count: sentences[method] ?? 0, shown: tables[place].shown }));
    const lacking = of.filter(({ count, shown }) => count < shown);
    if (!lacking.length) return [];
    const least = lacking.reduce((one, other) => (other.count * one.shown < one.count * other.shown ? other : one));
    return [`${method} is stored for ${counted(least.count)} of ${counted(least.shown)} of them`];
  });
  return fewer.length ? ` ${fewer.join("; ")}.` : "";
}
