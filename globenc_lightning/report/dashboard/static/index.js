/** The GlobEnc tab: TensorBoard imports this module into an empty page and calls `render`. */

import { createApi } from "./api.js";
import { createRunColours, scale } from "./colours.js";
import { createCorrelationView } from "./correlation_view.js";
import { html, labelledSelect, notice, setOptions, setText } from "./dom.js";
import { connectHost } from "./host.js";
import { createMapsView } from "./maps_view.js";
import { createMovementView } from "./movement_view.js";
import { createRunsView } from "./runs_view.js";
import { hasFigures, linkFromState, select, stateFromLink, VIEWS } from "./state.js";
import { plain, shorten, visible } from "./text.js";
import { createTokensView } from "./tokens_view.js";
import { createTooltip } from "./tooltip.js";

const POLL_MS = 10_000;
const PLAY_MS = 600;
const SLOW_MS = 150;
const THUMB = 18; // the slider's thumb, as in style.css
const SENTENCE_LIMIT = 60;
const TITLES = { tokens: "Tokens", maps: "Maps", correlation: "Correlation", movement: "Movement", runs: "Runs" };

/**
 * What the views work with.
 * @typedef {object} Context
 * @property {ReturnType<typeof createApi>} api
 * @property {(changes: Partial<import("./state.js").State>) => void} update
 * @property {ReturnType<typeof createTooltip>} tooltip
 * @property {{isDark: () => boolean, scale: () => import("./colours.js").Scale,
 *   onChange: (listener: () => void) => void}} theme
 * @property {{names: () => string[], isShown: (run: string) => boolean, colour: (run: string) => string,
 *   index: (run: string, tag: string) => Promise<import("./api.js").Index|null>,
 *   table: (run: string, tag: string) => Promise<import("./api.js").Table|null>,
 *   dynamics: (run: string, tag: string, layer: number, methods: string[], against: string, by: string,
 *     tokens: string[]) => Promise<import("./api.js").Dynamics|null>}} runs
 */

/** Builds the tab. */
export async function render() {
  const host = connectHost();
  document.documentElement.lang = "en";
  document.title = "GlobEnc";
  const style = html("link", { rel: "stylesheet", href: new URL("style.css", import.meta.url) });
  const styled = new Promise((resolve) => {
    style.addEventListener("load", resolve);
    style.addEventListener("error", resolve);
  });
  document.head.append(style);
  host.borrowFonts();
  await styled;
  createTab(host);
  window.focus();
}

