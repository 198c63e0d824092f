// What all drawings of a page share: the values, a box beside the pointer, drawing again in another width.
const drawn = JSON.parse(document.getElementById("drawn").textContent);
const signed = value => (value === null ? "–" : d3.format("+.4f")(value));
const between = (low, high) => (low === null ? "" : `${signed(low)} to ${signed(high)}`);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const tip = document.body.appendChild(document.createElement("div"));
tip.className = "tip";
tip.hidden = true;

function tell(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 4))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18}px`;
}

function hush() {
  tip.hidden = true;
}

// draw(width) now, and again whenever the element is of another width or the page of other colours
function fitted(element, draw) {
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(element.clientWidth - width) > 1) draw((width = element.clientWidth));
  }).observe(element);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(width));
}

// of each section of a kind, with its values
function each(kind, draw) {
  for (const section of document.querySelectorAll(`section.is-${kind}`)) {
    draw(section, drawn[section.id.replace("part-", "")]);
  }
}

// an element for each datum, made and removed as there are; d3 has this only from 5.8 on
function join(bound, make) {
  bound.exit().remove();
  return (typeof make === "string" ? bound.enter().append(make) : make(bound.enter())).merge(bound);
}

// the one child of its class
function only(parent, name, kind = "g") {
  return join(parent.selectAll(`${kind}.${name}`).data([0]), kind).attr("class", name);
}
