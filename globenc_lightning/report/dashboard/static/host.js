/**
 * What TensorBoard's page, whose frame this is, tells and takes: the address, the theme, reloads, fonts.
 *
 * Messages follow TensorBoard's protocol for plugins; the address is written as its own plugins write it, under
 * `p.globenc.` in the hash. Where there is no such page, the frame's own address and the system's theme serve.
 */

const PLUGIN = "globenc";
const PREFIX = `p.${PLUGIN}.`;
const WRITE_DELAY = 250; // browsers limit how often an address may change

/** @returns {Window} TensorBoard's page where it can be read, else this one */
function outerWindow() {
  try {
    if (window.parent.document.body) return window.parent;
  } catch {
    // another origin: TensorBoard's page is out of reach
  }
  return window;
}

/** @returns {{tab: string, pairs: [string, string][]}} */
function parseHash(hash) {
  let tab = "";
  /** @type {[string, string][]} */
  const pairs = [];
  for (const part of hash.replace(/^#/, "").split("&")) {
    const [key, value, more] = part.split("=");
    if (value === undefined) tab = part;
    else if (more === undefined) {
      try {
        pairs.push([decodeURIComponent(key), decodeURIComponent(value)]);
      } catch {
        // not percent-encoded text, so nothing that TensorBoard or this tab has written
      }
    }
  }
  return { tab, pairs };
}

export function connectHost() {
  const outer = outerWindow();
  const embedded = outer !== window;
  /** @type {Record<string, string>} */
  let pending = {};
  let timer = 0;

  /** @returns {Record<string, string>} what the address says of this tab */
  function readLink() {
    const own = parseHash(outer.location.hash).pairs.filter(([key]) => key.startsWith(PREFIX));
    return Object.fromEntries(own.map(([key, value]) => [key.slice(PREFIX.length), value]));
  }

  /** @param {Record<string, string>} entries */
  function linkWith(entries) {
    const { tab, pairs } = parseHash(outer.location.hash);
    const all = pairs.filter(([key]) => !key.startsWith(PREFIX));
    for (const [key, value] of Object.entries(entries)) all.push([PREFIX + key, value]);
    const text = all.map(([key, value]) => `${encodeURIComponent(key)}=${encodeURIComponent(value)}`);
    const url = new URL(outer.location.href);
    url.hash = [embedded ? PLUGIN : tab, ...text].filter((part) => part !== "").join("&");
    return url.toString();
  }

  function write() {
    timer = 0;
    // While another tab is in front, the address is that tab's.
    if (embedded && parseHash(outer.location.hash).tab !== PLUGIN) return;
    outer.history.replaceState(outer.history.state, "", linkWith(pending));
  }

  return {
    readLink,
    linkWith,

    /** @param {Record<string, string>} entries all that the address is to say of this tab */
    writeLink(entries) {
      pending = entries;
      if (!timer) timer = window.setTimeout(write, WRITE_DELAY);
    },

    /** @param {() => void} listener called when a person changes the address */
    onLink(listener) {
      outer.addEventListener("hashchange", () => {
        if (!timer && (!embedded || parseHash(outer.location.hash).tab === PLUGIN)) listener();
      });
    },

    /** @returns {boolean} */
    isDark() {
      if (embedded) return outer.document.body.classList.contains("dark-mode");
      return window.matchMedia("(prefers-color-scheme: dark)").matches;
    },

    /** @param {() => void} listener */
    onTheme(listener) {
      if (embedded) {
        new MutationObserver(listener).observe(outer.document.body, { attributes: true, attributeFilter: ["class"] });
      } else {
        window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", listener);
      }
    },

    /** @param {() => void} listener called when TensorBoard has loaded its data again */
    onReload(listener) {
      if (!embedded) return;
      const { port1, port2 } = new MessageChannel();
      port1.addEventListener("message", ({ data }) => {
        const message = JSON.parse(data);
        if (message.isReply) return;
        port1.postMessage(
          JSON.stringify({ type: message.type, id: message.id, payload: null, error: null, isReply: true }),
        );
        if (message.type === "experimental.DataReloaded" || message.type === "experimental.RunsChanged") listener();
      });
      port1.start();
      outer.postMessage("experimental.bootstrap", outer.location.origin, [port2]);
    },

    /**
     * Whether a run is among those that a person has left to be seen: by the run filter of the newer tabs and by the
     * run selector of the older ones, as far as TensorBoard writes them into its address.
     * @param {string} run
     * @returns {boolean}
     */
    showsRun(run) {
      const address = Object.fromEntries(parseHash(outer.location.hash).pairs);
      const filters = [new URLSearchParams(outer.location.search).get("runFilter"), address.regexInput];
      try {
        if (filters.some((filter) => filter && !new RegExp(filter, "i").test(run))) return false;
        return JSON.parse(atob(address.runSelectionState ?? btoa("{}")))[run] !== false;
      } catch {
        return true;
      }
    },

    /** @returns {boolean} whether the tab can be seen */
    isVisible() {
      return document.visibilityState === "visible" && window.innerWidth > 0;
    },

    /** Sets text in the font that TensorBoard sets it in. */
    borrowFonts() {
      if (!embedded) return;
      for (const sheet of outer.document.styleSheets) {
        try {
          for (const rule of sheet.cssRules) {
            if (rule.constructor.name !== "CSSFontFaceRule") continue;
            const style = /** @type {CSSFontFaceRule} */ (rule).style;
            const family = style.getPropertyValue("font-family").replaceAll(/["']/g, "");
            const range = style.getPropertyValue("unicode-range");
            if (!family.startsWith("Roboto")) continue;
            const source = style
              .getPropertyValue("src")
              .replaceAll(/url\(["']?([^"')]+)["']?\)/g, (_, path) => `url("${new URL(path, outer.location.href)}")`);
            document.fonts.add(
              new FontFace(family, source, {
                weight: style.getPropertyValue("font-weight") || "400",
                style: style.getPropertyValue("font-style") || "normal",
                ...(range ? { unicodeRange: range } : {}),
              }),
            );
          }
        } catch {
          // a style sheet that may not be read; the system's font serves
        }
      }
    },
  };
}
