/**
 * Colours: the scale of all attributions, the methods' and the runs' own.
 *
 * The scale runs through OKLab: lightness in equal steps, the hue along a quadratic Bézier curve. So equal differences
 * of a value look equally large, and lightness alone tells the order, whichever hues an eye can tell apart.
 */

const SCALES = {
  light: { lightness: [0.975, 0.32], chroma: [0.006, 0.16, 0.13], hue: [240, 245, 280] },
  dark: { lightness: [0.34, 0.94], chroma: [0.008, 0.18, 0.04], hue: [270, 258, 215] },
};
const STEPS = 256;
// Both ends are as light as each other: the hue tells the sign, and never alone, see beside.js.
const TWO_SIDED = {
  light: { lightness: [0.975, 0.5], chroma: 0.15, hues: [262, 48] },
  dark: { lightness: [0.34, 0.8], chroma: 0.14, hues: [255, 62] },
};
const HALF = 128; // steps on either side of zero

/** @typedef {{background: string, ink: string}} Shade */
/** @typedef {{shades: Shade[], bytes: Uint8ClampedArray, gradient: string}} Scale */

/** @type {Map<boolean, Scale>} */
const scales = new Map();

/**
 * @param {boolean} dark from dark to light, for a dark page; else from light to dark
 * @returns {Scale}
 */
export function scale(dark) {
  const known = scales.get(dark);
  if (known) return known;
  const { lightness, chroma, hue } = SCALES[dark ? "dark" : "light"];
  const corners = chroma.map((c, i) => [
    c * Math.cos((hue[i] * Math.PI) / 180),
    c * Math.sin((hue[i] * Math.PI) / 180),
  ]);
  const bytes = new Uint8ClampedArray(STEPS * 3);
  const shades = Array.from({ length: STEPS }, (_, step) => {
    const t = step / (STEPS - 1);
    const [a, b] = [0, 1].map(
      (axis) => (1 - t) ** 2 * corners[0][axis] + 2 * t * (1 - t) * corners[1][axis] + t ** 2 * corners[2][axis],
    );
    const linear = fromOklab(lightness[0] + (lightness[1] - lightness[0]) * t, a, b);
    const rgb = linear.map((channel) => Math.round(255 * encoded(channel)));
    bytes.set(rgb, 3 * step);
    return { background: `rgb(${rgb.join(", ")})`, ink: inkOn(linear) };
  });
  const stops = [0, 32, 64, 96, 128, 160, 192, 224, 255].map((step) => shades[step].background);
  const made = { shades, bytes, gradient: `linear-gradient(to right, ${stops.join(", ")})` };
  scales.set(dark, made);
  return made;
}

/** @type {Map<boolean, Scale>} */
const twoSided = new Map();

/**
 * The scale of signed scores: what speaks against on the left, what speaks for on the right, nothing in the middle.
 * @param {boolean} dark
 * @returns {Scale}
 */
export function signedScale(dark) {
  const known = twoSided.get(dark);
  if (known) return known;
  const { lightness, chroma, hues } = TWO_SIDED[dark ? "dark" : "light"];
  const bytes = new Uint8ClampedArray((2 * HALF + 1) * 3);
  const shades = Array.from({ length: 2 * HALF + 1 }, (_, at) => {
    const t = Math.abs(at - HALF) / HALF;
    const angle = (hues[at < HALF ? 0 : 1] * Math.PI) / 180;
    const [a, b] = [chroma * t * Math.cos(angle), chroma * t * Math.sin(angle)];
    const linear = fromOklab(lightness[0] + (lightness[1] - lightness[0]) * t, a, b);
    const rgb = linear.map((channel) => Math.round(255 * encoded(channel)));
    bytes.set(rgb, 3 * at);
    return { background: `rgb(${rgb.join(", ")})`, ink: inkOn(linear) };
  });
  const stops = [0, 32, 64, 96, 128, 160, 192, 224, 256].map((at) => shades[at].background);
  const made = { shades, bytes, gradient: `linear-gradient(to right, ${stops.join(", ")})` };
  twoSided.set(dark, made);
  return made;
}

