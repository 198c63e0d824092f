// The circuit as a graph: what is drawn of it, what is pointed at, and the list beside it.
each("graph", (section, given) => {
  const form = section.querySelector("form");
  const canvas = section.querySelector(".canvas");
  const aside = section.querySelector("aside");
  const { writers } = given;
  // nodes are numbers, those of the writers; the logits come after them
  const LOGITS = writers.length;
  const circuit = { writers, LOGITS, depth: given.layers.length, heads: d3.max(given.layers, layer => layer[0]) };
  const layerOf = node => (node === LOGITS ? circuit.depth : writers[node][0]);
  const nameOf = node => (node === LOGITS ? "logits" : writers[node][2]);
  const shortOf = node => (writers[node][1] < 0 ? `m${layerOf(node)}` : `${layerOf(node)}.${writers[node][1]}`);
  // what an edge ends at: the writers made of what is read, or the logits
  const ends = edge => (edge.reader.feeds.length ? edge.reader.feeds : [LOGITS]);
  const touches = (edge, node) => edge.writer === node || ends(edge).includes(node);
  const methods = given.methods.map(method => ({
    nodes: method.nodes,
    edges: method.edges.map(([writer, reader, score, low, high, share]) => ({
      writer, reader: given.readers[reader], score, low, high, share,
      name: `${writers[writer][2]} → ${given.readers[reader].name}`,
    })),
  }));
  let chosen = null;   // a node
  let pointed = null;  // a node, or an edge
  let current = 0;     // the node that the keyboard is at

  const field = name => form.elements[name];
  const method = () => methods[field("method") ? +field("method").value : 0];
  const scoreOf = node => (node === LOGITS ? "" : signed(method().nodes[node]));
  const again = () => { list(); draw(canvas.clientWidth); };

  function choose(node) {
    chosen = node === chosen ? null : node;
    again();
  }

  // the edges that the filters let through
  function shown() {
    const [n, from, to, sign] = ["n", "from", "to", "sign"].map(name => +field(name).value);
    const parts = new Set([...form.querySelectorAll("[name=part]:checked")].map(box => box.value));
    const kept = method().edges.filter((edge, i) =>
      // those of the chosen node too, however weak
      (i < n || (chosen !== null && touches(edge, chosen)))
      && layerOf(edge.writer) >= from && edge.reader.layer <= to
      && (sign === 0 || sign * edge.score > 0) && parts.has(edge.reader.part));
    return field("whole").checked ? onPaths(kept, ends, 0, LOGITS) : kept;
  }

  function draw(width) {
    const edges = shown();
    const all = method().edges;
    const drawn = new Set([0, LOGITS, ...edges.flatMap(edge => [edge.writer, ...ends(edge)])]);
    if (chosen !== null) drawn.add(chosen);
    const active = [...drawn].sort((a, b) => a - b);
    if (!drawn.has(current)) current = 0;
    const at = layout(circuit, active, width);
    field("n").max = all.length;
    field("count").value = field("n").value;
    section.querySelector("[name=said]").value = String(edges.length);

    const svg = only(d3.select(canvas), "drawing", "svg").attr("viewBox", `0 0 ${width} ${at.height}`)
      .attr("role", "group").attr("aria-label", `Circuit of ${edges.length} edges`);
    join(only(svg, "rows").selectAll("text").data(d3.range(circuit.depth)), "text")
      .attr("x", at.left - 8).attr("y", at.y)
      .attr("text-anchor", "end").attr("dominant-baseline", "central").text(String);
    const named = [...d3.range(circuit.heads).filter(h => at.column > 14 || h % 4 === 0), -1];
    join(only(svg, "columns").selectAll("text").data(named), "text")
      .attr("x", h => Math.min(at.x(h), width - 11)).attr("y", at.height - 38).attr("text-anchor", "middle")
      .text(h => (h < 0 ? "MLP" : at.column > 26 ? `h${h}` : h));
    // the other nodes, so that one sees where there are any
    join(only(svg, "others").selectAll("circle").data(d3.range(1, LOGITS).filter(node => !drawn.has(node))), "circle")
      .attr("class", "rest").attr("r", 1.8)
      .attr("cx", node => at.centre(node)[0]).attr("cy", node => at.centre(node)[1]);
    const groups = new Map(edges.map(edge => edge.reader.feeds).filter(feeds => feeds.length > 1)
      .map(feeds => [feeds[0], feeds]));
    join(only(svg, "ports").selectAll("path").data([...groups.values()]), "path")
      .attr("class", "port").attr("d", at.bracket);
    const lines = drawEdges(svg, edges, at, d3.max(all, edge => Math.abs(edge.score)) || 1);
    const nodes = drawNodes(svg, active, at);
    lines.on("mousemove", point).on("mouseleave", () => point(null));
    nodes.on("mouseenter", point).on("mouseleave", () => point(null)).on("click", choose)
      .on("focus", node => point((current = node))).on("blur", () => point(null))
      .on("keydown", node => press(node, at, nodes));
    mark();

    // what is pointed at, or chosen, among the rest
    function mark() {
      const lit = pointed === null ? chosen : pointed;
      const near = lit === null ? [] : typeof lit === "object" ? [lit] : edges.filter(edge => touches(edge, lit));
      const around = new Set([lit, ...near.flatMap(edge => [edge.writer, ...ends(edge)])]);
      svg.classed("pointing", lit !== null);
      lines.classed("on", edge => near.includes(edge));
      nodes.classed("on", node => around.has(node)).classed("chosen", node => node === chosen)
        .attr("tabindex", node => (node === current ? 0 : -1)).attr("aria-pressed", node => node === chosen)
        .attr("aria-label", node =>
          `${nameOf(node)}, ${edges.filter(edge => touches(edge, node)).length} edges, ${scoreOf(node)}`);
    }

    // by the pointer, or by the keyboard, which is nowhere in the window
    function point(what) {
      pointed = what;
      mark();
      const { clientX, clientY } = d3.event;
      if (what === null || clientX === undefined) hush();
      else tell(typeof what === "object" ? told(what) : `${nameOf(what)}  ${scoreOf(what)}`, clientX, clientY);
    }

    function told({ name, score, low, high, share }) {
      const percent = d3.format(".0%");
      return `${name}  ${signed(score)}`
        + (low === null ? "" : `\n95 % interval ${between(low, high)}`)
        + (share === null ? "" : `\nin the top ${all.length} of ${percent(share)} of bootstrap samples`);
    }
  }

  function drawEdges(svg, edges, at, most) {
    const strength = edge => Math.abs(edge.score) / most;
    // the strongest are drawn last, above the others
    const bound = only(svg, "edges").selectAll("g").data([...edges].reverse(), edge => edge.name);
    const lines = join(bound, enter => {
      const group = enter.append("g");
      // a wide one to point at
      group.append("path").attr("class", "near");
      group.append("path").attr("class", "line");
      return group;
    }).attr("class", edge => `edge${edge.score < 0 ? " against" : ""}`).attr("data-name", edge => edge.name).order();
    lines.select(".near").attr("d", at.path);
    lines.select(".line").attr("d", at.path)
      .attr("stroke-width", edge => .6 + 4.4 * strength(edge))
      .attr("stroke-opacity", edge => .25 + .65 * Math.sqrt(strength(edge)))
      .attr("stroke-dasharray", edge => (edge.score < 0 ? "5 3" : null));
    return lines;
  }

  function drawNodes(svg, active, at) {
    const { nodes: scores } = method();
    const most = d3.max(scores.slice(1), Math.abs) || 1;
    const shade = node => `rgb(var(--${scores[node] < 0 ? "minus" : "plus"}) / ${.65 * Math.abs(scores[node]) / most})`;
    const wide = node => (at.whole(node) ? at.columns * at.column : at.wide);
    const high = node => (at.whole(node) ? 16 : at.high);
    const nodes = join(only(svg, "nodes").selectAll("g").data(active, node => node), enter => {
      const group = enter.append("g").attr("role", "button");
      group.append("rect").attr("class", "ground");
      group.append("rect").attr("class", "shade");
      group.append("text");
      return group;
    }).attr("class", "node").attr("data-name", nameOf)
      .attr("transform", node => `translate(${at.centre(node)})`).order();
    for (const name of [".ground", ".shade"]) {
      nodes.select(name).attr("rx", 4).attr("width", wide).attr("height", high)
        .attr("x", node => -wide(node) / 2).attr("y", node => -high(node) / 2);
    }
    nodes.select(".shade").style("fill", node => (at.whole(node) ? "none" : shade(node)));
    nodes.select("text").style("font-size", node => `${at.whole(node) ? 10 : at.letters}px`)
      .text(node => (at.whole(node) ? nameOf(node) : at.letters ? shortOf(node) : ""));
    return nodes;
  }

  function press(node, at, nodes) {
    const { key } = d3.event;
    const step = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[key];
    if (!step && !["Enter", " ", "Escape"].includes(key)) return;
    d3.event.preventDefault();
    if (step) {
      const next = at.next(node, step);
      if (next !== null) nodes.filter(other => other === next).node().focus();
    } else choose(key === "Escape" ? chosen : node);
  }

  // beside the drawing: the edges of the chosen node, or the strongest of all
  function list() {
    const { edges } = method();
    const panel = d3.select(aside);
    panel.html("");
    if (chosen === null) {
      panel.append("h3").text("All nodes");
      panel.append("p").attr("class", "soft").text("Click a node for its edges.");
      table("the strongest edges", edges.slice(0, 20), edge => edge.name, edge => edge.writer);
      return;
    }
    panel.append("h3").text(nameOf(chosen));
    panel.append("p").attr("class", "soft").text(chosen === LOGITS ? "what the final norm reads" : `adds ${scoreOf(chosen)}`);
    table("reads from", edges.filter(edge => ends(edge).includes(chosen)),
      edge => `${nameOf(edge.writer)} → ${edge.reader.part}`, edge => edge.writer);
    table("is read by", edges.filter(edge => edge.writer === chosen), edge => edge.reader.name, edge => ends(edge)[0]);

    function table(title, some, text, other) {
      if (!some.length) return;
      panel.append("h4").text(title);
      const rows = join(panel.append("table").append("tbody").selectAll("tr").data(some), "tr");
      rows.append("td").append("button").attr("class", "name").attr("type", "button").text(text)
        .on("click", edge => { chosen = other(edge); again(); });
      rows.append("td").attr("class", edge => (edge.score < 0 ? "minus" : "plus")).text(edge => signed(edge.score));
      rows.append("td").attr("class", "soft").text(edge => (edge.share === null ? "" : d3.format(".0%")(edge.share)));
    }
  }

  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("input", again);
  list();
  fitted(canvas, draw);
});
