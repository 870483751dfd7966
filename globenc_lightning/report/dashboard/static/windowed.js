/**
 * A list that draws the items near the window alone. The others hold their text, so that the page can be searched and
 * read aloud, and keep the height that they had or will have, so that the page does not grow while it is scrolled.
 */

const AHEAD = 1; // windows above and below the visible one that are drawn
const KEPT = 2; // windows beyond which drawn items are given up
const MARGIN = 0.25; // windows around the visible one that are drawn at once; the others in the next frame

/**
 * @param {HTMLElement} element holds the items, one below the other
 * @param {{draw: (i: number) => void, release: (i: number) => void}} of how an item is filled, and emptied again but for
 *   its text
 */
export function createWindowedList(element, { draw, release }) {
  /** @type {HTMLElement[]} */
  let items = [];
  /** @type {Set<number>} */
  const drawn = new Set();
  /** @type {(number|undefined)[]} what an item took when it was last drawn */
  let taken = [];
  /** @type {(number|undefined)[]} the height that an item has been given, where it is not drawn */
  let given = [];
  /** @type {(() => (i: number) => number)|null} */
  let measure = null;
  /** @type {{of: typeof measure, width: number, height: (i: number) => number}|null} as it was measured last */
  let measured = null;
  let whole = true;
  let pinned = -1;
  let asked = 0;
  let width = 0;
  let unsettled = false;

  /** @param {number} i */
  function fill(i) {
    if (drawn.has(i)) return;
    drawn.add(i);
    items[i].style.height = "";
    given[i] = undefined;
    items[i].classList.remove("undrawn");
    draw(i);
  }

  /** Reserves the height of all that is not drawn. */
  function reserve() {
    const open = [...items.keys()].filter((i) => !drawn.has(i));
    if (!open.length || !measure) return;
    // Everything is read before anything is written: else the page would be laid out once for each item.
    const height = measure();
    measured = { of: measure, width, height };
    const heights = open.map((i) => taken[i] ?? height(i));
    for (const [place, i] of open.entries()) give(i, heights[place]);
  }

  /** @param {number} i @param {number} height */
  function give(i, height) {
    if (given[i] === height) return;
    given[i] = height;
    items[i].style.height = `${height}px`;
  }

  /** The first item that ends below a height in the window. @param {number} y */
  function firstBelow(y) {
    let low = 0;
    let high = items.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (items[middle].getBoundingClientRect().bottom > y) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  /** @param {number} windows @returns {[number, number]} the items so many windows around, the last not among them */
  function near(windows) {
    const height = window.innerHeight;
    return [firstBelow(-windows * height), Math.min(firstBelow((1 + windows) * height) + 1, items.length)];
  }

  function update() {
    if (whole || !element.isConnected) return;
    // What is drawn may be lower than it was thought to be: then there is room for more.
    for (let round = 0; round < 3; round += 1) {
      const [first, end] = near(AHEAD);
      let news = false;
      for (let i = first; i < end; i += 1) {
        news ||= !drawn.has(i);
        fill(i);
      }
      if (!news) break;
    }
    const [first, end] = near(KEPT);
    const far = [...drawn].filter((i) => (i < first || i >= end) && i !== pinned && !isUsed(items[i]));
    const heights = far.map((i) => items[i].getBoundingClientRect().height);
    for (const [place, i] of far.entries()) {
      taken[i] = heights[place];
      drawn.delete(i);
      release(i);
      give(i, heights[place]);
      items[i].classList.add("undrawn");
    }
  }

  /** Whether a person is in an item, with the keyboard or with a selection. */
  function isUsed(item) {
    const selected = window.getSelection();
    return item.contains(document.activeElement) || (!selected?.isCollapsed && selected?.containsNode(item, true));
  }

  function later() {
    if (!asked) {
      asked = requestAnimationFrame(() => {
        asked = 0;
        update();
      });
    }
  }
  window.addEventListener("scroll", later, { passive: true });
  window.addEventListener("resize", later, { passive: true });
  new ResizeObserver(() => {
    // Another width breaks lines elsewhere.
    const changed = element.clientWidth && element.clientWidth !== width;
    width = element.clientWidth || width;
    if (changed) {
      taken = [];
      reserve();
    }
    later();
  }).observe(element);

  return {
    /** @returns {number[]} the items that are drawn, in ascending order */
    drawn: () => [...drawn].sort((a, b) => a - b),

    /** @param {number} i @returns {boolean} */
    isDrawn: (i) => drawn.has(i),

    /** Draws one item wherever it is; it stays drawn until another one is pinned. @param {number} i */
    pin(i) {
      pinned = i;
      fill(i);
      if (unsettled) {
        unsettled = false;
        width = element.clientWidth;
        reserve();
      }
    },

    update,

    /** @returns {boolean} whether all items are drawn, wherever the window is */
    isWhole: () => whole,

    /**
     * The same items hold other things: what is in the window is drawn anew at once, the rest near it in the next frame,
     * and of what is far the text alone changes.
     * @param {() => void} change tells the items
     */
    renew(change) {
      if (whole) {
        change();
        for (const i of items.keys()) draw(i);
        return;
      }
      // Everything is read before anything is written.
      const [first, end] = near(MARGIN);
      change();
      taken = [];
      for (const i of drawn) {
        if ((i >= first && i < end) || i === pinned) draw(i);
        else {
          drawn.delete(i);
          release(i);
          items[i].classList.add("undrawn");
        }
      }
      for (let i = first; i < end; i += 1) fill(i);
      const height = measured?.of === measure && measured?.width === width ? measured.height : measure?.();
      if (height) for (const i of items.keys()) if (!drawn.has(i)) give(i, height(i));
      later();
    },

    /**
     * Shows other items.
     * @param {HTMLElement[]} others with their text, not drawn
     * @param {{all: boolean, height: () => (i: number) => number}} how all: few enough to draw each of them; height:
     *   what an item takes, about, as the page stands; asked for once one is pinned, and again where the width changes
     */
    replace(others, { all, height }) {
      items = others;
      drawn.clear();
      taken = [];
      given = [];
      pinned = -1;
      whole = all;
      measure = height;
      unsettled = !all;
      if (all) for (const i of items.keys()) fill(i);
      else for (const item of items) item.classList.add("undrawn");
      // At the width of the last time, heights are known before the page is laid out.
      if (!all && measured?.of === height && measured.width === width) {
        unsettled = false;
        for (const i of items.keys()) give(i, measured.height(i));
      }
      element.replaceChildren(...items);
    },
  };
}

/** @param {HTMLElement} item @returns {number} what its padding and borders take in height */
export function frameOf(item) {
  const style = getComputedStyle(item);
  const edges = ["paddingTop", "paddingBottom", "borderTopWidth", "borderBottomWidth"];
  return edges.reduce((sum, name) => sum + Number.parseFloat(style[name]), 0);
}

const SPACE = 1; // between chips, besides a space
const PADDING = 10; // of a chip
const LEAST = 60; // a width

/** How many lines chips take, as a browser breaks them. */
export function createLineCounter() {
  const drawing = /** @type {CanvasRenderingContext2D} */ (document.createElement("canvas").getContext("2d"));
  /** @type {Map<string, number>} */
  const widths = new Map();
  let space = SPACE;

  function widthOf(text) {
    const known = widths.get(text);
    if (known !== undefined) return known;
    const found = drawing.measureText(text).width + PADDING;
    widths.set(text, found);
    return found;
  }

  return {
    /** @param {string} font as CSS has it */
    use(font) {
      if (drawing.font === font) return;
      drawing.font = font;
      widths.clear();
      space = drawing.measureText(" ").width + SPACE;
    },

    /** @param {string[]} texts @param {number} within a width in pixels */
    count(texts, within) {
      const room = Math.max(within, LEAST);
      let lines = 1;
      let at = 0;
      for (const text of texts) {
        const width = widthOf(text);
        if (at > 0 && at + width > room) {
          lines += 1;
          at = 0;
        }
        // What is longer than a line is broken.
        const over = Math.max(Math.ceil(width / room) - 1, 0);
        lines += over;
        at += width - over * room + space;
      }
      return lines;
    },
  };
}
