"use strict";
/* What all parts of the page use: its data, elements made of text alone, the choice of a run, light and dark. */

const data = JSON.parse(document.getElementById("data").textContent);
const themed = []; // called when the colours change

/* An element of plain text: nothing of a response ever becomes markup. */
function make(tag, kind, text) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;
  return element;
}

/* A group of radio buttons that look like chips; `choose` is called with the value. */
let groups = 0;
function chips(legend, items, chosen, choose) {
  const set = make("fieldset", "chips");
  set.append(make("legend", "", legend));
  const name = `chips-${groups++}`;
  for (const [value, text] of items) {
    const label = make("label"), input = make("input");
    Object.assign(input, { type: "radio", name, value, checked: value === chosen });
    input.addEventListener("change", () => choose(value));
    label.append(input, make("span", "", text));
    set.append(label);
  }
  return set;
}

for (const input of document.querySelectorAll("input[name=run]")) {
  const show = () => {
    if (!input.checked) return; // a browser that comes back to a page remembers what was checked
    for (const part of document.querySelectorAll("[data-run]")) part.hidden = part.dataset.run !== input.value;
  };
  input.addEventListener("change", show);
  show();
}

{
  const button = document.getElementById("theme"), order = ["system", "light", "dark"];
  const words = { system: "as the system has them", light: "light", dark: "dark" };
  let at = 0;
  const repaint = () => themed.forEach((redraw) => redraw());
  button.addEventListener("click", () => {
    at = (at + 1) % order.length;
    if (at) document.documentElement.dataset.theme = order[at];
    else delete document.documentElement.dataset.theme;
    button.textContent = "◐☀☾"[at];
    button.setAttribute("aria-label", `Colours: ${words[order[at]]}`);
    repaint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
}
