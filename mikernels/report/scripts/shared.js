// Elements, numbers and token texts. A text only ever becomes a text node: nothing in it is markup.
function make(kind, given = {}, ...children) {
  const element = document.createElement(kind);
  for (const [name, value] of Object.entries(given)) {
    if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

function draw(kind, given, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(given)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const whole = value => value.toLocaleString("en-US");
const short = (value, digits = 3) =>
  value === null ? "–"
    : Math.abs(value) >= 10 ** digits ? whole(Math.round(value))
      : String(Number(value.toPrecision(digits)));
const signed = value => (value > 0 ? "+" : value < 0 ? "−" : "") + short(Math.abs(value));
const percent = share => `${short(100 * share, 2)} %`;

// What cannot be seen, or would turn the text around it: control characters, separators, marks of
// direction, halves of a pair. Joiners (U+200C, U+200D) stay: scripts and emoji are made with them.
const UNSEEN = /[\u0000-\u001f\u007f-\u00a0\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|\p{Surrogate}/u;
const MARKS = { "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽", "\u2028": "↵", "\u2029": "↵" };

function mark(character) {
  const code = character.codePointAt(0);
  if (MARKS[character]) return MARKS[character];
  return `‹${code.toString(16).toUpperCase().padStart(4, "0")}›`;
}

// A token as nodes. alone: not within a text, so that its spaces are shown too.
function visible(text, alone = false) {
  if (text === "") return [make("i", { class: "nl" }, "∅")];
  const found = [];
  let plain = "";
  const flush = () => {
    if (plain) found.push(document.createTextNode(plain));
    plain = "";
  };
  for (const character of text) {
    const blank = alone && character === " " && !text.trim();
    if (!blank && !UNSEEN.test(character)) {
      plain += character;
      continue;
    }
    flush();
    found.push(make("i", { class: "nl" }, blank ? "␣" : mark(character)));
  }
  flush();
  return found;
}

const chip = text => make("code", { class: "chip" }, ...visible(text, true));

// a histogram without axes, heights by square root so that the rare strong end shows
function sparkline(bins, name = "spark") {
  const top = Math.sqrt(Math.max(1, ...bins));
  const bars = bins.map((n, i) => {
    const height = 22 * Math.sqrt(n) / top;
    return draw("rect", { x: 4 * i, y: 22 - height, width: 3.4, height });
  });
  const box = `0 0 ${4 * bins.length} 22`;
  return draw("svg", { class: name, viewBox: box, preserveAspectRatio: "none", "aria-hidden": true }, ...bars);
}

// the value under the pointer or finger, at once: a title would take a second, and no finger gets it
function hints() {
  const tip = document.body.appendChild(make("div", { class: "tip", hidden: "" }));
  const tell = event => {
    const over = event.target.closest ? event.target.closest("[data-value]") : null;
    tip.hidden = !over;
    if (!over) return;
    tip.textContent = over.dataset.value;
    const at = over.getClientRects()[0] || over.getBoundingClientRect();
    const box = tip.getBoundingClientRect();
    const left = at.left + at.width / 2 - box.width / 2;
    tip.style.left = `${Math.max(4, Math.min(left, innerWidth - box.width - 4))}px`;
    tip.style.top = `${at.top > box.height + 8 ? at.top - box.height - 6 : at.bottom + 6}px`;
  };
  document.addEventListener("pointerover", tell);
  document.addEventListener("pointerdown", tell);
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });
}
