"use strict";
// What the scripts of all pages use. All texts are inserted as text nodes, never as markup.

const $ = (id) => document.getElementById(id);

function make(tag, className, text, title) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  if (title) element.title = title;
  return element;
}

function sure(className, text, confidence, title) { // its colour is the confidence
  const element = make("i", className, text, title);
  element.style.setProperty("--sure", confidence);
  return element;
}

const visible = (text) => text.replace(/\n/g, "⏎\n") || "∅";
const percent = (share) => {
  if (share === 0) return "<0.01 %"; // the data has four digits
  if (share >= 0.9995) return share === 1 ? "100 %" : "99.9 %";
  return (100 * share).toFixed(share < 0.1 ? 2 : 1) + " %";
};

