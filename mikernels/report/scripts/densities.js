// How often features fire, as bars that are buttons: one chosen, its features alone are listed.
const PER_DECADE = 4;

function densities(store, element, choose) {
  const lowest = Math.floor(Math.log10(1 / store.rows) + 1e-9);
  const bins = new Array(-lowest * PER_DECADE).fill(0);
  // a feature that always fires belongs to the last bin
  const binOf = density => Math.max(0, Math.min(bins.length - 1, Math.floor((Math.log10(density) - lowest) * PER_DECADE)));
  for (const count of store.counts) if (count) bins[binOf(count / store.rows)] += 1;
  const edge = i => 10 ** (lowest + i / PER_DECADE);
  const band = i => [i ? edge(i) : 0, i + 1 < bins.length ? edge(i + 1) : Infinity];
  const top = Math.max(1, ...bins);
  let pressed = -1;

  const bars = bins.map((n, i) => make("button", {
    type: "button", tabindex: i ? -1 : 0, "aria-pressed": false, style: `--part:${(100 * n / top).toFixed(2)}%`,
    "aria-label": `${whole(n)} features that fire on ${percent(edge(i))} to ${percent(edge(i + 1))} of ${store.unit}`,
    "data-value": `${whole(n)} features: ${percent(edge(i))} to ${percent(edge(i + 1))}`,
  }, make("span")));
  const press = (i, tell = true) => {
    pressed = i === pressed ? -1 : i;
    bars.forEach((bar, j) => bar.setAttribute("aria-pressed", j === pressed));
    if (tell) choose(pressed < 0 ? null : band(pressed));
  };
  bars.forEach((bar, i) => bar.addEventListener("click", () => press(i)));
  const row = make("div", { class: "bins", role: "group", "aria-label": `Share of ${store.unit} on which features fire` }, ...bars);
  row.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const next = bars[bars.indexOf(document.activeElement) + (step || 0)];
    if (!step || !next) return;
    event.preventDefault();
    event.stopPropagation();
    bars.forEach(bar => { bar.tabIndex = bar === next ? 0 : -1; });
    next.focus();
  });
  const every = bins.length > 6 * PER_DECADE ? 2 : 1;
  const ticks = [];
  for (let power = lowest; power <= 0; power += every) {
    const left = 100 * (power - lowest) / -lowest;
    ticks.push(make("span", { style: `left:${left.toFixed(2)}%` }, percent(10 ** power)));
  }
  element.replaceChildren(row, make("div", { class: "ticks", "aria-hidden": true }, ...ticks));
  return { clear: () => { if (pressed >= 0) press(pressed, false); } };
}
