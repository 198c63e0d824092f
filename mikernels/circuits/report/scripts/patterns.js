// Attention: a map of tokens by tokens for each head.
each("patterns", (section, given) => {
  const { tokens } = given;
  const n = tokens.length;
  const plain = token => token.replace(/\n/g, "↵").replace(/\t/g, "⇥");
  for (const head of given.heads) {
    const figure = d3.select(section.querySelector(".heads")).append("figure");
    figure.append("figcaption").html("").text(`${head.name} ${head.note}`);
    const box = figure.append("div").node();
    const canvas = d3.select(box).append("canvas").attr("role", "img").attr("tabindex", 0)
      .attr("aria-label", `What ${head.name} attends to, ${n} tokens by ${n}`).node();
    const said = figure.append("output").node();
    let cell = null, margin = 0, side = 0;

    function draw(width) {
      const scale = devicePixelRatio || 1;
      const pen = canvas.getContext("2d");
      const sans = getComputedStyle(document.body).fontFamily;
      const letters = Math.max(7, Math.min(11, width * .7 / n));
      pen.font = `${letters}px ${sans}`;
      margin = Math.min(width * .28, 6 + d3.max(tokens, token => pen.measureText(plain(token)).width));
      side = Math.min(22, (width - margin) / n);
      const extent = margin + side * n;
      canvas.width = width * scale;
      canvas.height = extent * scale;
      canvas.style.height = `${extent}px`;
      pen.setTransform(scale, 0, 0, scale, 0, 0);
      pen.font = `${letters}px ${sans}`;
      const key = colour("--key").split(" ").join(", ");
      const [soft, ink, line] = ["--soft", "--ink", "--line"].map(colour);
      pen.textBaseline = "middle";
      // every label where there is room
      const every = Math.ceil((letters + 1) / side);
      tokens.forEach((token, i) => {
        const lit = cell && (i === cell[0] || i === cell[1]);
        if (i % every && !lit) return;
        pen.fillStyle = lit ? ink : soft;
        const at = margin + (i + .5) * side;
        pen.textAlign = "right";
        if (!cell || !lit || i === cell[0]) pen.fillText(plain(token), margin - 4, at, margin - 4);
        pen.save();
        pen.translate(at, margin - 4);
        pen.rotate(-Math.PI / 2);
        pen.textAlign = "left";
        if (!cell || !lit || i === cell[1]) pen.fillText(plain(token), 0, 0, margin - 4);
        pen.restore();
      });
      head.rows.forEach((row, i) => row.forEach((value, j) => {
        if (value < .002) return;
        pen.fillStyle = `rgba(${key}, ${value})`;
        pen.fillRect(margin + j * side, margin + i * side, side - .5, side - .5);
      }));
      pen.strokeStyle = line;
      pen.strokeRect(margin - .5, margin - .5, side * n + 1, side * n + 1);
      if (cell) {
        pen.strokeStyle = colour("--c0");
        pen.lineWidth = 1.5;
        pen.strokeRect(margin + cell[1] * side, margin + cell[0] * side, side, side);
      }
    }

    function at(i, j) {
      cell = i === null || i < 0 || j < 0 || i >= n || j >= n ? null : [i, j];
      said.value = cell === null ? ""
        : `“${plain(tokens[i])}” attends to “${plain(tokens[j])}”: ${d3.format(".1%")(head.rows[i][j])}`;
      draw(box.clientWidth);
    }
    const inside = (position, start) => Math.floor((position - start - margin) / side);
    canvas.addEventListener("pointermove", event => {
      const bounds = canvas.getBoundingClientRect();
      at(inside(event.clientY, bounds.top), inside(event.clientX, bounds.left));
    });
    canvas.addEventListener("pointerleave", () => at(null));
    canvas.addEventListener("blur", () => at(null));
    canvas.addEventListener("keydown", event => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const [i, j] = cell || [n - 1, 0];
      const within = number => Math.max(0, Math.min(n - 1, number));
      at(within(i + step[0]), within(j + step[1]));
    });
    fitted(box, draw);
  }
});