/** @param {ReturnType<typeof connectHost>} host */
function createTab(host) {
  const api = createApi();
  const tooltip = createTooltip();
  const runColours = createRunColours();
  /** @type {import("./api.js").Run[]} */
  let known = [];
  let state = stateFromLink(host.readLink());
  /** @type {import("./state.js").Selection|null} */
  let selection = null;
  let turn = 0;
  let playing = 0;
  let pointed = false;
  /** @type {{of: import("./api.js").Sentence[]|null, made: {value: string, label: string}[]}} */
  let options = { of: null, made: [] };
  /** @type {(() => void)[]} */
  const themeListeners = [];

  /** The callback of a run that has this tag, or else its first. */
  function callbackOf(run, tag) {
    const callbacks = known.find((one) => one.run === run)?.callbacks ?? [];
    return callbacks.find((one) => one.tag === tag) ?? callbacks[0] ?? null;
  }

  /** @type {Context} */
  const context = {
    api,
    update,
    tooltip,
    theme: {
      isDark: host.isDark,
      scale: () => scale(host.isDark()),
      onChange: (listener) => themeListeners.push(listener),
    },
    runs: {
      names: () => known.map(({ run }) => run),
      isShown: host.showsRun,
      colour: (run) => runColours.colour(run, host.isDark()),
      async index(run, tag) {
        const callback = callbackOf(run, tag);
        if (!callback) return null;
        const index = await api.index(run, callback.tag, callback.written).catch(() => null);
        return index?.validations.length ? index : null;
      },
      async table(run, tag) {
        // Another callback's figures are another thing: they are no part of a mean.
        const callback = known.find((one) => one.run === run)?.callbacks.find((one) => one.tag === tag);
        const table = callback ? await api.table(run, tag, callback.written).catch(() => null) : null;
        return table?.steps.length ? table : null;
      },
      async dynamics(run, tag, ...choices) {
        const written = callbackOf(run, tag)?.written;
        return api.dynamics(run, tag, ...choices, written).catch(() => null);
      },
    },
  };
  const views = {
    tokens: createTokensView(context),
    maps: createMapsView(context),
    correlation: createCorrelationView(context),
    movement: createMovementView(context),
    runs: createRunsView(context),
  };

  const viewButtons = VIEWS.map((view) =>
    html(
      "button",
      { "class": "view-button", "type": "button", "data-view": view, "on": { click: () => update({ view }) } },
      TITLES[view],
    ),
  );
  const runDot = html("span", { "class": "dot", "aria-hidden": "true" });
  const run = labelledSelect("Run", (value) => {
    const [name, tag] = JSON.parse(value);
    update({ run: name, tag, validation: null, from: null, sentence: 0, token: null });
  });
  run.select.before(runDot);
  const method = labelledSelect("Method", (value) => update({ method: value }));
  const layer = labelledSelect("Layer", (value) =>
    update({ layer: selection && Number(value) === selection.index.layers - 1 ? null : Number(value) }),
  );
  const sentence = labelledSelect("Sentence", (value) => update({ sentence: Number(value), token: null }));
  sentence.element.classList.add("wide");
  const play = html("button", { class: "icon-button", type: "button", on: { click: togglePlay } });
  const slider = /** @type {HTMLInputElement} */ (
    html("input", {
      "type": "range",
      "min": 0,
      "step": 1,
      "aria-label": "Validation",
      "on": { input: () => goTo(Number(slider.value)) },
    })
  );
  const marks = html("div", { "class": "slider-marks", "aria-hidden": "true" });
  const stepText = html("output", { "class": "step", "aria-live": "polite" });
  const placeText = html("span", { class: "place" });
  const copy = html("button", { class: "link", type: "button", on: { click: copyLink } }, "Copy link");
  const copied = /** @type {HTMLInputElement} */ (
    html("input", {
      "class": "copied",
      "readonly": true,
      "hidden": true,
      "aria-label": "Link to this view",
      "on": { blur: () => (copied.hidden = true) },
    })
  );
  const notes = html("details", { class: "notes", hidden: true }, html("summary"), html("ul"));
  const stage = html("main");
  const controls = html(
    "div",
    { class: "controls" },
    method.element,
    layer.element,
    sentence.element,
    html(
      "div",
      { class: "timeline" },
      play,
      html("div", { class: "slider" }, slider, marks),
      html("div", { class: "moment" }, stepText, placeText),
    ),
  );
  const header = html(
    "header",
    {},
    html("div", { class: "bar" }, html("nav", { "aria-label": "Views" }, ...viewButtons), run.element, copied, copy),
    controls,
    html("div", { class: "progress" }),
  );
  new ResizeObserver(() =>
    document.documentElement.style.setProperty("--header-height", `${header.offsetHeight}px`),
  ).observe(header);
  document.body.replaceChildren(header, notes, stage, tooltip.element);

  /** @param {Partial<import("./state.js").State>} changes */
  function update(changes) {
    state = { ...state, ...changes };
    host.writeLink(linkFromState(state));
    show();
  }

  /** Shows the state; of several calls that overlap, the latest wins. */
  async function show() {
    turn += 1;
    const mine = turn;
    const isCurrent = () => mine === turn;
    stage.setAttribute("aria-busy", "true");
    const slow = window.setTimeout(() => isCurrent() && document.body.classList.add("busy"), SLOW_MS);
    try {
      await showCurrent(isCurrent);
    } catch (error) {
      if (isCurrent())
        stage.replaceChildren(notice("This cannot be shown", error instanceof Error ? error.message : String(error)));
    } finally {
      window.clearTimeout(slow);
      if (isCurrent()) {
        document.body.classList.remove("busy");
        stage.setAttribute("aria-busy", "false");
      }
    }
  }

  async function showCurrent(isCurrent) {
    const all = known.flatMap(({ run: name, callbacks }) => callbacks.map((callback) => ({ name, ...callback })));
    const chosen =
      all.find(({ name, tag }) => name === state.run && tag === state.tag) ??
      all.find(({ name }) => name === state.run) ??
      all.find(({ name }) => host.showsRun(name)) ??
      all[0];
    header.classList.toggle("bare", !chosen);
    if (!chosen) {
      selection = null;
      stage.replaceChildren(
        notice(
          "No GlobEnc data in this log directory yet",
          "The tab fills at the first validation of a training with Trainer(callbacks=[GlobEncCallback()]) and " +
            "TensorBoard’s logger.",
        ),
      );
      return;
    }
    const index = await api.index(chosen.name, chosen.tag, chosen.written);
    if (!isCurrent()) return;
    paintRuns(all, chosen);
    if (!index.validations.length || !index.sentences.length || !index.methods.length) {
      selection = null;
      controls.hidden = true;
      // The page is empty but for the reasons: they are no remarks.
      paintNotes([]);
      const explained = index.validations.some(({ reason }) => reason);
      const title = explained ? "Why this run has no figures" : "This run has no figures that can be read";
      stage.replaceChildren(notice(title, ...index.messages));
      return;
    }
    controls.hidden = false;
    paintNotes(index.messages);
    selection = select(state, index);
    paintControls(selection);
    const view = views[state.view];
    if (!stage.contains(view.element)) {
      stage.replaceChildren(view.element);
      window.scrollTo(0, 0);
      view.attached?.();
    }
    await view.show(selection, isCurrent, state);
  }

  function paintRuns(all, chosen) {
    setOptions(
      run.select,
      all.map(({ name, tag, validations }) => ({
        value: JSON.stringify([name, tag]),
        label:
          visible(name) + (all.some((other) => other.name === name && other.tag !== tag) ? ` · ${visible(tag)}` : ""),
      })),
      JSON.stringify([chosen.name, chosen.tag]),
    );
    runDot.style.background = context.runs.colour(chosen.name);
  }

  function paintNotes(messages) {
    notes.hidden = messages.length === 0;
    setText(
      /** @type {Node} */ (notes.firstChild),
      messages.length === 1 ? "1 remark on this run’s data" : `${messages.length} remarks on this run’s data`,
    );
    notes.lastElementChild?.replaceChildren(...messages.map((text) => html("li", {}, text)));
  }

  /** The sentences as options, made once: there may be many. @param {import("./api.js").Sentence[]} sentences */
  function sentenceOptions(sentences) {
    if (options.of !== sentences) {
      const label = (one, i) => shorten(`${i + 1}  ${plain(one)}`, SENTENCE_LIMIT);
      options = { of: sentences, made: sentences.map((one, i) => ({ value: String(i), label: label(one, i) })) };
    }
    return options.made;
  }

  /** @param {import("./state.js").Selection} chosen */
  function paintControls(chosen) {
    const { index, position, validation } = chosen;
    const { validations } = index;
    for (const button of viewButtons) {
      if (button.dataset.view === state.view) button.setAttribute("aria-current", "page");
      else button.removeAttribute("aria-current");
    }
    setOptions(
      method.select,
      index.methods.map((name) => ({ value: name, label: name === "N-Enc" ? "N-Enc (GlobEnc)" : name })),
      chosen.method,
    );
    setOptions(
      layer.select,
      Array.from({ length: index.layers }, (_, l) => ({
        value: String(l),
        label: l + 1 === index.layers ? `${l + 1} (last)` : String(l + 1),
      })),
      String(chosen.layer),
    );
    sentence.element.hidden = state.view !== "maps" && state.view !== "correlation";
    if (!sentence.element.hidden) setOptions(sentence.select, sentenceOptions(index.sentences), String(chosen.sentence));
    slider.max = String(validations.length - 1);
    slider.value = String(position);
    slider.disabled = validations.length < 2;
    /** @type {HTMLButtonElement} */ (play).disabled = validations.length < 2;
    const where = `validation ${position + 1} of ${validations.length}`;
    slider.setAttribute("aria-valuetext", `step ${validation.step}, ${where}`);
    setText(stepText, `Step ${validation.step}`);
    setText(placeText, `${where}, epoch ${validation.epoch}`);
    paintMarks(validations);
    paintPlay();
  }

  function paintMarks(validations) {
    const empty = validations.filter((validation) => !hasFigures(validation));
    marks.replaceChildren(
      ...empty.map((validation) => {
        const mark = html("span", { title: `step ${validation.step}: no figures` });
        const share = validations.indexOf(validation) / Math.max(validations.length - 1, 1);
        mark.style.left = `calc(${THUMB / 2}px + (100% - ${THUMB}px) * ${share})`;
        return mark;
      }),
    );
  }

  function paintPlay() {
    const name = playing ? "Pause" : "Play";
    setText(play, playing ? "❚❚" : "▶");
    play.setAttribute("aria-label", name);
    play.title = `${name} (space)`;
  }

  /** @param {number} position */
  function goTo(position) {
    if (!selection) return;
    const { validations } = selection.index;
    const last = validations.length - 1;
    const next = Math.min(Math.max(position, 0), last);
    // At the end, the slider stays at the end while validations are added.
    update({ validation: next === last ? null : validations[next].ordinal });
  }

  function togglePlay() {
    if (playing) {
      window.clearTimeout(playing);
      playing = 0;
      paintPlay();
    } else if (selection) {
      if (selection.position === selection.index.validations.length - 1) goTo(0);
      playing = window.setTimeout(playNext, PLAY_MS);
      paintPlay();
    }
  }

  async function playNext() {
    if (!selection || selection.position >= selection.index.validations.length - 1) {
      playing = 0;
      paintPlay();
      return;
    }
    playing = window.setTimeout(playNext, PLAY_MS);
    goTo(selection.position + 1);
  }

  /** @param {number} by */
  function stepSentence(by) {
    if (!selection) return;
    const last = selection.index.sentences.length - 1;
    update({ sentence: Math.min(Math.max(selection.sentence + by, 0), last), token: null });
  }

  async function copyLink() {
    // The link is of this moment: it names its validation, even if that is the latest.
    const link = host.linkWith(
      linkFromState({ ...state, validation: selection?.validation.ordinal ?? state.validation }),
    );
    try {
      await navigator.clipboard.writeText(link);
      setText(copy, "Copied");
    } catch {
      copied.hidden = false;
      copied.value = link;
      copied.select();
      setText(copy, "Press Ctrl+C");
    }
    window.setTimeout(() => setText(copy, "Copy link"), 2000);
  }

  const keys = {
    "ArrowLeft": () => selection && goTo(selection.position - 1),
    "ArrowRight": () => selection && goTo(selection.position + 1),
    "ArrowUp": () => stepSentence(-1),
    "ArrowDown": () => stepSentence(1),
    "Home": () => goTo(0),
    "End": () => goTo(Infinity),
    "Escape": () => state.token !== null && update({ token: null }),
    " ": togglePlay,
  };
  document.addEventListener("keydown", (event) => {
    const target = /** @type {Element} */ (event.target);
    if (event.altKey || event.ctrlKey || event.metaKey || !(event.key in keys)) return;
    if (target.closest("select, input:not([type=range])")) return;
    if (event.key === " " && target.closest("button, summary, [role=button]")) return;
    event.preventDefault();
    keys[event.key]();
  });
  // A list that was used with the pointer gives the arrow keys back.
  document.addEventListener("pointerdown", () => (pointed = true), true);
  document.addEventListener("keydown", () => (pointed = false), true);
  document.addEventListener("change", ({ target }) => {
    if (pointed && target instanceof HTMLSelectElement) target.blur();
  });

  function applyTheme() {
    document.documentElement.dataset.theme = host.isDark() ? "dark" : "light";
    for (const listener of themeListeners) listener();
  }

  /** Asks for what is new. */
  async function refresh() {
    let runs;
    try {
      const [answer, names] = await Promise.all([api.runs(), api.allRuns()]);
      runs = answer.runs;
      runColours.learn(names);
    } catch (error) {
      // What is on the page stays there; only a page that is still empty says why.
      if (!selection)
        stage.replaceChildren(notice("No answer", error instanceof Error ? error.message : String(error)));
      return;
    }
    if (selection && JSON.stringify(runs) === JSON.stringify(known)) return;
    known = runs;
    await show();
  }

  host.onTheme(() => {
    applyTheme();
    show();
  });
  host.onReload(refresh);
  host.onLink(() => {
    state = stateFromLink(host.readLink());
    show();
  });
  window.setInterval(() => host.isVisible() && refresh(), POLL_MS);
  applyTheme();
  refresh();
}
