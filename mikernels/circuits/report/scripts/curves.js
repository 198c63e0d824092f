// Faithfulness by the size of the circuit: a line for each method, with a band.
each("curves", (section, { sets }) => {
  const canvas = section.querySelector(".canvas");
  const select = section.querySelector("select");
  let given = sets[0];
  const shapes = [d3.symbolCircle, d3.symbolSquare, d3.symbolTriangle, d3.symbolDiamond, d3.symbolStar, d3.symbolCross];
  // chance is told apart from methods
  const tint = i => `var(--c${given.lines[i].name === "random" ? 5 : i % 5})`;
  const dashes = i => (given.lines[i].name === "random" ? "5 4" : null);
  const symbol = i => d3.symbol().type(shapes[i % 6]).size(38)();
  const key = join(only(d3.select(canvas), "key", "div").selectAll("span").data(given.lines), "span");
  key.append("svg").attr("width", 26).attr("height", 12).attr("aria-hidden", true).each(function (line, i) {
    const mark = d3.select(this).style("color", tint(i));
    mark.append("line").attr("x2", 26).attr("y1", 6).attr("y2", 6).attr("stroke", "currentColor").attr("stroke-width", 2)
      .attr("stroke-dasharray", dashes(i));
    mark.append("path").attr("transform", "translate(13,6)").attr("d", symbol(i)).attr("fill", "currentColor");
  });
  key.append("span").text(line => line.name);

  function draw(width) {
    const left = 40, right = 14, top = 12, bottom = 44;
    const height = Math.max(240, Math.min(380, width * .5));
    const finite = given.lines.flatMap(line => line.values.flat().filter(value => value !== null));
    const x = d3.scaleLog().domain(d3.extent(given.fractions)).range([left, width - right]);
    const y = d3.scaleLinear().domain([Math.min(0, d3.min(finite)), Math.max(1, d3.max(finite))]).nice()
      .range([height - bottom, top]);
    const svg = only(d3.select(canvas), "drawing", "svg")
      .attr("viewBox", `0 0 ${width} ${height}`).attr("role", "img")
      .attr("aria-label", `Faithfulness by the share of ${given.level}s kept; the table below has the numbers`);
    svg.html("");
    for (const value of y.ticks(5)) {
      svg.append("line").attr("class", "rule").attr("x1", left).attr("x2", width - right).attr("y1", y(value)).attr("y2", y(value));
      svg.append("text").attr("x", left - 6).attr("y", y(value)).attr("text-anchor", "end").attr("dominant-baseline", "central")
        .style("font-size", "11px").text(d3.format(".2~f")(value));
    }
    svg.append("line").attr("x1", left).attr("x2", width - right).attr("y1", y(1)).attr("y2", y(1))
      .attr("stroke", "var(--soft)").attr("stroke-dasharray", "3 3");
    const few = width < 480;
    given.fractions.forEach((fraction, i) => {
      if (few && i % 3) return;
      svg.append("text").attr("x", x(fraction)).attr("y", height - bottom + 16).attr("text-anchor", "middle")
        .style("font-size", "11px").text(`${d3.format("~r")(+(100 * fraction).toPrecision(3))} %`);
    });
    svg.append("text").attr("x", (left + width - right) / 2).attr("y", height - 8).attr("text-anchor", "middle")
      .style("font-size", "11px").text(`share of all ${given.level}s kept`);
    const place = (_, i) => x(given.fractions[i]);
    given.lines.forEach((line, i) => {
      const group = svg.append("g").style("color", tint(i));
      group.append("path").attr("fill", "currentColor").attr("opacity", .15).attr("d", d3.area().x(place)
        .defined(value => value[1] !== null).y0(value => y(value[1])).y1(value => y(value[2]))(line.values));
      group.append("path").attr("fill", "none").attr("stroke", "currentColor").attr("stroke-width", 2)
        .attr("stroke-dasharray", dashes(i)).attr("d", d3.line().x(place).y(value => y(value[0]))(line.values));
      join(group.selectAll(".mark").data(line.values), "path").attr("class", "mark").attr("d", symbol(i)).attr("fill", "currentColor")
        .attr("transform", (value, j) => `translate(${place(null, j)},${y(value[0])})`);
    });
    const cursor = svg.append("line").attr("y1", top).attr("y2", height - bottom).attr("stroke", "var(--soft)").attr("opacity", 0);
    const number = d3.format(".2f");
    svg.append("rect").attr("x", left - 10).attr("width", width - left - right + 20).attr("y", top).attr("height", height - top)
      .attr("fill", "transparent").on("mousemove", function () {
        const [at] = d3.mouse(this);
        const i = d3.scan(given.fractions, (a, b) => Math.abs(x(a) - at) - Math.abs(x(b) - at));
        cursor.attr("x1", place(null, i)).attr("x2", place(null, i)).attr("opacity", 1);
        const rows = given.lines.map(({ name, values: { [i]: [value, low, high] } }) =>
          `${name}: ${number(value)}${low === null ? "" : ` [${number(low)}, ${number(high)}]`}`);
        tell([`${d3.format(",")(given.sizes[i])} ${given.level}s`, ...rows].join("\n"), d3.event.clientX, d3.event.clientY);
      }).on("mouseleave", () => { cursor.attr("opacity", 0); hush(); });
  }
  if (select) {
    select.addEventListener("input", () => {
      given = sets[+select.value];
      draw(canvas.clientWidth);
    });
  }
  fitted(canvas, draw);
});
