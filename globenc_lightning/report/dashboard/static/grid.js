/** A grid of coloured cells with named rows and columns; hovering reads a cell, clicking picks its row. */

import { step } from "./colours.js";
import { html, svg } from "./dom.js";
import { shorten } from "./text.js";

const LABEL_SIZE = 12;
const LABEL_PITCH = 13;
const LABEL_LIMIT = 14;
const CHARACTER = 7;
// Letters as wide as they are high: CJK, full-width forms, emoji.
const WIDE = /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6\u{20000}-\u{3ffff}]|\p{Emoji_Presentation}/u;
const SLANT = 55;
const GAP = 8;

/**
 * @typedef {object} GridContent
 * @property {number[][]} values [row][column], each 0 to 1
 * @property {string[]} rows
 * @property {string[]} columns
 * @property {number|null} marked the row with a frame
 * @property {{rows: number[], columns: number[]}} decided what was decided about: rows or columns in a frame
 * @property {import("./colours.js").Scale} scale
 * @property {number} width of the room there is
 * @property {number} height of the room for the cells
 * @property {number} least side of a cell
 * @property {{width: number, height: number}} greatest
 */

/**
 * @param {string} name
 * @returns {number} pixels that it takes, about
 */
function room(name) {
  return Array.from(name).reduce((sum, letter) => sum + (WIDE.test(letter) ? LABEL_SIZE + 1 : CHARACTER), 0);
}

/**
 * @param {number[]} places in ascending order
 * @returns {[number, number][]} the first of each stretch of neighbours, and the one after its last
 */
function stretches(places) {
  /** @type {[number, number][]} */
  const found = [];
  for (const place of places) {
    const last = found[found.length - 1];
    if (last && last[1] === place) last[1] = place + 1;
    else found.push([place, place + 1]);
  }
  return found;
}

/**
 * @param {{label: string, onHover: (cell: {row: number, column: number}|null, at: {x: number, y: number}) => void,
 *   onPick: (row: number) => void}} options
 */
