# SPDX-License-Identifier: Apache-2.0
"""The page about circuits: what it says is what the circuits hold."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from report_cases import GRAPH, TOKENS, circuit, curve, patterns, tokens

from mikernels.circuits import write_report
from mikernels.circuits.report.graph import components
from mikernels.models.graph import Graph, Layer

# heads by themselves and in groups, no MLP in one layer, another number of heads in another
SMALL = Graph("Tiny", 8, (Layer(2, 2), Layer(4, 2, mlp=False), Layer(2, 1, parallel=True)))


def drawn(page):
    """What the page's script draws, by the number of the part."""
    return json.loads(re.search(r'id="drawn">(.*?)</script>', page)[1])


def graph_of(page):
    return next(part for part in drawn(page).values() if "writers" in part)


def test_edges_are_the_strongest_with_what_the_bootstrap_says_of_them():
    found = circuit("gim", graph=SMALL)
    page = write_report([found, circuit("eap", 1, SMALL)], edges=12)
    graph = graph_of(page)
    assert [method["name"] for method in graph["methods"]] == ["gim", "eap"]
    scores, samples = found.scores.double().numpy(), found.replicates.double().numpy()
    order = np.argsort(-abs(scores), axis=None, kind="stable")[:12]
    at = np.stack(np.unravel_index(order, scores.shape), 1).tolist()
    edges = graph["methods"][0]["edges"]
    assert [edge[:2] for edge in edges] == at
    for (w, r), (_, _, score, low, high, share) in zip(at, edges, strict=True):
        assert score == pytest.approx(scores[w, r], rel=1e-3)
        own = np.quantile(samples[:, w, r], [0.025, 0.975])
        assert [low, high] == pytest.approx(own, rel=1e-3)
        strong = [abs(s[w, r]) >= np.sort(abs(s), None)[-12] for s in samples]
        assert share == pytest.approx(np.mean(strong), rel=1e-3)
        name = f"{SMALL.writers[w]} → {SMALL.readers[r]}"
        assert f"<td>{name}</td><td>{scores[w, r]:+.4f}"[:-1] in page
        # a reader with the writers made of it
        reader = graph["readers"][str(r)]
        assert reader["name"] == SMALL.readers[r] and reader["feeds"] == list(SMALL.feeds[r])
    assert graph["methods"][0]["nodes"] == pytest.approx(scores.sum(1).tolist(), rel=1e-3)
    assert [name for *_, name in graph["writers"]] == list(SMALL.writers)
    assert graph["writers"][-1][:2] == [2, -1] and graph["writers"][1][:2] == [0, 0]


def test_components_are_sums_of_edges_and_the_input_is_none():
    found = circuit("gim", graph=SMALL)
    rows = components(found, 4)
    units = found.replicates.double().sum(-1).numpy()
    total = found.scores.double().sum(-1)
    best = sorted(range(1, len(total)), key=lambda i: -abs(total[i]))[:4]
    assert [name for name, _, _ in rows] == [SMALL.writers[i] for i in best]
    for i, (_, score, share) in zip(best, rows, strict=True):
        own = [total[i].item(), *np.quantile(units[:, i], [0.025, 0.975])]
        assert list(score) == pytest.approx(own, rel=1e-4)
        strong = [abs(u[i]) >= np.sort(abs(u[1:]))[-4] for u in units]
        assert share == pytest.approx(np.mean(strong))


def test_nodes_and_no_replicates_and_nothing_that_acts():
    edge = circuit("gim", graph=SMALL, replicates=0)
    page = write_report([edge])
    assert "<th>95 % interval" not in page and "<td>nan" not in page
    assert all(low is None for *_, low, _, _ in graph_of(page)["methods"][0]["edges"])
    node = replace(
        edge, level="node", scores=edge.scores.sum(1), replicates=edge.replicates.sum(-1)
    )
    assert "<script" not in write_report([node])
    assert len(components(node, 3)) == 3
    assert components(replace(node, scores=0 * node.scores), 3) == []
    none = write_report([replace(edge, scores=0 * edge.scores)])
    assert graph_of(none)["methods"][0]["edges"] == []


def test_nothing_of_a_prompt_ends_the_script_or_opens_a_tag(tmp_path):
    names = [name for name, _, _ in components(circuit("gim"), 9) if ".h" in name]
    page = write_report(
        [circuit("gim")], tmp_path / "page.html", title="</title><script>", tokens=tokens(),
        patterns=patterns(names[:2]), curves=[curve("gim", 1.1)],
        known={"prompt": "".join(TOKENS)}, command="mikernels circuits --prompt '</script>'",
    )  # fmt: skip
    assert page == (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script>") == 2 and "<b>" not in page
    (attention,) = (part for part in drawn(page).values() if "tokens" in part)
    assert attention["tokens"] == TOKENS and [h["name"] for h in attention["heads"]] == names[:2]
    assert not re.search(r"\b(src|href)=\"(?!#)", page)


def test_circuits_of_two_models_are_no_page():
    with pytest.raises(
        ValueError, match=r"circuits must be of one graph and level, got edges of Tiny"
    ):
        write_report([circuit("gim", graph=GRAPH, replicates=0), circuit("eap", graph=SMALL)])
    with pytest.raises(ValueError, match=r"write_report: circuits must be one at least, got none"):
        write_report([])


def test_the_library_is_asked_for_only_by_pages_that_draw(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = circuit("gim", graph=SMALL)
    with pytest.raises(ModuleNotFoundError, match=r"write_report: mpld3 .*'mikernels\[report\]'"):
        write_report([found])
    assert torch.equal(found.scores, circuit("gim", graph=SMALL).scores)
