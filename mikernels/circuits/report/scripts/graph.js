// The circuit: a row for each layer, a column for each head and one for MLPs, edges by their strength.
each("graph", (section, given) => {
  const form = section.querySelector("form");
  const canvas = section.querySelector(".canvas");
  const aside = section.querySelector("aside");
  const depth = given.layers.length;
  const heads = d3.max(given.layers, layer => layer[0]);
  const LOGITS = given.writers.length;
  const layerOf = node => (node === LOGITS ? depth : given.writers[node][0]);
  const nameOf = node => (node === LOGITS ? "logits" : given.writers[node][2]);
  // what an edge ends at: the writers made of what it reads, or the logits
  const ends = edge => (edge.reader.feeds.length ? edge.reader.feeds : [LOGITS]);
  const methods = given.methods.map(method => ({
    nodes: method.nodes,
    edges: method.edges.map(([writer, reader, score, low, high, share]) => ({
      writer, reader: given.readers[reader], score, low, high, share,
      name: `${given.writers[writer][2]} → ${given.readers[reader].name}`,
    })),
  }));
  let chosen = null;   // a node, by number
  let pointed = null;  // a node, or an edge
  let current = 0;     // the node that the keyboard is at

  const field = name => form.elements[name];
  const method = () => methods[field("method") ? +field("method").value : 0];

  // edges that can be walked from the input to the logits
  function onPaths(edges) {
    const order = [...edges].sort((a, b) => a.reader.layer - b.reader.layer || a.writer - b.writer);
    const reached = new Set([0]);
    const inward = new Set();
    // within a layer what attention reads comes before what its MLP does, which sorts it
    for (let more = true; more; ) {
      more = false;
      for (const edge of order) {
        if (!reached.has(edge.writer) || inward.has(edge)) continue;
        inward.add(edge);
        ends(edge).forEach(node => reached.add(node));
        more = true;
      }
    }
    const useful = new Set([LOGITS]);
    const both = new Set();
    for (let more = true; more; ) {
      more = false;
      for (const edge of inward) {
        if (both.has(edge) || !ends(edge).some(node => useful.has(node))) continue;
        both.add(edge);
        useful.add(edge.writer);
        more = true;
      }
    }
    return edges.filter(edge => both.has(edge));
  }

  function shown() {
    const [from, to, sign] = ["from", "to", "sign"].map(name => +field(name).value);
    const parts = new Set([...form.querySelectorAll("[name=part]:checked")].map(box => box.value));
    const n = +field("n").value;
    // those of the chosen node too, however weak
    const kept = method().edges.filter((edge, i) =>
      (i < n || chosen !== null && touches(edge, chosen)) && layerOf(edge.writer) >= from && edge.reader.layer <= to
      && (sign === 0 || sign * edge.score > 0) && parts.has(edge.reader.part));
    return field("whole").checked ? onPaths(kept) : kept;
  }

  const touches = (edge, node) => edge.writer === node || ends(edge).includes(node);

  function draw(width) {
    const edges = shown();
    const all = method().edges;
    field("n").max = all.length;
    field("count").value = field("n").value;
    section.querySelector("[name=said]").value = String(edges.length);
    const active = new Set(edges.flatMap(edge => [edge.writer, ...ends(edge)]));
    active.add(0).add(LOGITS);
    if (chosen !== null) active.add(chosen);

    const left = 26, right = 4, top = 42, bottom = 54;
    const columns = heads + 1.4;
    const column = (width - left - right) / columns;
    const row = Math.max(18, Math.min(44, 780 / depth));
    const wide = Math.min(34, column * .78), high = Math.min(16, row * .62);
    const size = Math.min(9.5, wide / 3.3, high * .8);
    const height = top + depth * row + bottom;
    const x = number => left + ((number < 0 ? heads + .4 : number) + .5) * column;
    const y = layer => top + (depth - layer - .5) * row;
    // an MLP comes after the heads of its layer
    const level = node => y(layerOf(node)) - (given.writers[node][1] < 0 ? row / 2 : 0);
    const middle = left + columns * column / 2;
    const centre = node => node === LOGITS ? [middle, 12] : node === 0 ? [middle, height - 16]
      : [x(given.writers[node][1]), level(node)];

    // those that are as wide as the page
    const whole = node => node === 0 || node === LOGITS;

    // where an edge leaves and arrives
    const start = edge => edge.writer === 0
      ? [middle + .92 * (end(edge)[0] - middle), height - 24]
      : [centre(edge.writer)[0], centre(edge.writer)[1] - high / 2];
    function end(edge) {
      const { part, feeds } = edge.reader;
      if (!feeds.length) return [middle + .92 * ((edge.writer ? centre(edge.writer)[0] : middle) - middle), 20];
      const at = d3.mean(feeds, node => centre(node)[0]);
      const below = feeds.length > 1 ? high / 2 + 4 : high / 2;
      return [at + (part === "q" || part === "k" && feeds.length > 1 ? -.22 : part === "v" ? .22 : 0) * wide,
              centre(feeds[0])[1] + below];
    }
    const strength = d3.scaleSqrt().domain([0, d3.max(all, edge => Math.abs(edge.score)) || 1]).range([0, 1]);
    function path(edge) {
      const [x0, y0] = start(edge), [x1, y1] = end(edge);
      const away = y0 - y1;
      // one that would run through nodes of its own column goes around them
      const through = Math.abs(x1 - x0) < column / 2 && [...active].some(node => !whole(node)
        && Math.abs(centre(node)[0] - x1) < column / 2 && centre(node)[1] < y0 - high && centre(node)[1] > y1 + high);
      const bow = through ? (x1 > width - 2 * column ? -1 : 1) * column * .55 : 0;
      const bend = Math.max(8, away * .42);
      return `M${x0},${y0}C${x0 + bow},${y0 - bend} ${x1 + bow},${y1 + bend} ${x1},${y1}`;
    }

    const svg = only(d3.select(canvas), "drawing", "svg").attr("viewBox", `0 0 ${width} ${height}`)
      .attr("role", "group").attr("aria-label", `Circuit of ${edges.length} edges`);
    join(only(svg, "rows").selectAll("text").data(d3.range(depth)), "text").attr("x", left - 8).attr("y", y)
      .attr("text-anchor", "end").attr("dominant-baseline", "central").text(String);
    const named = [...d3.range(heads).filter(h => column > 14 || h % 4 === 0), -1];
    join(only(svg, "columns").selectAll("text").data(named), "text")
      .attr("x", x).attr("y", height - 38).attr("text-anchor", "middle")
      .text(h => (h < 0 ? "MLP" : column > 26 ? `h${h}` : h));
    // the other nodes, so that one sees where there are any
    const others = d3.range(1, LOGITS).filter(node => !active.has(node));
    join(only(svg, "others").selectAll("circle").data(others), "circle")
      .attr("class", "rest").attr("r", 1.8)
      .attr("cx", node => centre(node)[0]).attr("cy", node => centre(node)[1]);
    const shared = new Map(edges.filter(edge => edge.reader.feeds.length > 1)
      .map(edge => [`${edge.reader.layer} ${edge.reader.feeds[0]}`, edge.reader.feeds]));
    join(only(svg, "ports").selectAll("path").data([...shared.values()]), "path")
      .attr("class", "port").attr("d", feeds => {
        const [a, b] = [centre(feeds[0]), centre(feeds[feeds.length - 1])];
        return `M${a[0] - wide / 2},${a[1] + high / 2 + 1}v3H${b[0] + wide / 2}v-3`;
      });
    const bound = only(svg, "edges").selectAll("g").data([...edges].reverse(), edge => edge.name);
    const lines = join(bound, enter => {
      const group = enter.append("g");
      group.append("path").attr("class", "near");
      group.append("path").attr("class", "line");
      return group;
    }).attr("class", edge => `edge${edge.score < 0 ? " against" : ""}`)
      .attr("data-name", edge => edge.name).order();
    lines.select(".near").attr("d", path);
    lines.select(".line").attr("d", path)
      .attr("stroke-width", edge => .6 + 4.4 * strength(Math.abs(edge.score)) ** 2)
      .attr("stroke-opacity", edge => .25 + .65 * strength(Math.abs(edge.score)))
      .attr("stroke-dasharray", edge => (edge.score < 0 ? "5 3" : null));
    lines.on("mousemove", edge => point(edge)).on("mouseleave", () => point(null));

    const most = d3.max(method().nodes.slice(1), Math.abs) || 1;
    const order = [...active].sort((a, b) => a - b);
    const nodes = join(only(svg, "nodes").selectAll("g").data(order, node => node), enter => {
      const group = enter.append("g").attr("role", "button");
      group.append("rect").attr("class", "ground");
      group.append("rect").attr("class", "shade");
      group.append("text");
      return group;
    }).attr("class", "node").attr("data-name", nameOf)
      .attr("transform", node => `translate(${centre(node)})`).order();
    for (const name of [".ground", ".shade"]) nodes.select(name).attr("rx", 4).attr("x", node => (whole(node) ? -.5 * columns * column : -wide / 2))
      .attr("width", node => (whole(node) ? columns * column : wide))
      .attr("y", node => (whole(node) ? -8 : -high / 2)).attr("height", node => (whole(node) ? 16 : high));
    nodes.select(".shade").style("fill", node => whole(node) ? "none"
      : `rgb(var(--${method().nodes[node] < 0 ? "minus" : "plus"}) / ${.65 * Math.abs(method().nodes[node]) / most})`);
    nodes.select("text").text(node => whole(node) ? nameOf(node) : size < 6 ? ""
      : given.writers[node][1] < 0 ? `m${layerOf(node)}` : `${layerOf(node)}.${given.writers[node][1]}`)
      .style("font-size", node => `${whole(node) ? 10 : size}px`);
    nodes.on("mouseenter", node => point(node)).on("mouseleave", () => point(null))
      .on("focus", node => { current = node; point(node); }).on("blur", () => point(null))
      .on("click", choose).on("keydown", node => move(node, [...active], centre));
    mark();

    function mark() {
      if (!active.has(current)) current = 0;
      const lit = pointed === null ? chosen : pointed;
      const near = lit === null ? [] : typeof lit === "object" ? [lit] : edges.filter(edge => touches(edge, lit));
      const around = new Set(near.flatMap(edge => [edge.writer, ...ends(edge)]).concat(typeof lit === "number" ? lit : []));
      svg.classed("pointing", lit !== null);
      lines.classed("on", edge => near.includes(edge));
      nodes.classed("on", node => around.has(node)).classed("chosen", node => node === chosen)
        .attr("tabindex", node => (node === current ? 0 : -1)).attr("aria-pressed", node => node === chosen)
        .attr("aria-label", node => `${nameOf(node)}, ${edges.filter(edge => touches(edge, node)).length} edges`
          + (node === LOGITS ? "" : `, ${signed(method().nodes[node])}`));
    }
    // by the pointer or the keyboard
    function point(what) {
      pointed = what;
      mark();
      if (what === null) return hush();
      const at = d3.event;
      if (typeof what === "object") {
        const sure = what.low === null ? "" : `\n95 % interval ${between(what.low, what.high)}`;
        const stays = what.share === null ? "" : `\nin the top ${all.length} of ${d3.format(".0%")(what.share)} of bootstrap samples`;
        tell(`${what.name}  ${signed(what.score)}${sure}${stays}`, at.clientX, at.clientY);
      } else if (at.clientX !== undefined) {
        const score = what === LOGITS ? "" : `  ${signed(method().nodes[what])}`;
        tell(`${nameOf(what)}${score}`, at.clientX, at.clientY);
      }
    }
    function choose(node) {
      chosen = node === chosen ? null : node;
      list();
      draw(width);
    }
    function move(node, among, place) {
      const step = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[d3.event.key];
      if (d3.event.key === "Enter" || d3.event.key === " ") choose(node);
      else if (d3.event.key === "Escape") { chosen = null; list(); draw(width); }
      else if (!step) return;
      d3.event.preventDefault();
      if (!step) return;
      const [a, b] = place(node);
      const far = other => {
        const [c, d] = place(other);
        const along = (c - a) * step[0] + (d - b) * step[1];
        return along < 1 ? Infinity : along + 3 * Math.abs((c - a) * step[1]) + 3 * Math.abs((d - b) * step[0]);
      };
      const next = among.filter(other => far(other) < Infinity).sort((p, q) => far(p) - far(q))[0];
      if (next !== undefined) svg.selectAll(".node").filter(other => other === next).node().focus();
    }
  }

  // the edges of the chosen node, all of those that the page has
  function list() {
    const panel = d3.select(aside);
    panel.html("");
    const lists = chosen === null
      ? [["the strongest edges", method().edges.slice(0, 20), edge => edge.name, edge => edge.writer]]
      : [
        ["reads from", method().edges.filter(edge => ends(edge).includes(chosen)),
         edge => `${nameOf(edge.writer)} → ${edge.reader.part}`, edge => edge.writer],
        ["is read by", method().edges.filter(edge => edge.writer === chosen),
         edge => edge.reader.name, edge => ends(edge)[0]],
      ];
    panel.append("h3").text(chosen === null ? "All nodes" : nameOf(chosen));
    panel.append("p").attr("class", "soft").text(chosen === null ? "Click a node for its edges."
      : chosen === LOGITS ? "what the final norm reads" : `adds ${signed(method().nodes[chosen])}`);
    for (const [title, edges, text, other] of lists) {
      if (!edges.length) continue;
      panel.append("h4").text(title);
      const rows = join(panel.append("table").append("tbody").selectAll("tr").data(edges), "tr");
      rows.append("td").append("button").attr("class", "name").attr("type", "button").text(text)
        .on("click", edge => { chosen = other(edge); list(); draw(canvas.clientWidth); });
      rows.append("td").attr("class", edge => (edge.score < 0 ? "minus" : "plus")).text(edge => signed(edge.score));
      rows.append("td").attr("class", "soft").text(edge => (edge.share === null ? "" : d3.format(".0%")(edge.share)));
    }
  }

  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("input", () => { list(); draw(canvas.clientWidth); });
  list();
  fitted(canvas, draw);
});
