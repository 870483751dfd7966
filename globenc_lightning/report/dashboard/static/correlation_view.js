/**
 * Spearman's rho with the saliency, or another reference: through the layers at one validation, and over the training
 * at one layer; beside it, where it was asked for, what masked copies tell.
 */

import { titleOf } from "./beside.js";
import { methodStyle } from "./colours.js";
import { html, labelledSelect, notice, replaceButtons, setOptions, setText } from "./dom.js";
import { createFaithfulnessCard } from "./faithfulness_card.js";
import { createLineChart, sample } from "./line_chart.js";
import { counted, createShare, partOf } from "./shares.js";
import { hasFigures, SALIENCY, whyEmpty } from "./state.js";
import { shorten, visible } from "./text.js";

const HEIGHT = 400;
const LABEL_LIMIT = 12;
const SENTENCE_STYLE = { marker: "circle", dash: "1 4", hollow: true };

/**
 * What is on the page: besides the selection the other runs' data, and the sentence's own rho if it is asked for.
 * @typedef {{selection: import("./state.js").Selection, state: import("./state.js").State,
 *   others: import("./api.js").Index[], curve: Record<string, (number|null)[][]>|null}} Scene
 */

/** @param {import("./index.js").Context} context */
export function createCorrelationView({ api, update, theme, tooltip, runs }) {
  const message = html("div");
  const share = createShare();
  const methodChips = html("div", { "class": "toggles", "role": "group", "aria-label": "Methods that are drawn" });
  const runChips = html("div", { "class": "toggles", "role": "group", "aria-label": "Runs that are drawn" });
  const runRow = html("div", { class: "toggle-row" }, html("span", { class: "field-name" }, "Runs"), runChips);
  const curveBox = /** @type {HTMLInputElement} */ (
    html("input", { type: "checkbox", on: { change: () => update({ curve: curveBox.checked }) } })
  );
  const curveName = html("span");
  const reference = labelledSelect("Correlated with", (value) =>
    update({ reference: value === SALIENCY ? null : value }),
  );
  const layersTitle = html("h2");
  const trainingTitle = html("h2");
  const layersHint = html("p", { class: "hint" });
  const trainingHint = html("p", { class: "hint" }, "A click goes to that validation.");
  /** @type {Scene|null} */
  let shown = null;

  function toStep(x) {
    const validation = shown?.selection.index.validations.findLast(({ step }) => step === x);
    if (validation) update({ validation: validation.ordinal });
  }

  const layersChart = createLineChart({
    label: "Correlation by layer",
    tooltip,
    nameX: (x) => `layer ${x}`,
    onPick: (x) => update({ layer: x - 1 }),
  });
  const trainingChart = createLineChart({
    label: "Correlation over the training",
    tooltip,
    nameX: (x) => `step ${x}`,
    onPick: toStep,
  });
  const faithfulness = createFaithfulnessCard({ update, theme, tooltip, runs, onPick: toStep });
  const layersCard = html("div", { class: "card" }, layersTitle, layersHint, layersChart.element);
  const trainingCard = html("div", { class: "card" }, trainingTitle, trainingHint, trainingChart.element);
  const cards = html("div", { class: "cards" }, layersCard, trainingCard);
  const element = html(
    "section",
    { "class": "view correlation-view", "aria-label": "Correlation" },
    html(
      "div",
      { class: "card slim" },
      html(
        "div",
        { class: "toggle-row" },
        html("span", { class: "field-name" }, "Methods"),
        methodChips,
        reference.element,
        html("label", { class: "check" }, curveBox, curveName),
      ),
      runRow,
    ),
    share.element,
    message,
    cards,
  );

  /** The figures of the masked copies stand beside rho over the training. */
  function arrange(withFaithfulness) {
    const wanted = withFaithfulness ? [trainingCard, faithfulness.element, layersCard] : [layersCard, trainingCard];
    cards.classList.toggle("even", withFaithfulness);
    if (wanted.length !== cards.children.length) cards.replaceChildren(...wanted);
  }

  function toggle(text, pressed, mark, press, fixed = false) {
    return html(
      "button",
      {
        "class": "toggle",
        "type": "button",
        "aria-pressed": String(pressed),
        "disabled": fixed,
        "on": { click: press },
      },
      mark,
      text,
    );
  }

  function drawnMethods({ state, selection }) {
    const { methods } = selection.index;
    return (
      state.methods?.filter((method) => methods.includes(method)) ??
      (state.overlay.length ? [selection.method] : methods)
    );
  }

  /** @param {Scene} scene */
  function paintToggles(scene) {
    const { selection, state } = scene;
    const { index, run } = selection;
    const drawn = drawnMethods(scene);
    const dark = theme.isDark();
    replaceButtons(
      methodChips,
      ...index.methods.map((method) =>
        toggle(
          method,
          drawn.includes(method),
          sample(methodStyle(method), methodStyle(method)[dark ? "dark" : "light"]),
          () =>
            update({
              methods: index.methods.filter((other) => drawn.includes(other) !== (other === method)),
            }),
        ),
      ),
    );
    const names = runs.names().filter((name) => name === run || state.overlay.includes(name) || runs.isShown(name));
    runRow.hidden = runs.names().length < 2;
    const hidden = runs.names().length - names.length;
    replaceButtons(
      runChips,
      ...names.map((name) =>
        toggle(
          visible(name),
          name === run || state.overlay.includes(name),
          dot(runs.colour(name)),
          () =>
            update({
              overlay: state.overlay.includes(name)
                ? state.overlay.filter((other) => other !== name)
                : [...state.overlay, name],
            }),
          name === run,
        ),
      ),
      ...(hidden ? [html("span", { class: "hint" }, `${hidden} more hidden by TensorBoard’s run filter`)] : []),
    );
    const offered = [SALIENCY, ...index.references];
    reference.element.hidden = offered.length < 2;
    setOptions(reference.select, offered.map((value) => ({ value, label: titleOf(value) })), selection.reference);
    curveBox.checked = state.curve;
    setText(curveName, `Sentence ${selection.sentence + 1} against the mean of ${selection.method}`);
  }

  /**
   * One line for each method and run.
   * @param {Scene} scene
   * @param {(index: import("./api.js").Index) => number[]} xOf
   * @param {(rows: (number|null)[][], index: import("./api.js").Index) => (number|null)[]} pick
   */
  function lines(scene, xOf, pick) {
    const { selection, state, others } = scene;
    const overlaid = others.length > 0;
    const drawn = drawnMethods(scene);
    return [selection.index, ...others].flatMap((index) =>
      drawn
        .filter((method) => curvesOf(index, selection.reference)?.[method])
        .map((method) => {
          const style = methodStyle(method);
          const curves = curvesOf(index, selection.reference)[method];
          const run = visible(index.run);
          const prominent = overlaid ? index === selection.index : method === selection.method;
          return {
            name: overlaid ? `${run}, ${method}` : method,
            label: !overlaid ? method : shorten(drawn.length > 1 ? `${method} ${run}` : run, LABEL_LIMIT),
            colour: overlaid ? runs.colour(index.run) : style[theme.isDark() ? "dark" : "light"],
            style,
            x: xOf(index),
            y: pick(curves.mean, index),
            low: pick(curves.low, index),
            high: pick(curves.high, index),
            weight: /** @type {"strong"|"usual"|"quiet"} */ (prominent ? "strong" : state.curve ? "quiet" : "usual"),
          };
        }),
    );
  }

  /** @returns {import("./line_chart.js").Line[]} the sentence's own line, if it is asked for */
  function sentenceLine({ selection, curve }, x, pick) {
    const rho = curve?.[selection.method];
    if (!rho) return [];
    const colour = theme.isDark() ? "#ffffff" : "#101418";
    return [
      {
        name: `sentence ${selection.sentence + 1}, ${selection.method}`,
        label: `sentence ${selection.sentence + 1}`,
        colour,
        style: { ...SENTENCE_STYLE, light: colour, dark: colour },
        x,
        y: pick(rho),
        low: null,
        high: null,
        weight: "strong",
      },
    ];
  }

  function paint() {
    if (!shown) return;
    arrange(Boolean(shown.selection.index.masking));
    if (layersCard.clientWidth === 0) return;
    const { selection } = shown;
    const { index, method, layer, validation, position } = selection;
    paintToggles(shown);
    const width = layersCard.clientWidth - 2 * Number.parseFloat(getComputedStyle(layersCard).paddingLeft);
    const usable = hasFigures(validation);
    const all = index.examples;
    const part = partOf(index);
    share.say(part ? `Means are of all ${counted(all)} sentences; the first ${part} can be drawn on their own.` : "");
    const curves = curvesOf(index, selection.reference);
    const absent = usable && curves[method].n[position] === null;
    const undefinedCount = all - (curves[method].n[position]?.[layer] ?? 0);
    const withWhat = index.references.length ? ` with ${titleOf(selection.reference)}` : "";
    setText(layersTitle, `${withWhat ? `ρ${withWhat} by` : "By"} layer, at step ${validation.step}`);
    setText(
      layersHint,
      !usable
        ? whyEmpty(validation)
        : absent
        ? `${titleOf(selection.reference)} was not computed at this validation.`
        : `Mean over ${counted(all)} sentences, bands: 95 % interval of the mean. ${method}, layer ${layer + 1}: ` +
            (undefinedCount ? `${undefinedCount} undefined.` : "no ρ is undefined."),
    );
    setText(trainingTitle, `${withWhat ? `ρ${withWhat} over` : "Over"} the training, layer ${layer + 1}`);

    const floor = floorOf(shown, drawnMethods(shown));
    const numbers = Array.from({ length: index.layers }, (_, l) => l + 1);
    const row = (rows, at, layers) => rows[at] ?? Array.from({ length: layers }, () => null);
    layersChart.draw({
      lines: [
        ...lines(
          shown,
          ({ layers }) => Array.from({ length: layers }, (_, l) => l + 1),
          (rows, of) => row(rows, of === index ? position : atStep(of, validation.step), of.layers),
        ),
        ...sentenceLine(shown, numbers, (rho) => row(rho, position, index.layers)),
      ],
      xName: "layer",
      marked: layer + 1,
      whole: true,
      width,
      height: HEIGHT,
      floor,
    });
    const stepsOf = (of) => of.validations.map(({ step }) => step);
    trainingChart.draw({
      lines: [
        ...lines(shown, stepsOf, (rows, of) =>
          of.validations.map((_, v) => rows[v]?.[Math.min(layer, of.layers - 1)] ?? null),
        ),
        ...sentenceLine(shown, stepsOf(index), (rho) => rho.map((row) => row?.[layer] ?? null)),
      ],
      xName: "training step",
      marked: validation.step,
      whole: true,
      width,
      height: HEIGHT,
      floor,
    });
    faithfulness.paint(shown, drawnMethods(shown), { width, height: HEIGHT });
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
      const { run, tag, index, sentence, reference: compared } = selection;
      const [others, curve] = await Promise.all([
        Promise.all(state.overlay.filter((name) => name !== run).map((name) => runs.index(name, tag))),
        state.curve ? api.sentence(run, tag, sentence, index.validations.at(-1)?.wall_time, { reference: compared }) : null,
      ]);
      if (!isCurrent()) return;
      shown = { selection, state, others: others.filter((other) => other !== null), curve: curve?.rho ?? null };
      const lost = others.length - shown.others.length;
      message.replaceChildren(
        ...(lost ? [notice("Some runs are not drawn", "They hold no GlobEnc figures that can be read.")] : []),
      );
      paint();
    },
  };
}

/** A run's correlations with a reference, by method; undefined where it has none. */
function curvesOf(index, reference) {
  return reference === SALIENCY ? index.correlation : index.reference_correlation[reference];
}

/** The validation of another run at a step, or the last one before it. */
function atStep(index, step) {
  return Math.max(
    index.validations.findLastIndex((validation) => validation.step <= step),
    0,
  );
}

/** The round number below all that these runs ever show, so that the scale stands still while the slider moves. */
function floorOf({ selection, others, curve }, methods) {
  const tables = [selection.index, ...others].flatMap((index) => {
    const curves = curvesOf(index, selection.reference) ?? {};
    return methods
      .filter((method) => method in curves)
      .flatMap((method) => [curves[method].mean, curves[method].low]);
  });
  const all = [...tables, ...(curve ? [curve[selection.method]] : [])].flat(2);
  const least = all.reduce((low, value) => (value !== null && value < low ? value : low), 0);
  return Math.max(Math.floor(2 * least) / 2, -1);
}

/**
 * @param {string} colour
 * @returns {HTMLElement}
 */
export function dot(colour) {
  const element = html("span", { "class": "dot", "aria-hidden": "true" });
  element.style.background = colour;
  return element;
}
