/** One sentence at one validation: layers x tokens, and tokens x tokens in the last layer. */

import { createLegend } from "./chips.js";
import { html, notice, setText } from "./dom.js";
import { createGrid } from "./grid.js";
import { counted, createShare, partOf } from "./shares.js";
import { decisionOf, hasFigures, whyEmpty } from "./state.js";
import { valueAndRank, visible } from "./text.js";

const SIDE_BY_SIDE = 36; // tokens that still leave room for two maps in one row
const ROOM = 400;
const LEAST_CELL = 4;
const GREATEST_CELL = { width: 46, height: 28 };
const GREATEST_LAYER = { width: 46, height: 40 };

/** @param {import("./index.js").Context} context */
export function createMapsView({ api, update, theme, tooltip }) {
  const layersTitle = html("h2");
  const tokensTitle = html("h2");
  const message = html("div");
  const share = createShare();
  const missingLayers = html("div");
  const missingMap = html("div");
  /** @type {{selection: import("./state.js").Selection, detail: import("./api.js").Detail}|null} */
  let shown = null;

  const layersGrid = createGrid({
    label: "Map of layers by tokens",
    onHover(cell, at) {
      if (!cell || !shown) return tooltip.hide();
      const { selection, detail } = shown;
      const layer = selection.index.layers - 1 - cell.row;
      describe(at, detail.rows[selection.method][layer], cell.column, `layer ${layer + 1}`);
    },
    onPick: (row) => shown && update({ layer: shown.selection.index.layers - 1 - row }),
  });
  const tokensGrid = createGrid({
    label: "Map of tokens by tokens in the last layer",
    onHover(cell, at) {
      if (!cell || !shown) return tooltip.hide();
      const { selection, detail } = shown;
      const name = visible(selection.index.sentences[selection.sentence].tokens[cell.row]);
      describe(at, detail.rollout[selection.method][cell.row], cell.column, `share in “${name}”`);
    },
    onPick: (row) => shown && update({ token: shown.selection.token === row ? null : row }),
  });

  const layersKey = html("span", { class: "mark-key", hidden: true });
  const tokensKey = html("span", { class: "mark-key", hidden: true });
  const layersCard = html(
    "div",
    { class: "card" },
    html("div", { class: "card-head" }, layersTitle, layersKey, createLegend(theme)),
    html("p", { class: "hint" }, "What the readout is made of after each layer. A click chooses the layer."),
    missingLayers,
    layersGrid.element,
  );
  const tokensCard = html(
    "div",
    { class: "card" },
    html("div", { class: "card-head" }, tokensTitle, tokensKey, createLegend(theme)),
    html(
      "p",
      { class: "hint" },
      "What each token’s own representation is made of. A click marks the row, here and in Tokens.",
    ),
    missingMap,
    tokensGrid.element,
  );
  const cards = html("div", { class: "cards" }, layersCard, tokensCard);
  const element = html("section", { "class": "view maps-view", "aria-label": "Maps" }, share.element, message, cards);

  function describe(at, values, k, name) {
    const { selection, detail } = /** @type {NonNullable<typeof shown>} */ (shown);
    tooltip.show(
      at,
      visible(selection.index.sentences[selection.sentence].tokens[k]),
      [
        { name, value: valueAndRank(values, k) },
        { name: "saliency", value: valueAndRank(detail.saliency, k) },
      ],
      "1 is the row’s largest value.",
    );
  }

  function paint() {
    if (!shown) return;
    const { selection, detail } = shown;
    const { index, sentence, method, layer, token } = selection;
    const tokens = index.sentences[sentence].tokens.map(visible);
    const { marked: decided } = decisionOf(index, selection.validation, sentence);
    const beside = tokens.length <= SIDE_BY_SIDE;
    cards.classList.toggle("stacked", !beside);
    const width = layersCard.clientWidth - 2 * Number.parseFloat(getComputedStyle(layersCard).paddingLeft);
    const layers = detail.rows[method];
    share.say(placeOf(index, sentence), layers && detail.rows_note, detail.rollout[method] && detail.rollout_note);
    layersGrid.element.hidden = !layers;
    missingLayers.replaceChildren(...(layers ? [] : [notice("These rows were not stored", detail.rows_note ?? "")]));
    for (const key of [layersKey, tokensKey]) {
      setText(key, index.words.marked ?? "");
      key.hidden = !decided.length;
    }
    setText(layersTitle, `${method}: layers × tokens`);
    setText(tokensTitle, `${method}: tokens × tokens, layer ${index.layers}`);
    if (layers)
      layersGrid.draw({
        values: [...layers].reverse(),
        rows: layers.map((_, l) => String(layers.length - l)),
        columns: tokens,
        marked: index.layers - 1 - layer,
        decided: { rows: [], columns: decided },
        scale: theme.scale(),
        width,
        height: ROOM,
        least: LEAST_CELL,
        greatest: GREATEST_LAYER,
      });
    const map = detail.rollout[method];
    tokensGrid.element.hidden = !map;
    missingMap.replaceChildren(...(map ? [] : [notice("This map was not stored", detail.rollout_note ?? "")]));
    if (map) {
      tokensGrid.draw({
        values: map,
        rows: tokens,
        columns: tokens,
        marked: token,
        decided: { rows: decided, columns: [] },
        scale: theme.scale(),
        width,
        height: beside ? ROOM : 2 * ROOM,
        least: LEAST_CELL,
        greatest: GREATEST_CELL,
      });
    }
  }

  new ResizeObserver(() => element.isConnected && paint()).observe(element);

  return {
    element,

    /**
     * @param {import("./state.js").Selection} selection
     * @param {() => boolean} isCurrent
     */
    async show(selection, isCurrent) {
      const { run, tag, position, sentence, validation } = selection;
      const usable = hasFigures(validation);
      const detail = usable ? await api.detail(run, tag, position, sentence) : null;
      if (!isCurrent()) return;
      shown = detail ? { selection, detail } : null;
      if (!detail) share.say(placeOf(selection.index, sentence));
      cards.hidden = !usable;
      message.replaceChildren(...(usable ? [] : [notice("No figures here", whyEmpty(validation))]));
      paint();
    },
  };
}

/** Which sentence of how many this is, where not all can be chosen. */
function placeOf(index, sentence) {
  const part = partOf(index);
  return part ? `Sentence ${counted(sentence + 1)}; the first ${part} can be chosen.` : "";
}
