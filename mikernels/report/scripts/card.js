// One feature as a card: what it fires on, what it promotes, what is like it, examples.
function card(feature, words, more = {}) {
  const heat = value => `background:rgb(var(--heat)/${(.08 + .62 * Math.min(1, value / feature.maximum)).toFixed(2)})`;

  // tokens are numbers in `words`; only those that fire have values: [place, value, ...]
  function example([tokens, fires, peak, where]) {
    const values = new Map();
    for (let i = 0; i < fires.length; i += 2) values.set(fires[i], fires[i + 1]);
    const spans = tokens.map((word, place) => {
      const value = values.get(place);
      if (value === undefined) return make("span", {}, ...visible(words[word]));
      const given = { style: heat(value), "data-value": short(value, 4) };
      if (place === peak) given.class = "peak";
      return make("span", given, ...visible(words[word]));
    });
    return make("div", { class: "row" },
      make("output", { "data-value": where }, short(values.get(peak))),
      make("div", { class: "ctx", dir: "auto" }, ...spans));
  }

  function group({ title, examples }) {
    return make("section", { class: "group" }, make("h4", {}, title), ...examples.map(example));
  }

  // tokens with a bar as long as their number
  function bars(title, rows, say, name) {
    const most = Math.max(...rows.map(([, value]) => Math.abs(value)), 1e-30);
    return make("div", { class: `bars ${name}` }, make("h4", {}, title), make("ol", {}, ...rows.map(([word, value]) =>
      make("li", { style: `--part:${(100 * Math.abs(value) / most).toFixed(1)}%` },
        chip(words[word]), make("span", {}, say(value))))));
  }

  function similar() {
    const links = feature.similar.map(([number, cosine]) => {
      const known = more.known ? more.known(number) : null;
      const inside = [`${number}`, ...(known ? [" ", ...known] : [])];
      const link = make(known || more.href ? "a" : "span", { href: known ? `#f${number}` : more.href && more.href(number) }, ...inside);
      return make("li", {}, link, make("small", {}, ` ${cosine.toFixed(2)}`));
    });
    return make("div", { class: "similar" }, make("h4", {}, "Similar features, cosine of decoder directions"), make("ul", {}, ...links));
  }

  function histogram() {
    return make("div", { class: "activations" }, make("h4", {}, "Activations"), sparkline(feature.histogram, "histogram"),
      make("div", { class: "scale" }, make("span", {}, "0"), make("span", {}, short(feature.maximum))));
  }

  const fires = feature.count
    ? `${whole(feature.count)} ${more.unit || "tokens"} (${percent(feature.density)}), largest activation ${short(feature.maximum)}`
    : `did not fire on these ${more.unit || "tokens"}`;
  const parts = [];
  if (feature.count) parts.push(histogram());
  if (feature.tokens.length) parts.push(bars("Fires on", feature.tokens, percent, "on"));
  if (feature.promoted.length) parts.push(bars("Promotes", feature.promoted, signed, "up"));
  if (feature.suppressed.length) parts.push(bars("Suppresses", feature.suppressed, signed, "down"));
  const name = `Feature ${whole(feature.number)}`;
  const title = more.href ? make("a", { href: more.href(feature.number) }, name) : name;
  return make("article", { class: "feature", id: more.id },
    make("header", {}, make("h3", {}, title, " ", make("small", {}, fires))),
    parts.length ? make("div", { class: "figures" }, ...parts) : null,
    feature.similar.length ? similar() : null,
    ...feature.groups.filter(one => one.examples.length).map(group));
}
