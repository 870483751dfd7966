/** What masked copies tell over the training: by how much a method's first tokens matter more than random ones. */

import { MEASURES } from "./beside.js";
import { methodStyle } from "./colours.js";
import { html, labelledSelect, setOptions, setText } from "./dom.js";
import { createLineChart } from "./line_chart.js";
import { counted } from "./shares.js";
import { decimal, shorten, visible } from "./text.js";

const LABEL_LIMIT = 12;
const STEPS = [0.1, 0.2, 0.25, 0.5, 1, 2, 2.5, 5, 10, 20, 50, 100];
const MOST_RULES = 6;
const RANDOM_STYLE = { light: "#717581", dark: "#a9adb8", marker: "circle", dash: "3 4", hollow: true };
const MEANINGS = {
  gain:
    "How much more the decision suffers when a method’s first tokens are masked than when random ones are, as a share " +
    "of what masking everything costs. 0 is no better than random; below 0 is worse.",
  sufficiency_gain:
    "How much more of the decision a method’s first tokens keep alone than random ones do, as a share of what masking " +
    "everything costs. 0 is no better than random; below 0 is worse.",
  log_odds:
    "By how much the log-odds of the decision fall when a method’s first tokens are masked. 0 is no change; random " +
    "tokens are not taken off here, so it also grows as the model grows sure.",
};

/**
 * @param {{update: import("./index.js").Context["update"], theme: import("./index.js").Context["theme"],
 *   tooltip: import("./index.js").Context["tooltip"], runs: import("./index.js").Context["runs"],
 *   onPick: (x: number) => void}} context
 */
export function createFaithfulnessCard({ update, theme, tooltip, runs, onPick }) {
  const title = html("h2", {}, "Faithfulness over the training");
  const measure = labelledSelect("Figure", (value) => update({ measure: value }));
  const hint = html("p", { class: "hint" });
  const counts = html("p", { class: "hint counts" });
  const chart = createLineChart({ label: "Faithfulness over the training", tooltip, nameX: (x) => `step ${x}`, onPick });
  const element = html(
    "div",
    { class: "card faithfulness" },
    html("div", { class: "card-head" }, title, measure.element),
    hint,
    counts,
    chart.element,
  );

  /** One run's line of one method; validations without copies are passed over, those without figures are a gap. */
  function line(index, course, method, { overlaid, prominent, several }) {
    const style = methodStyle(method);
    const run = visible(index.run);
    const places = [...index.validations.keys()].filter(
      (v) => index.masking.examples[v] !== null || index.validations[v].missing || index.validations[v].damaged,
    );
    const at = (values) => places.map((v) => values[v]);
    return {
      name: overlaid ? `${run}, ${method}` : method,
      label: !overlaid ? method : shorten(several ? `${method} ${run}` : run, LABEL_LIMIT),
      colour: overlaid ? runs.colour(index.run) : style[theme.isDark() ? "dark" : "light"],
      style,
      x: places.map((v) => index.validations[v].step),
      y: at(course.mean),
      low: at(course.low),
      high: at(course.high),
      n: at(course.n).map((n) => n ?? 0),
      weight: /** @type {"strong"|"usual"} */ (prominent ? "strong" : "usual"),
    };
  }

  return {
    element,

    /**
     * @param {{selection: import("./state.js").Selection, state: import("./state.js").State,
     *   others: import("./api.js").Index[]}} scene
     * @param {string[]} drawn the methods that are drawn
     * @param {{width: number, height: number}} size
     */
    paint({ selection, state, others }, drawn, size) {
      const { index, method, position, validation } = selection;
      const { masking } = index;
      if (!masking) return;
      const names = Object.keys(masking.measures);
      const chosen = names.includes(state.measure) ? state.measure : names[0];
      setOptions(measure.select, names.map((value) => ({ value, label: MEASURES[value] })), chosen);
      const all = [index, ...others].filter((one) => one.masking?.measures[chosen]);
      const overlaid = others.length > 0;
      const lines = all.flatMap((one) => {
        const methods = drawn.filter((name) => one.masking?.measures[chosen][name]);
        return methods.map((name) =>
          line(one, one.masking?.measures[chosen][name], name, {
            overlaid,
            prominent: overlaid ? one === index : name === method,
            several: methods.length > 1,
          }),
        );
      });
      const xs = [...new Set(lines.flatMap(({ x }) => x))].sort((a, b) => a - b);
      const random = {
        name: "random tokens",
        label: "random",
        colour: RANDOM_STYLE[theme.isDark() ? "dark" : "light"],
        style: RANDOM_STYLE,
        x: xs,
        y: xs.map(() => 0),
        low: null,
        high: null,
        weight: /** @type {"usual"} */ ("usual"),
        level: true,
      };
      const compared = chosen !== "log_odds" && lines.length > 0;
      setText(hint, MEANINGS[chosen]);
      setText(counts, countsOf(masking, chosen, method, position, validation, drawn));
      chart.draw({
        lines: compared ? [...lines, random] : lines,
        xName: "training step",
        marked: validation.step,
        whole: true,
        ...size,
        ...scaleOf(lines),
      });
    },
  };
}

/** Of how many sentences the mean is at the chosen validation, and how many are left out of it. */
function countsOf(masking, measure, method, position, validation, drawn) {
  const { methods, unit, score } = masking;
  const by = score || (unit === "value" ? "the value itself" : "");
  const absent = drawn.filter((name) => !methods.includes(name));
  const without = absent.length ? ` Not asked for: ${absent.join(", ")}.` : "";
  if (!methods.includes(method)) return `Bands: 95 % interval of the mean.${without}`;
  const course = masking.measures[measure][method];
  const examples = masking.examples[position];
  if (examples === null) return `Not measured at step ${validation.step}. Bands: 95 % interval of the mean.${without}`;
  const n = course.n[position] ?? 0;
  const left = examples - n;
  const value = course.mean[position] ?? null;
  const ends = [course.low[position] ?? null, course.high[position] ?? null];
  const interval = ends[0] === null ? "" : ` (95 % interval ${decimal(ends[0])} to ${decimal(ends[1])})`;
  const said = value === null ? "no mean" : `${decimal(value)}${interval}`;
  return (
    `${method} at step ${validation.step}: ${said}, mean over ${counted(n)} of ${counted(examples)} sentences` +
    `${left ? `; ${counted(left)} left out, where masking everything costs too little` : "; none is left out"}.` +
    `${by ? ` Copies are compared by: ${visible(by)}.` : ""}${without}`
  );
}

/** Round numbers around all that is drawn, zero among them, so that the scale stands still while the slider moves. */
export function scaleOf(lines) {
  const values = lines.flatMap(({ y, low, high }) => [...y, ...(low ?? []), ...(high ?? [])]);
  const known = values.filter((value) => value !== null && value !== undefined);
  const [least, most] = [Math.min(0, ...known), Math.max(0, ...known)];
  const reach = Math.max(most - least, STEPS[0]);
  const step = STEPS.find((one) => reach / one <= MOST_RULES) ?? reach / MOST_RULES;
  const floor = Math.floor(least / step) * step;
  return { floor, ceiling: Math.max(Math.ceil(most / step) * step, floor + step), step };
}
