/** Lines with bands, markers and their names at the right end, drawn as SVG. */

import { html, svg } from "./dom.js";
import { decimal } from "./text.js";

const MARGIN = { top: 12, right: 128, bottom: 44, left: 42 };
const NAME_PITCH = 17;
const FAR = 40; // the line ends long before the chart does
const MOST_MARKERS = 26;
const TICK_SPACE = 16;
const DIGIT = 8;
const Y_STEP = 0.5;
const Y_PAD = 0.03;

/**
 * @typedef {object} Line
 * @property {string} name
 * @property {string} label at the right end and in the box at the pointer
 * @property {string} colour
 * @property {import("./colours.js").MethodStyle} style
 * @property {number[]} x ascending
 * @property {(number|null)[]} y null leaves a gap
 * @property {(number|null)[]|null} low
 * @property {(number|null)[]|null} high
 * @property {"strong"|"usual"|"quiet"} weight
 * @property {number[]} [n] of how many things each y is the mean
 * @property {boolean} [unnamed] whether it has no name at the right end
 */

/**
 * @typedef {object} ChartContent
 * @property {Line[]} lines
 * @property {string} xName
 * @property {number|null} marked the x with a vertical line
 * @property {boolean} whole whether x counts something, so that every tick is an integer
 * @property {number} width
 * @property {number} height
 * @property {number} floor the least y, a multiple of `step`
 * @property {number} [ceiling] the greatest y; 1 when left out
 * @property {number} [step] between two rules; one half when left out
 */

/**
 * @param {import("./colours.js").MethodStyle} style
 * @param {number} x
 * @param {number} y
 * @param {string} colour
 * @param {number} [size]
 * @returns {SVGElement}
 */
function marker({ marker: shape, hollow }, x, y, colour, size = 3.6) {
  const properties = { class: hollow ? "marker hollow" : "marker", stroke: colour, fill: hollow ? null : colour };
  if (shape === "circle") return svg("circle", { ...properties, cx: x, cy: y, r: size });
  const corners = {
    square: [
      [-1, -1],
      [1, -1],
      [1, 1],
      [-1, 1],
    ],
    diamond: [
      [0, -1.35],
      [1.35, 0],
      [0, 1.35],
      [-1.35, 0],
    ],
    up: [
      [0, -1.25],
      [1.2, 0.9],
      [-1.2, 0.9],
    ],
    down: [
      [0, 1.25],
      [1.2, -0.9],
      [-1.2, -0.9],
    ],
    plus: PLUS,
    // The same, turned by an eighth.
    cross: PLUS.map(([dx, dy]) => [(dx - dy) * Math.SQRT1_2, (dx + dy) * Math.SQRT1_2]),
  }[shape];
  const points = corners.map(([dx, dy]) => `${x + dx * size},${y + dy * size}`).join(" ");
  return svg("polygon", { ...properties, points });
}

/** The corners of an upright cross. */
const PLUS = [
  [-0.45, -1.25],
  [0.45, -1.25],
  [0.45, -0.45],
  [1.25, -0.45],
  [1.25, 0.45],
  [0.45, 0.45],
  [0.45, 1.25],
  [-0.45, 1.25],
  [-0.45, 0.45],
  [-1.25, 0.45],
  [-1.25, -0.45],
  [-0.45, -0.45],
];

/**
 * A short piece of a line with its marker, for legends.
 * @param {import("./colours.js").MethodStyle} style
 * @param {string} colour
 * @returns {SVGElement}
 */
export function sample(style, colour) {
  return svg(
    "svg",
    { "class": "sample", "viewBox": "0 0 28 12", "aria-hidden": "true" },
    svg("line", {
      "x1": 1,
      "y1": 6,
      "x2": 27,
      "y2": 6,
      "stroke": colour,
      "stroke-width": 2,
      "stroke-dasharray": style.dash || null,
    }),
    marker(style, 14, 6, colour),
  );
}

/** Ticks at round numbers, at most as many as there is room for. */
function ticks(low, high, most, whole) {
  if (low === high) return [low];
  const rough = (high - low) / Math.max(most, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  let size = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough) ?? 10 * power;
  if (whole) size = Math.max(Math.round(size), 1);
  const first = Math.ceil(low / size) * size;
  return Array.from({ length: Math.floor((high - first) / size + 1e-9) + 1 }, (_, i) => first + i * size);
}

