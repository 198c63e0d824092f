# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, judge before they time, and their files can be read back and drawn."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from full_disk import largest_file
from typer.testing import CliRunner

import mikernels
from mikernels.bench import load, names
from mikernels.bench.cli import app
from mikernels.bench.harness import correctness, harness, memory, peers, report, results, stats
from mikernels.bench.harness.spec import SHAPES, Provider, Runner, Unavailable

SMOKE = SHAPES["smoke"]
QUICK = harness.Options(rounds=2, budget=0.0, memory=False)


def invoke(*words: object) -> tuple[int, str]:
    """Exit code and output, free of the boxes and line breaks of a terminal."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"[\s│╭╮╰╯─]+", " ", result.output)


def without_compile(*ops: str) -> str:
    """Inductor takes seconds a kernel; one test of its own is enough."""
    known = {contender.name for op in ops for contender in harness.contenders(load(op))}
    return ",".join(sorted(known - {"compile"}))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results file with every op at the smoke shape, two rounds."""
    path = tmp_path_factory.mktemp("bench") / "new" / "smoke.json"
    words = ["--shape", "smoke", "--rounds", 2, "--budget", 0, "--no-memory", "--json", path]
    code, output = invoke("all", *words, "--providers", without_compile(*names()))
    assert code == 0, output
    return path


@pytest.mark.parametrize("op", names())
def test_bench_check(op: str) -> None:
    code, output = invoke(op, "--shape", "smoke", "--check", "--providers", without_compile(op))
    assert code == 0, output
    for mode in load(op).modes:
        assert f"{op} {mode} smoke" in output
    # the gate alone: no times
    assert "GFLOP/s" not in output


def test_bench_json_holds_everything(measured: Path) -> None:
    file = results.load(measured)
    assert json.loads(json.dumps(file)) == file
    assert {"cpu", "flags", "cores", "memory_gb", "torch", "git", "build", "load", "date"} <= set(
        file["machine"]
    )
    assert file["peaks"]["all"]["fma_gflops"] > 0
    cases = {(case["op"], case["mode"]): case for case in file["cases"]}
    assert set(cases) == {(op, mode) for op in names() for mode in load(op).modes}
    for case in cases.values():
        shown = [p["name"] for p in case["providers"]]
        assert {"ours", "eager"} <= set(shown)
        # a layer of another library, with our product in it, has no levels
        levels = mikernels.supported_levels() if case["op"] != "head_result" else ()
        for level in levels:
            assert level == mikernels.cpu_level() or f"ours:{level}" in shown
        for p in case["providers"]:
            assert p["status"] in ("ok", "absent") and (p["status"] == "ok" or p["reason"])
            # levels below the one in use may stop at their share of the time
            least = 0 if p["status"] == "absent" else 1 if ":" in p["name"] else 2
            assert len(p["times_ms"]) >= least
            if p["times_ms"]:
                assert p["ms"]["p20"] <= p["ms"]["p50"] <= p["ms"]["p80"]
        assert report.provider(case, "eager")["ratio"]["ratio"] == 1.0
        assert report.provider(case, "ours")["rates"]["gbs"] > 0


