// Where nodes and edges are in a drawing of some width: layers upwards, heads side by side, MLPs last.
// active: the nodes that are drawn whole, which edges go around.
function layout(circuit, active, width) {
  const { depth, heads, writers, LOGITS } = circuit;
  const left = 26, right = 4, top = 42, bottom = 54;
  const columns = heads + 1.4;
  const column = (width - left - right) / columns;
  const row = Math.max(18, Math.min(44, 780 / depth));
  const wide = Math.min(34, column * .78);
  const high = Math.min(16, row * .62);
  const height = top + depth * row + bottom;
  const middle = left + columns * column / 2;
  const x = number => left + ((number < 0 ? heads + .4 : number) + .5) * column;
  const y = layer => top + (depth - layer - .5) * row;

  // the input and the logits are as wide as the drawing
  const whole = node => node === 0 || node === LOGITS;

  function centre(node) {
    if (whole(node)) return [middle, node === 0 ? height - 16 : 12];
    const [layer, number] = writers[node];
    // an MLP comes after the heads of its layer
    return [x(number), y(layer) - (number < 0 ? row / 2 : 0)];
  }

  // on the edge of what is as wide as the drawing, near to what is at the other end
  const beside = at => middle + .92 * (at - middle);

  function end(edge) {
    const { part, feeds } = edge.reader;
    if (!feeds.length) return [beside(edge.writer ? centre(edge.writer)[0] : middle), 20];
    // keys and values of a group are read below all of its heads
    const shared = feeds.length > 1;
    const at = d3.mean(feeds, node => centre(node)[0]);
    const aside = part === "q" || (part === "k" && shared) ? -.22 : part === "v" ? .22 : 0;
    return [at + aside * wide, centre(feeds[0])[1] + high / 2 + (shared ? 4 : 0)];
  }

  function start(edge) {
    if (edge.writer === 0) return [beside(end(edge)[0]), height - 24];
    const [a, b] = centre(edge.writer);
    return [a, b - high / 2];
  }

  function path(edge) {
    const [x0, y0] = start(edge), [x1, y1] = end(edge);
    // one that would run through nodes of its own column goes around them
    const through = Math.abs(x1 - x0) < column / 2 && active.some(node => {
      const [a, b] = centre(node);
      return !whole(node) && Math.abs(a - x1) < column / 2 && b < y0 - high && b > y1 + high;
    });
    const bow = through ? (x1 > width - 2 * column ? -.55 : .55) * column : 0;
    const bend = Math.max(8, (y0 - y1) * .42);
    return `M${x0},${y0}C${x0 + bow},${y0 - bend} ${x1 + bow},${y1 + bend} ${x1},${y1}`;
  }

  // under the heads of a group
  function bracket(feeds) {
    const [a, b] = [centre(feeds[0]), centre(feeds[feeds.length - 1])];
    return `M${a[0] - wide / 2},${a[1] + high / 2 + 1}v3H${b[0] + wide / 2}v-3`;
  }

  // the node that is next in a direction: what is aside counts as far away
  function next(node, [right, down]) {
    const [a, b] = centre(node);
    const far = other => {
      const [c, d] = centre(other);
      const along = (c - a) * right + (d - b) * down;
      return along < 1 ? Infinity : along + 3 * Math.abs((c - a) * down) + 3 * Math.abs((d - b) * right);
    };
    const there = active.filter(other => far(other) < Infinity);
    return there.length ? there[d3.scan(there, (p, q) => far(p) - far(q))] : null;
  }

  // letters of a node, in pixels; too small to be read: none
  const letters = Math.min(9.5, wide / 3.3, high * .8);
  return {
    left, height, column, columns, wide, high, letters: letters < 6 ? 0 : letters,
    x, y, whole, centre, path, bracket, next,
  };
}