export function createGrid({ label, onHover, onPick }) {
  const canvas = /** @type {HTMLCanvasElement} */ (html("canvas"));
  const overlay = svg("svg", { "aria-hidden": "true" });
  const element = html("div", { "class": "grid", "role": "img", "aria-label": label }, canvas, overlay);
  const pixels = new OffscreenCanvas(1, 1);
  let layout = { left: 0, cellWidth: 1, cellHeight: 1, rows: 0, columns: 0 };
  let hover = svg("g");

  /** @param {GridContent} content */
  function draw({ values, rows, columns, marked, decided, scale, width, height, least, greatest }) {
    const rowNames = rows.map((name) => shorten(name, LABEL_LIMIT));
    const columnNames = columns.map((name) => shorten(name, LABEL_LIMIT));
    const longest = (names) => Math.max(...names.map(room));
    const below = Math.ceil(longest(columnNames) * Math.sin((SLANT * Math.PI) / 180)) + 2 * GAP;
    // A slanted name reaches to the left of its column, the first one farther than the rows' names.
    const left = Math.max(
      longest(rowNames) + GAP,
      Math.ceil(room(columnNames[0]) * 0.6) - 4,
      24,
    );
    const fit = (space, count, most) => Math.max(Math.min(space / count, most), least);
    const cellWidth = fit(width - left - GAP, columns.length, greatest.width);
    const cellHeight = fit(height, rows.length, greatest.height);
    layout = { left, cellWidth, cellHeight, rows: rows.length, columns: columns.length };

    const image = new ImageData(columns.length, rows.length);
    for (const [r, row] of values.entries()) {
      for (const [c, value] of row.entries()) {
        const at = 4 * (r * columns.length + c);
        const from = 3 * step(value);
        image.data.set([scale.bytes[from], scale.bytes[from + 1], scale.bytes[from + 2], 255], at);
      }
    }
    pixels.width = columns.length;
    pixels.height = rows.length;
    pixels.getContext("2d")?.putImageData(image, 0, 0);
    const [innerWidth, innerHeight] = [cellWidth * columns.length, cellHeight * rows.length];
    const density = window.devicePixelRatio || 1;
    canvas.width = Math.round(innerWidth * density);
    canvas.height = Math.round(innerHeight * density);
    Object.assign(canvas.style, { left: `${left}px`, width: `${innerWidth}px`, height: `${innerHeight}px` });
    const drawing = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    drawing.imageSmoothingEnabled = false;
    drawing.drawImage(pixels, 0, 0, canvas.width, canvas.height);

    const [fullWidth, fullHeight] = [left + innerWidth + GAP, innerHeight + below];
    Object.assign(element.style, { width: `${fullWidth}px`, height: `${fullHeight}px` });
    overlay.setAttribute("viewBox", `0 0 ${fullWidth} ${fullHeight}`);
    hover = svg("g", { class: "grid-hover" });
    overlay.replaceChildren(...names(rowNames, columnNames, marked, decided, innerHeight), hover);
  }

  function names(rowNames, columnNames, marked, decided, innerHeight) {
    const { left, cellWidth, cellHeight } = layout;
    const every = (size) => Math.ceil(LABEL_PITCH / size);
    /** @type {SVGElement[]} */
    const parts = [];
    for (const [r, name] of rowNames.entries()) {
      const isDecided = decided.rows.includes(r);
      if (r % every(cellHeight) && r !== marked && !isDecided) continue;
      const y = (r + 0.5) * cellHeight + LABEL_SIZE * 0.35;
      const style = `grid-name${r === marked ? " marked" : isDecided ? " decided" : ""}`;
      parts.push(svg("text", { "x": left - GAP, y, "text-anchor": "end", "class": style }, name));
    }
    for (const [c, name] of columnNames.entries()) {
      const places = [...decided.columns, ...decided.rows];
      const isDecided = places.includes(c);
      // Where columns are narrow, the neighbours' names leave room for that of the decided one.
      const stride = every(cellWidth);
      const crowded = places.some((place) => place !== c && Math.abs(place - c) < stride);
      if (!isDecided && (c % stride || crowded)) continue;
      const [x, y] = [left + (c + 0.5) * cellWidth + 3, innerHeight + GAP + 4];
      parts.push(
        svg(
          "text",
          {
            x,
            y,
            "text-anchor": "end",
            "class": `grid-name${isDecided ? " decided" : ""}`,
            "transform": `rotate(${-SLANT} ${x} ${y})`,
          },
          name,
        ),
      );
    }
    for (const [from, to] of stretches(decided.columns)) {
      const size = { width: (to - from) * cellWidth, height: innerHeight };
      parts.push(svg("rect", { class: "grid-decided", x: left + from * cellWidth, y: 0, ...size }));
    }
    for (const [from, to] of stretches(decided.rows)) {
      const size = { width: cellWidth * layout.columns, height: (to - from) * cellHeight };
      parts.push(svg("rect", { class: "grid-decided", x: left, y: from * cellHeight, ...size }));
    }
    if (marked !== null) {
      parts.push(
        svg("rect", {
          class: "grid-marked",
          x: left,
          y: marked * cellHeight,
          width: cellWidth * layout.columns,
          height: cellHeight,
        }),
      );
    }
    return parts;
  }

  function cellAt(event) {
    const box = element.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - layout.left) / layout.cellWidth);
    const row = Math.floor((event.clientY - box.top) / layout.cellHeight);
    if (row < 0 || row >= layout.rows || column >= layout.columns) return null;
    return { row, column };
  }

  element.addEventListener("pointermove", (event) => {
    const cell = cellAt(event);
    const inside = cell && cell.column >= 0 ? cell : null;
    hover.replaceChildren(
      ...(inside
        ? [
            svg("rect", {
              x: layout.left + inside.column * layout.cellWidth,
              y: inside.row * layout.cellHeight,
              width: layout.cellWidth,
              height: layout.cellHeight,
            }),
          ]
        : []),
    );
    onHover(inside, { x: event.clientX, y: event.clientY });
  });
  element.addEventListener("pointerleave", (event) => {
    hover.replaceChildren();
    onHover(null, { x: event.clientX, y: event.clientY });
  });
  element.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) onPick(cell.row);
  });

  return { element, draw };
}