def test_bench_resume_and_merge(measured: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.json"
    path.write_bytes(measured.read_bytes())
    words = ["adam", "--shape", "smoke", "--rounds", 2, "--budget", 0, "--no-memory"]
    words += ["--providers", "ours,eager", "--json", path]
    code, output = invoke(*words, "--resume")
    assert code == 0 and "kept from" in output
    assert results.load(path)["cases"] == results.load(measured)["cases"]
    code, output = invoke(*words, "--rounds", 3)
    assert code == 0, output
    before, after = results.load(measured)["cases"], results.load(path)["cases"]
    assert len(after) == len(before)
    assert [c for c in after if c["op"] != "adam"] == [c for c in before if c["op"] != "adam"]
    assert len(report.provider(after[-1], "eager")["times_ms"]) == 3


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_bench_plot_from_json_alone(measured: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    pictures = []
    for name in ("one", "two"):
        out = tmp_path / "plots" / (name + suffix)
        assert invoke("plot", measured, "--out", out) == (0, f"wrote {out} ")
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]
    code, _ = invoke("plot", measured, "--op", "adam", "--out", out)
    assert code == 0 and len(out.read_bytes()) < len(pictures[0])
    code, output = invoke("plot", measured, "--op", "none", "--out", out)
    assert code == 2 and "--op must be of" in output
    if suffix == ".svg":
        text = pictures[0].decode()
        assert "encode, fwd, smoke" in text and "eager" in text


def test_bench_compile_provider() -> None:
    code, output = invoke("row_topk", "--shape", "smoke", "--mode", "fwd", "--check")
    assert code == 0 and " compile 0.0e+00 ok " in output


def swapped(op: str, **builds) -> object:
    """The benchmark with eager and these providers only."""
    benchmark = load(op)
    others = tuple(Provider(name, build) for name, build in builds.items())
    return dataclasses.replace(benchmark, providers=(benchmark.provider("eager"), *others))


def top_k_with(change):
    def build(inputs, mode):
        def run():
            values, indices = mikernels.row_topk(inputs.scores, inputs.k)
            return dict(zip(("values", "indices"), change(inputs, values, indices), strict=True))

        return Runner(run)

    return build


def other_feature(inputs, values, indices):
    worst = inputs.scores.argmin(-1, keepdim=True)
    indices = torch.cat([worst, indices[:, 1:]], 1)
    return inputs.scores.gather(1, indices), indices


WRONG = {
    "other_feature": other_feature,
    "twice": lambda inputs, v, i: (v[:, [0] * v.shape[1]], i[:, [0] * i.shape[1]]),
    "other_values": lambda inputs, v, i: (v * 1.0001, i),
    "nan": lambda inputs, v, i: (v.masked_fill(i == i[5, 0], torch.nan), i),
}


@pytest.mark.parametrize("kind", WRONG)
def test_bench_gate_fails_a_wrong_provider(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = swapped("row_topk", broken=top_k_with(WRONG[kind]))
    monkeypatch.setattr("mikernels.bench.ops.row_topk.BENCHMARK", wrong)
    path = tmp_path / "out.json"
    words = ["--shape", "smoke", "--mode", "fwd", "--rounds", 2, "--budget", 0, "--no-memory"]
    code, output = invoke("row_topk", *words, "--json", path)
    assert code == 1
    assert "FAIL row_topk fwd smoke: broken" in output
    (case,) = results.load(path)["cases"]
    record = case["providers"][1]
    assert record["status"] == "wrong" and record["reason"] and record["times_ms"] == []
    assert report.ratio(case, "broken") is None and report.ratio(case, "eager")["ratio"] == 1.0


def test_bench_gate_allows_another_order_and_other_ties() -> None:
    backwards = swapped("row_topk", other=top_k_with(lambda _, v, i: (v.flip(1), i.flip(1))))
    (_, other) = harness.measure(backwards, SMOKE, "fwd", QUICK)["providers"]
    assert other["status"] == "ok"

    benchmark = load("row_topk")
    inputs = benchmark.inputs(SMOKE, "fwd", 0)
    inputs.scores = torch.zeros_like(inputs.scores)
    first = torch.arange(SMOKE.k).expand(SMOKE.n, -1)
    zeros = torch.zeros(SMOKE.n, SMOKE.k)
    low, high = ({"values": zeros, "indices": first + shift} for shift in (0, 100))
    assert benchmark.check(inputs, "fwd", high, low).ok


def test_bench_gate_wrong_gradient() -> None:
    right = load("gradients").provider("eager").build

    def build(batch, mode):
        runner = right(batch, mode)
        return Runner(lambda: {**(out := runner.run()), "b_enc": out["b_enc"] * 1.001})

    (_, record) = harness.measure(swapped("gradients", bad=build), SMOKE, "bwd", QUICK)["providers"]
    assert record["status"] == "wrong" and record["reason"].startswith("b_enc")


def test_bench_shows_failing_and_absent_providers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(inputs, mode):
        raise Unavailable("not on this machine")

    def breaks(inputs, mode):
        raise RuntimeError("its own bug")

    monkeypatch.setattr(
        "mikernels.bench.ops.row_topk.BENCHMARK", swapped("row_topk", gone=absent, buggy=breaks)
    )
    code, output = invoke("row_topk", "--shape", "smoke", "--check")
    # a peer's failure is reported and is not ours
    assert code == 0
    assert "gone: absent: not on this machine" in output
    assert "buggy: error: RuntimeError: its own bug" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["unknown"], "op must be one of adam"),
        (["encode", "--shape", "S9"], "--shape must be one of S0, S1, S2, smoke, got 'S9'"),
        (["encode", "--mode", "step"], "--mode must be one of bwd, fwd, got 'step'"),
        (["encode", "--providers", "peer"], "--providers must match some of ours"),
        (["encode", "--baseline", "peer"], "--baseline must be one of ours, eager"),
        (["encode", "--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["encode", "--json", "out.json"], "--check measures nothing to save"),
    ],
)
def test_bench_clear_errors(words: list[str], message: str) -> None:
    code, output = invoke(*words, "--check")
    assert code == 2 and message in output


def test_bench_refuses_foreign_files(measured: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for text, message in (
        ("{", "must be a results file, got no JSON"),
        ("[]", "is not a results file"),
        ('{"schema": 0, "machine": {}, "peaks": {}, "cases": []}', "must have schema 1, got 0"),
    ):
        path.write_text(text)
        code, output = invoke("plot", path, "--out", tmp_path / "a.svg")
        assert code == 2 and message in output
    file = results.load(measured)
    code, output = invoke("plot", measured, "--out", tmp_path / "a.pdf")
    assert code == 2 and "must end in .svg or .png" in output
    results.save(path, {**file, "machine": {**file["machine"], "cpu": "another"}})
    code, output = invoke("adam", "--shape", "smoke", "--json", path)
    assert code == 2 and "choose another --json file" in output
    results.save(path, {**file, "cases": []})
    code, output = invoke("plot", path, "--out", tmp_path / "a.svg")
    assert code == 2 and "hold no case with two timed providers" in output


def test_bench_ratio_interval() -> None:
    base, fast = [10.0, 10.2, 9.9, 10.1, 10.0, 30.0, 10.0], [2.0, 2.1, 1.9, 2.0, 2.0, 6.0, 2.0]
    found = stats.ratio(base, fast)
    assert found["ratio"] == 5.0
    assert found["low"] <= 5.0 <= found["high"] and found["high"] - found["low"] < 1.0
    # other numbers of rounds on the two sides are resampled apart
    assert stats.ratio(base, fast[:3])["ratio"] == 5.0


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="needs Linux's /proc")
def test_bench_memory_sees_temporaries_and_what_is_kept() -> None:
    megabytes = 48

    def build() -> Runner:
        kept = torch.ones(megabytes << 18)
        return Runner(lambda: {"total": (kept * 2).sum()})

    # the kernel's counters are exact to a few hundred pages
    assert abs(memory.extra_here(build) / 2**20 - 2 * megabytes) < 8
    answer = memory.peak_extra("row_topk", "smoke", "fwd", "eager", 1)
    assert 0 <= answer["bytes"] < 32 << 20
    assert "KeyError" in memory.peak_extra("row_topk", "none", "fwd", "eager", 1)["reason"]


def test_peers_leave_torch_as_it_is(tmp_path: Path, run_python) -> None:
    """Of a library that names nnsight, which replaces torch's FakeTensor where it is imported."""
    (tmp_path / "nnsight.py").write_text(
        "import torch._subclasses.fake_tensor as fake\n"
        "class FakeTensor(fake.FakeTensor):\n"
        "    def __new__(cls, *args, **kwargs):\n"
        "        raise RuntimeError('replaced')\n"
        "fake.FakeTensor = FakeTensor\n"
    )
    library = tmp_path / "dictionary_learning"
    library.mkdir()
    (library / "__init__.py").write_text(
        "from nnsight import LanguageModel\n"
        "def evaluate(model: LanguageModel | None) -> None: ...\n"
        "def model(): return LanguageModel('gpt2')\n"
    )
    printed = run_python(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch
        from mikernels.bench.harness import peers
        from mikernels.bench.harness.spec import compiled
        library = peers._module("dictionary_learning", "dictionary-learning")
        assert "nnsight" not in sys.modules
        print(library.LanguageModel.__name__)
        try:
            library.model()
        except RuntimeError as error:
            print(error)
        print(compiled(lambda x: x.relu().sum())(torch.ones(3)).item())
        import nnsight
        from torch._subclasses import fake_tensor
        print(fake_tensor.FakeTensor.__module__)
    """)
    assert printed.splitlines() == [
        "nnsight.LanguageModel",
        "nnsight.LanguageModel is a stand-in: peers must run without it",
        "3.0",
        "nnsight",
    ]


def test_peers_keep_what_has_been_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    own = type(re)("nnsight")
    monkeypatch.setitem(sys.modules, "nnsight", own)
    with peers._without("nnsight"):
        assert sys.modules["nnsight"] is own
    monkeypatch.delitem(sys.modules, "nnsight")
    with pytest.raises(KeyError), peers._without("nnsight"):
        raise KeyError
    assert "nnsight" not in sys.modules


def test_gate_keeps_a_nan_wherever_it_comes() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    exact = {"a": good.double(), "b": good.double()}
    for outputs in ({"a": good, "b": bad}, {"a": bad, "b": good}):
        for theirs in ({"a": good, "b": good}, outputs):
            verdict = correctness.values_gate(outputs, theirs, exact)
            assert not verdict.ok and verdict.error != verdict.error
    # where eager overflows, nothing is measured by it
    over = torch.tensor([1.0, float("inf"), 1.0])
    for ours in (good, 3 * good, over):
        verdict = correctness.values_gate({"a": ours}, {"a": over}, {"a": good.double()})
        assert not verdict.ok and "allowed inf" in verdict.detail
    with pytest.raises(ValueError, match="scores to select by must be finite, got NaN or inf"):
        correctness.truths(lambda part: (bad[None].double(), good[None]), 1, 3, 1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda f: f.update(cases={}), "cases"),
        (lambda f: f.update(machine=None), "machine"),
        (lambda f: f["machine"].update(cores="2"), "machine.cores"),
        (lambda f: f["cases"][0].pop("op"), "cases.0"),
        (lambda f: f["cases"][0].update(shape=3), "cases.0"),
        (lambda f: f["cases"].insert(0, None), "cases.0"),
    ],
)
def test_bench_names_the_field_of_a_damaged_file(measured: Path, tmp_path: Path, change, field):
    file = results.load(measured)
    change(file)
    path = tmp_path / "out.json"
    path.write_text(json.dumps(file))
    with pytest.raises(ValueError, match=f"bench: {path} must hold {field}"):
        results.load(path)


def test_bench_results_have_one_writer_and_every_failure_is_told(measured: Path, tmp_path: Path):
    path = tmp_path / "a" / "out.json"
    with results.written(path):
        with pytest.raises(BlockingIOError, match="one writer at a time"), results.written(path):
            raise AssertionError("two writers")
        with results.written(path.with_name("other.json")):
            results.save(path, {**results.load(measured), "cases": []})
        # what is lost meanwhile is written again, whole
        path.unlink()
        results.save(path, results.load(measured))
    assert results.load(path) == results.load(measured)
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]
    with largest_file(1000), pytest.raises(OSError, match=f"results must be written to {path}"):
        results.save(path, {**results.load(measured), "more": "x" * 5000})
    assert results.load(path) == results.load(measured)