/**
 * @param {number} share -1 to 1
 * @returns {number} the step of the two-sided scale
 */
export function signedStep(share) {
  return Math.round((Math.min(Math.max(share, -1), 1) + 1) * HALF);
}

/**
 * @param {number} value 0 to 1; what lies outside is taken as the nearest end
 * @returns {number} the step of the scale
 */
export function step(value) {
  return Math.round(Math.min(Math.max(value, 0), 1) * (STEPS - 1));
}

function fromOklab(L, a, b) {
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((channel) => Math.min(Math.max(channel, 0), 1));
}

function encoded(channel) {
  return channel <= 0.0031308 ? 12.92 * channel : 1.055 * channel ** (1 / 2.4) - 0.055;
}

/** The one of black and white with the larger contrast: at least 4.5 to 1 on every colour there is. */
function inkOn(linear) {
  const luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  return (luminance + 0.05) ** 2 > 1.05 * 0.05 ? "#000000" : "#ffffff";
}

/**
 * How a method is drawn everywhere, as in the pictures of the other tabs: attention weights (W) dashed with hollow
 * markers, norms (N) and rivals solid with filled ones; in one family every method has a marker of its own.
 * @typedef {{light: string, dark: string, marker: string, dash: string, hollow: boolean}} MethodStyle
 * @type {Record<string, MethodStyle>}
 */
const METHOD_STYLES = {
  "W": { light: "#717581", dark: "#a9adb8", marker: "circle", dash: "2 3", hollow: true },
  "W-FixedRes": { light: "#7f918e", dark: "#a8bbb8", marker: "square", dash: "6 3", hollow: true },
  "W-Res": { light: "#9a8d45", dark: "#cfc583", marker: "up", dash: "10 3 2 3", hollow: true },
  "N": { light: "#e76300", dark: "#ff8f3d", marker: "circle", dash: "", hollow: false },
  "N-FixedRes": { light: "#d98a00", dark: "#ffbb45", marker: "square", dash: "", hollow: false },
  "N-Res": { light: "#3f90da", dark: "#68b2f5", marker: "up", dash: "", hollow: false },
  "N-ResLN": { light: "#832db6", dark: "#c58aec", marker: "down", dash: "", hollow: false },
  "N-Enc": { light: "#bd1f01", dark: "#ff7a66", marker: "diamond", dash: "", hollow: false },
  "ALTI": { light: "#8c5546", dark: "#d3a293", marker: "plus", dash: "", hollow: false },
  "Value-Zeroing": { light: "#1b9e77", dark: "#66c2a5", marker: "cross", dash: "", hollow: false },
};
const OTHER_METHOD = { light: "#50545c", dark: "#c4c8d0", marker: "circle", dash: "1 3", hollow: true };

/**
 * @param {string} method
 * @returns {MethodStyle}
 */
export function methodStyle(method) {
  return METHOD_STYLES[method] ?? OTHER_METHOD;
}

/** TensorBoard's colours for runs, in its order. */
const RUN_COLOURS = [
  { light: "#425066", dark: "#8e98a3" },
  { light: "#12b5cb", dark: "#12b5cb" },
  { light: "#e52592", dark: "#e52592" },
  { light: "#f9ab00", dark: "#f9ab00" },
  { light: "#9334e6", dark: "#9334e6" },
  { light: "#7cb342", dark: "#7cb342" },
  { light: "#e8710a", dark: "#e8710a" },
];

/**
 * Gives each run the colour that it has in TensorBoard: by its place in TensorBoard's list; runs that appear later take
 * the next colours, and no run changes its own.
 * @returns {{learn: (names: string[]) => void, colour: (name: string, dark: boolean) => string}}
 */
export function createRunColours() {
  /** @type {Map<string, number>} */
  const places = new Map();
  return {
    learn(names) {
      for (const name of names) if (!places.has(name)) places.set(name, places.size);
    },
    colour(name, dark) {
      const { light, dark: onDark } = RUN_COLOURS[(places.get(name) ?? 0) % RUN_COLOURS.length];
      return dark ? onDark : light;
    },
  };
}
