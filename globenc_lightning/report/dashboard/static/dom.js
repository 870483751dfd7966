/** Building the page. Every text goes through a text node or an attribute, never through HTML. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {string} tag
 * @param {Record<string, any>} [properties] attributes; `on` holds listeners by event name; null and false are left out
 * @param {...(Node|string|null)} children
 * @returns {HTMLElement}
 */
export function html(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/**
 * @param {string} tag
 * @param {Record<string, any>} [properties]
 * @param {...(Node|string|null)} children
 * @returns {SVGElement}
 */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    } else if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(name, value === true ? "" : String(value));
    }
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/**
 * Changes a node's text only if it differs, so that unchanged parts of the page are not laid out again.
 * @param {Node} node
 * @param {string} text
 */
export function setText(node, text) {
  const only = node.childNodes.length === 1 ? node.firstChild : null;
  // A text that changes takes no new node.
  if (only instanceof Text) {
    if (only.data !== text) only.data = text;
  } else if (node.textContent !== text) node.textContent = text;
}

/**
 * Replaces a row of buttons; one that had the focus gives it to the new one of the same text.
 * @param {HTMLElement} row
 * @param {...HTMLElement} buttons
 */
export function replaceButtons(row, ...buttons) {
  const focused = row.contains(document.activeElement) ? document.activeElement?.textContent : null;
  row.replaceChildren(...buttons);
  if (focused) buttons.find(({ textContent }) => textContent === focused)?.focus();
}

/**
 * @param {HTMLSelectElement} select
 * @param {{value: string, label: string}[]} options
 * @param {string} chosen
 */
export function setOptions(select, options, chosen) {
  const same =
    select.options.length === options.length &&
    options.every(({ value, label }, i) => select.options[i].value === value && select.options[i].text === label);
  if (!same) {
    select.replaceChildren(...options.map(({ value, label }) => new Option(label, value)));
  }
  select.value = chosen;
}

/**
 * A label with its select.
 * @param {string} title
 * @param {(value: string) => void} choose
 * @returns {{element: HTMLElement, select: HTMLSelectElement}}
 */
export function labelledSelect(title, choose) {
  const select = /** @type {HTMLSelectElement} */ (html("select", { on: { change: () => choose(select.value) } }));
  return { element: html("label", { class: "field" }, html("span", { class: "field-name" }, title), select), select };
}

/**
 * What is shown in place of figures that are not there.
 * @param {string} title
 * @param {...string} texts paragraphs; line breaks in them stay
 * @returns {HTMLElement}
 */
export function notice(title, ...texts) {
  const paragraphs = texts.filter((text) => text).map((text) => html("p", {}, text));
  return html("div", { class: "notice", role: "status" }, html("strong", {}, title), ...paragraphs);
}

/**
 * @param {Node} node
 * @returns {[number, number]|null} where a selection begins and ends in a node's text; null where it is not within
 */
export function selectedIn(node) {
  const selected = window.getSelection();
  if (!selected?.rangeCount || selected.isCollapsed) return null;
  const range = selected.getRangeAt(0);
  if (!node.contains(range.startContainer) || !node.contains(range.endContainer)) return null;
  const before = document.createRange();
  before.setStart(node, 0);
  before.setEnd(range.startContainer, range.startOffset);
  const start = before.toString().length;
  return [start, start + range.toString().length];
}

/**
 * Selects a part of a node's text.
 * @param {Node} node
 * @param {number} start
 * @param {number} end
 */
export function selectIn(node, start, end) {
  const range = document.createRange();
  const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
  let at = 0;
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const length = text.textContent?.length ?? 0;
    if (start >= at && start < at + length) range.setStart(text, start - at);
    if (end > at && end <= at + length) {
      range.setEnd(text, end - at);
      break;
    }
    at += length;
  }
  window.getSelection()?.removeAllRanges();
  window.getSelection()?.addRange(range);
}
