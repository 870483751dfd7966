/** Coloured tokens, and the scale that explains them. */

import { step } from "./colours.js";
import { html } from "./dom.js";
import { visible } from "./text.js";

const UNBROKEN = 20; // characters

/**
 * A sentence's tokens as chips in reading order, right to left where the sentence is.
 * @param {import("./api.js").Sentence} sentence
 * @param {string} label what the chips show, for those who cannot see them
 * @returns {{element: HTMLElement, chips: HTMLElement[],
 *   paint: (values: number[]|null, scale: import("./colours.js").Scale) => void}}
 */
export function createChips(sentence, label) {
  const chips = sentence.tokens.map((token, k) => {
    const text = visible(token);
    // The mark of a space must not part from its word at the end of a line; what is longer than a line must be broken.
    const length = Array.from(text).length <= UNBROKEN ? "chip short" : "chip";
    // A direction of their own keeps special tokens from deciding the sentence's.
    return html(
      "span",
      {
        "class": sentence.special[k] ? `${length} special` : length,
        "dir": sentence.special[k] ? "ltr" : null,
        "data-k": k,
      },
      text,
    );
  });
  const element = html("p", { "class": "chips", "dir": "auto", "role": "group", "aria-label": label });
  for (const chip of chips) element.append(chip, " ");
  return {
    element,
    chips,
    paint(values, scale) {
      element.classList.toggle("empty", values === null);
      for (const [k, chip] of chips.entries()) {
        const shade = values ? scale.shades[step(values[k])] : null;
        chip.style.backgroundColor = shade ? shade.background : "";
        chip.style.color = shade ? shade.ink : "";
      }
    },
  };
}

/**
 * @param {import("./index.js").Context["theme"]} theme
 * @returns {HTMLElement}
 */
export function createLegend(theme) {
  const bar = html("span", { class: "scale-bar" });
  theme.onChange(() => bar.style.setProperty("background", theme.scale().gradient));
  return html(
    "div",
    { "class": "legend", "role": "img", "aria-label": "Colour scale from 0 to the largest value of a row" },
    html("span", {}, "0"),
    bar,
    html("span", {}, "row’s largest"),
  );
}
