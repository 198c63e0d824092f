// Which features are listed, in which order: plain functions of the store.
const KINDS = {
  all: () => true,
  alive: density => density > 0,
  dead: density => density === 0,
  rare: density => density > 0 && density < 1e-4,
  usual: density => density >= 1e-4 && density <= .1,
  dense: density => density > .1,
};

// of each feature how well it answers: 0 not, else the smaller the better
function matches(store, query, where, promoted) {
  const found = new Uint8Array(store.n);
  const wanted = query.toLowerCase().trim();
  const better = (place, rank) => {
    if (!found[place] || rank < found[place]) found[place] = rank;
  };
  const number = /^[#f]?(\d[\d,]*)$/.exec(wanted);
  if (number && (where === "all" || where === "number")) {
    const place = store.places.get(Number(number[1].replace(/,/g, "")));
    if (place !== undefined) better(place, 1);
  }
  if (where === "number" || !wanted) return found;
  // rank by word, so that each text is compared once and not once a feature
  const byWord = new Uint8Array(store.words.length);
  store.texts.forEach((text, i) => {
    if (text === wanted) byWord[i] = 2;
    else if (text.includes(wanted)) byWord[i] = 3;
  });
  const scan = (tokens, width, worse) => {
    for (let i = 0; i < tokens.length; i++) {
      const rank = tokens[i] === NONE ? 0 : byWord[tokens[i]];
      if (rank) better(Math.floor(i / width), rank + worse);
    }
  };
  if (where === "all" || where === "tokens") scan(store.tops, store.width, 0);
  if ((where === "all" || where === "promoted") && promoted) scan(promoted.tokens, promoted.width, 2);
  return found;
}

// places of features: `chosen` {query, where, kind, band, key, down}
function listed(store, chosen, promoted) {
  const kind = KINDS[chosen.kind];
  const ranks = chosen.query.trim() ? matches(store, chosen.query, chosen.where, promoted) : null;
  const found = [];
  for (let place = 0; place < store.n; place++) {
    const density = store.density(place);
    if (!kind(density) || (ranks && !ranks[place])) continue;
    if (chosen.band && !(density >= chosen.band[0] && density < chosen.band[1])) continue;
    found.push(place);
  }
  const way = chosen.down ? -1 : 1;
  const label = place => {
    const [word] = store.topWords(place);
    return word === undefined ? "\uffff" : store.texts[word];
  };
  const compare = {
    number: (a, b) => store.numbers[a] - store.numbers[b],
    density: (a, b) => store.counts[a] - store.counts[b],
    maximum: (a, b) => store.maxima[a] - store.maxima[b],
    label: (a, b) => (label(a) < label(b) ? -1 : label(a) > label(b) ? 1 : 0),
  }[chosen.key];
  return found.sort((a, b) => (ranks ? ranks[a] - ranks[b] : 0) || way * compare(a, b) || a - b);
}
