// Those edges that lie on a path from the input to the logits. ends(edge): the nodes that it leads to.
function onPaths(edges, ends, input, logits) {
  // nodes that can be reached, edge by edge until there is no more; then the same from the other end
  function walk(start, from, to) {
    const nodes = new Set([start]);
    const passed = new Set();
    for (let before = -1; before < passed.size; ) {
      before = passed.size;
      for (const edge of edges) {
        if (passed.has(edge) || !from(edge).some(node => nodes.has(node))) continue;
        passed.add(edge);
        to(edge).forEach(node => nodes.add(node));
      }
    }
    return passed;
  }
  const writers = edge => [edge.writer];
  const reached = walk(input, writers, ends);
  const useful = walk(logits, ends, writers);
  return edges.filter(edge => reached.has(edge) && useful.has(edge));
}