/** Moves names apart that would overlap, each as near as can be to where its line ends; `wanted` is ascending. */
function apart(wanted, low, high) {
  /** @type {{sum: number, size: number}[]} */
  const blocks = [];
  const centre = ({ sum, size }) => {
    const reach = ((size - 1) / 2) * NAME_PITCH;
    return Math.min(Math.max(sum / size, low + reach), Math.max(high - reach, low + reach));
  };
  for (const y of wanted) {
    let block = { sum: y, size: 1 };
    while (blocks.length) {
      const before = blocks[blocks.length - 1];
      if (centre(block) - centre(before) >= ((block.size + before.size) / 2) * NAME_PITCH) break;
      blocks.pop();
      block = { sum: block.sum + before.sum, size: block.size + before.size };
    }
    blocks.push(block);
  }
  return blocks.flatMap((block) =>
    Array.from({ length: block.size }, (_, i) => centre(block) + (i - (block.size - 1) / 2) * NAME_PITCH),
  );
}

/**
 * @param {{label: string, tooltip: ReturnType<typeof import("./tooltip.js").createTooltip>,
 *   onPick: (x: number) => void, nameX: (x: number) => string}} options
 */
export function createLineChart({ label, tooltip, onPick, nameX }) {
  const picture = svg("svg", { "role": "img", "aria-label": label });
  const element = html("div", { class: "chart" }, picture);
  const guide = svg("line", { class: "guide" });
  /** @type {{lines: Line[], xs: number[], toX: (x: number) => number}} */
  let drawn = { lines: [], xs: [], toX: () => 0 };
  let exact = 2;

  /** @param {ChartContent} content */
  function draw({ lines, xName, marked, whole, width, height, floor, ceiling = 1, step = Y_STEP }) {
    const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
    const xs = [...new Set(lines.flatMap(({ x }) => x))].sort((a, b) => a - b);
    const [low, high] = xs.length ? [xs[0], xs[xs.length - 1]] : [0, 1];
    const pad = 0.03 * (high - low) || 0.5;
    const toX = (x) => MARGIN.left + ((x - low + pad) / (high - low + 2 * pad)) * inner.width;
    const edge = Y_PAD * (ceiling - floor);
    const within = (y) => Math.min(Math.max(y, floor - edge), ceiling + edge);
    const toY = (y) => MARGIN.top + ((ceiling + edge - within(y)) / (ceiling - floor + 2 * edge)) * inner.height;
    drawn = { lines, xs, toX };
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    Object.assign(picture.style, { width: `${width}px`, height: `${height}px` });
    picture.replaceChildren();

    const digits = String(step).split(".")[1]?.length ?? 1;
    // A small scale tells more of its values.
    exact = step < 0.05 ? digits + 1 : 2;
    const rules = Math.round((ceiling - floor) / step);
    for (const y of Array.from({ length: rules + 1 }, (_, i) => floor + i * step)) {
      picture.append(
        svg("line", {
          class: y === 0 ? "rule zero" : "rule",
          x1: MARGIN.left,
          x2: MARGIN.left + inner.width,
          y1: toY(y),
          y2: toY(y),
        }),
        svg("text", { "class": "tick", "x": MARGIN.left - 8, "y": toY(y) + 4, "text-anchor": "end" }, decimal(y, digits)),
      );
    }
    for (const x of ticks(low, high, inner.width / (TICK_SPACE + DIGIT * String(high).length), whole)) {
      picture.append(
        svg(
          "text",
          { "class": "tick", "x": toX(x), "y": height - MARGIN.bottom + 18, "text-anchor": "middle" },
          String(x),
        ),
      );
    }
    picture.append(
      svg(
        "text",
        { "class": "axis", "x": MARGIN.left + inner.width / 2, "y": height - 6, "text-anchor": "middle" },
        xName,
      ),
    );
    if (marked !== null && marked >= low && marked <= high) {
      picture.append(
        svg("line", {
          class: "marked",
          x1: toX(marked),
          x2: toX(marked),
          y1: MARGIN.top,
          y2: MARGIN.top + inner.height,
        }),
      );
    }
    const order = { quiet: 0, usual: 1, strong: 2 };
    for (const line of [...lines].sort((a, b) => order[a.weight] - order[b.weight]))
      picture.append(drawLine(line, toX, toY));
    picture.append(...drawNames(lines, toX, toY, inner), guide);
    guide.setAttribute("y1", String(MARGIN.top));
    guide.setAttribute("y2", String(MARGIN.top + inner.height));
    guide.style.display = "none";
  }

  /** @param {Line} line */
  function drawLine({ name, colour, style, x, y, low, high, weight }, toX, toY) {
    const group = svg("g", { "class": `line ${weight}`, "data-name": name });
    for (const [start, end] of stretches(y)) {
      const places = Array.from({ length: end - start }, (_, i) => start + i);
      if (low && high) {
        const banded = places.filter((i) => low[i] !== null && high[i] !== null);
        const upper = banded.map((i) => `${toX(x[i])},${toY(high[i])}`);
        const lower = banded.map((i) => `${toX(x[i])},${toY(low[i])}`).reverse();
        if (banded.length > 1)
          group.append(svg("polygon", { class: "band", points: [...upper, ...lower].join(" "), fill: colour }));
        else if (banded.length === 1) {
          const [i] = banded;
          group.append(
            svg("line", {
              class: "whisker",
              x1: toX(x[i]),
              x2: toX(x[i]),
              y1: toY(low[i]),
              y2: toY(high[i]),
              stroke: colour,
            }),
          );
        }
      }
      const points = places.map((i) => `${toX(x[i])},${toY(y[i])}`).join(" ");
      group.append(svg("polyline", { "points": points, "stroke": colour, "stroke-dasharray": style.dash || null }));
    }
    const every = Math.ceil(x.length / MOST_MARKERS);
    for (const [i, value] of y.entries()) {
      if (value !== null && (y.length - 1 - i) % every === 0)
        group.append(marker(style, toX(x[i]), toY(value), colour));
    }
    return group;
  }

  function drawNames(lines, toX, toY, inner) {
    const ends = lines
      .filter(({ unnamed }) => !unnamed)
      .map((line) => ({ line, at: line.y.findLastIndex((value) => value !== null) }))
      .filter(({ at }) => at >= 0)
      .map(({ line, at }) => ({ line, x: toX(line.x[at]), y: toY(line.y[at]), value: line.y[at] }))
      .sort((a, b) => a.y - b.y);
    const heights = apart(
      ends.map(({ y }) => y),
      MARGIN.top + 6,
      MARGIN.top + inner.height - 4,
    );
    const left = MARGIN.left + inner.width;
    return ends.map(({ line, x, y, value }, i) =>
      svg(
        "g",
        { class: `line-name ${line.weight}` },
        svg("polyline", {
          class: left - x > FAR ? "leader far" : "leader",
          points: `${x + 6},${y} ${left + 2},${y} ${left + 14},${heights[i]}`,
          stroke: line.colour,
        }),
        svg("text", { x: left + 18, y: heights[i] + 4 }, line.label),
        svg(
          "text",
          { "class": "line-value", "x": left + MARGIN.right - 2, "y": heights[i] + 4, "text-anchor": "end" },
          decimal(value, exact),
        ),
      ),
    );
  }

  function nearest(event) {
    const { xs, toX } = drawn;
    if (!xs.length) return null;
    const left = event.clientX - picture.getBoundingClientRect().left;
    return xs.reduce((best, x) => (Math.abs(toX(x) - left) < Math.abs(toX(best) - left) ? x : best), xs[0]);
  }

  picture.addEventListener("pointermove", (event) => {
    const x = nearest(event);
    if (x === null) return;
    guide.style.display = "";
    guide.setAttribute("x1", String(drawn.toX(x)));
    guide.setAttribute("x2", String(drawn.toX(x)));
    const here = drawn.lines
      .map((line) => ({ line, at: line.x.lastIndexOf(x) }))
      .filter(({ at }) => at >= 0)
      .sort((a, b) => (b.line.y[b.at] ?? -2) - (a.line.y[a.at] ?? -2));
    tooltip.show(
      { x: event.clientX, y: event.clientY },
      nameX(x),
      here.map(({ line, at }) => ({
        name: line.name,
        sample: sample(line.style, line.colour),
        value: `${decimal(line.y[at], exact)}${interval(line, at, exact)}${line.n ? `  n = ${line.n[at]}` : ""}`,
      })),
    );
  });
  picture.addEventListener("pointerleave", () => {
    guide.style.display = "none";
    tooltip.hide();
  });
  picture.addEventListener("click", (event) => {
    const x = nearest(event);
    if (x !== null) onPick(x);
  });

  return { element, draw };
}

function interval({ low, high }, at, digits) {
  const [from, to] = [low?.[at], high?.[at]];
  return from === null || from === undefined || to === null || to === undefined
    ? ""
    : `  (${decimal(from, digits)} to ${decimal(to, digits)})`;
}

/** Start and end of every stretch without gaps. */
function stretches(values) {
  /** @type {[number, number][]} */
  const found = [];
  let start = -1;
  for (let i = 0; i <= values.length; i += 1) {
    const there = i < values.length && values[i] !== null;
    if (there && start < 0) start = i;
    if (!there && start >= 0) {
      found.push([start, i]);
      start = -1;
    }
  }
  return found;
}
