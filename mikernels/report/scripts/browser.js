// The page: a list of features to search, sort and filter, and one feature at a time.
const ROWS = 50;
const at = id => document.getElementById(id);
const TITLE = document.title;

function start(index) {
  const store = new Store(index);
  const chosen = { query: "", where: "all", kind: "all", band: null, key: "number", down: false };
  let list = [], page = 0, current = -1, asked = 0, shown = 0;

  // the list
  function row(place) {
    const number = store.numbers[place];
    const tops = store.topWords(place).slice(0, 3).map(word => chip(store.words[word]));
    const link = make("a", { href: `#f${number}` }, `${number}`);
    const made = make("tr", { "data-number": number },
      make("td", {}, link), make("td", { class: "chips" }, store.counts[place] ? make("div", {}, ...tops) : "did not fire"),
      make("td", {}, percent(store.density(place))), make("td", {}, short(store.maxima[place])));
    if (place === current) made.setAttribute("aria-current", "true");
    return made;
  }

  function turn(to) {
    const pages = Math.max(1, Math.ceil(list.length / ROWS));
    page = Math.max(0, Math.min(pages - 1, to));
    const first = page * ROWS, places = list.slice(first, first + ROWS);
    at("rows").replaceChildren(...places.map(row));
    at("none").hidden = list.length > 0;
    at("which").textContent = list.length ? `${whole(first + 1)}–${whole(first + places.length)} of ${whole(list.length)}` : "";
    for (const [id, stop] of [["first", page === 0], ["before", page === 0], ["after", page === pages - 1], ["last", page === pages - 1]]) {
      at(id).disabled = stop;
    }
    at("turns").hidden = pages < 2;
    at("scroller").scrollTop = 0;
  }

  async function find() {
    const mine = ++asked;
    const needs = chosen.query.trim() && index.promoted && ["all", "promoted"].includes(chosen.where);
    const show = promoted => {
      list = listed(store, chosen, promoted);
      at("status").textContent = list.length === store.n ? `${whole(store.n)} features` : `${whole(list.length)} of ${whole(store.n)} features`;
      turn(0);
      place();
    };
    show(store.promoted);
    if (!needs || store.promoted) return;
    try {
      await store.withPromoted();
      if (mine === asked) show(store.promoted);
    } catch (error) {
      at("status").textContent = error.message;
    }
  }

  function sortBy(key, down) {
    Object.assign(chosen, { key, down });
    at("sort").value = `${key}${down ? "-" : ""}`;
    for (const head of document.querySelectorAll("th[data-key]")) {
      head.setAttribute("aria-sort", head.dataset.key !== key ? "none" : down ? "descending" : "ascending");
    }
    find();
  }

  // one feature
  const known = number => {
    const place = store.places.get(number);
    return place === undefined ? null : store.topWords(place).slice(0, 2).map(word => chip(store.words[word]));
  };

  function place() {
    const there = list.indexOf(current);
    at("place").textContent = current < 0 ? "" : there < 0 ? "not in the list" : `${whole(there + 1)} of ${whole(list.length)}`;
  }

  async function look(number) {
    const found = store.places.get(number);
    const mine = ++shown;
    document.body.classList.add("looking");
    current = found === undefined ? -1 : found;
    const there = list.indexOf(current);
    if (there >= 0 && Math.floor(there / ROWS) !== page) turn(Math.floor(there / ROWS));
    for (const made of at("rows").children) {
      if (Number(made.dataset.number) === number) made.setAttribute("aria-current", "true");
      else made.removeAttribute("aria-current");
    }
    place();
    document.title = `Feature ${number} · ${TITLE}`;
    if (found === undefined) {
      at("card").replaceChildren(make("p", { class: "message" }, `Feature ${number} is not in this report, which has ${whole(store.n)} features.`));
      return;
    }
    try {
      const [feature, words] = await store.feature(found);
      if (mine === shown) at("card").replaceChildren(card(feature, words, { known, unit: store.unit }));
    } catch (error) {
      if (mine === shown) at("card").replaceChildren(make("p", { class: "message" }, `${error.message}.`));
    }
  }

  function go(place) {
    if (place === undefined) return;
    const target = `#f${store.numbers[place]}`;
    if (location.hash === target) return;
    location.hash = target;
    // at once: hashchange comes later, and keys may be faster
    current = place;
  }
  function step(by) {
    const there = list.indexOf(current);
    if (!list.length) return;
    go(there < 0 ? list[0] : list[(there + by + list.length) % list.length]);
  }
  const random = () => go(list[Math.floor(Math.random() * list.length)]);

  function route(first) {
    const number = /^#f(\d+)$/.exec(location.hash);
    if (number) {
      look(Number(number[1]));
      // a new card is read from its top
      const top = at("features").getBoundingClientRect().top;
      if (first || top < 0) at("features").scrollIntoView();
      return;
    }
    document.body.classList.remove("looking");
    document.title = TITLE;
    shown += 1;
  }

  function leave() {
    const number = current;
    history.pushState(null, "", location.pathname + location.search);
    route(false);
    current = -1;
    at("card").replaceChildren();
    turn(Math.max(0, Math.floor(list.indexOf(number) / ROWS)));
    place();
    const link = document.querySelector(`tr[data-number="${store.numbers[number]}"] a`);
    if (link) link.focus();
  }

  async function copy() {
    // the page's own address works from a disk, where the clipboard may not be had
    let done = true;
    try {
      await navigator.clipboard.writeText(location.href);
    } catch {
      done = false;
    }
    at("copy").textContent = done ? "Copied" : "In the address bar";
    setTimeout(() => { at("copy").textContent = "Copy link"; }, 1500);
  }

  const bins = densities(store, at("densities"), band => {
    chosen.band = band;
    find();
  });
  for (const option of at("kind").options) {
    let n = 0;
    for (let i = 0; i < store.n; i++) n += KINDS[option.value](store.density(i));
    option.textContent += ` (${whole(n)})`;
  }
  let typed = 0;
  at("query").addEventListener("input", event => {
    clearTimeout(typed);
    typed = setTimeout(() => {
      chosen.query = event.target.value;
      find();
    }, 120);
  });
  at("finder").addEventListener("submit", event => {
    event.preventDefault();
    clearTimeout(typed);
    chosen.query = at("query").value;
    find().then(() => go(list[0]));
  });
  at("where").addEventListener("change", event => { chosen.where = event.target.value; find(); });
  at("kind").addEventListener("change", event => {
    Object.assign(chosen, { kind: event.target.value, band: null });
    bins.clear();
    find();
  });
  at("sort").addEventListener("change", event => sortBy(event.target.value.replace("-", ""), event.target.value.endsWith("-")));
  for (const head of document.querySelectorAll("th[data-key]")) {
    head.querySelector("button").addEventListener("click", () => {
      const { key } = head.dataset;
      // the largest first, texts and numbers from the start
      sortBy(key, key === chosen.key ? !chosen.down : key === "density" || key === "maximum");
    });
  }
  at("rows").addEventListener("click", event => {
    const made = event.target.closest("tr");
    if (made && !event.target.closest("a") && !getSelection().toString()) go(store.places.get(Number(made.dataset.number)));
  });
  at("first").addEventListener("click", () => turn(0));
  at("before").addEventListener("click", () => turn(page - 1));
  at("after").addEventListener("click", () => turn(page + 1));
  at("last").addEventListener("click", () => turn(Infinity));
  at("previous").addEventListener("click", () => step(-1));
  at("next").addEventListener("click", () => step(1));
  at("random").addEventListener("click", random);
  at("copy").addEventListener("click", copy);
  at("back").addEventListener("click", leave);
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea");
    if (event.key === "Escape" && document.body.classList.contains("looking")) return leave();
    if (typing) return;
    const action = { ArrowLeft: () => step(-1), k: () => step(-1), ArrowRight: () => step(1), j: () => step(1), r: random,
      "/": () => { if (document.body.classList.contains("looking") && at("back").offsetParent) leave(); at("query").focus(); } }[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
  addEventListener("hashchange", () => route(false));

  hints();
  sortBy("number", false);
  route(true);
  document.body.classList.add("ready");
}

load("index").then(start, error => {
  at("status").textContent = error.message;
});
