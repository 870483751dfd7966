/** One small box beside the pointer, or beside what has the focus, that says what it stands on. */

import { html } from "./dom.js";

const GAP = 14;

export function createTooltip() {
  const element = html("div", { class: "tooltip", role: "tooltip", id: "tooltip", hidden: true });

  function place(left, top) {
    const { offsetWidth, offsetHeight } = element;
    const { clientWidth, clientHeight } = document.documentElement;
    const right = left + GAP + offsetWidth <= clientWidth;
    element.style.left = `${Math.max(right ? left + GAP : left - GAP - offsetWidth, 4)}px`;
    const under = top + GAP + offsetHeight <= clientHeight;
    element.style.top = `${Math.max(under ? top + GAP : top - GAP - offsetHeight, 4)}px`;
  }

  return {
    element,

    /**
     * @param {{x: number, y: number}} at in the window
     * @param {string} title
     * @param {{name: string, value: string, sample?: SVGElement}[]} lines
     * @param {string} [note]
     */
    show(at, title, lines, note = "") {
      element.replaceChildren(
        html("strong", { dir: "auto" }, title),
        html(
          "dl",
          {},
          ...lines.flatMap(({ name, value, sample }) => [html("dt", {}, sample ?? null, name), html("dd", {}, value)]),
        ),
      );
      if (note) element.append(html("p", {}, note));
      element.hidden = false;
      place(at.x, at.y);
    },

    hide() {
      element.hidden = true;
    },
  };
}
