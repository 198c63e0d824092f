# SPDX-License-Identifier: Apache-2.0
"""One list of operators: what is registered, measured, checked on a GPU, predicted, shown by
`mikernels info` and named in the documentation."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import mikernels
from mikernels import info, ops
from mikernels._dispatch import OPS
from mikernels.bench import load, names
from mikernels.bench import ops as folder
from mikernels.bench.gpu import gpu_check, predict, predict_attention, predict_pairs
from mikernels.bench.harness.rates import DEVICES
from mikernels.bench.harness.spec import CPU, FAMILIES

ROOT = Path(__file__).parents[2]
REGISTERED = dict(OPS)
# what only a step on a GPU calls
ON_GPU = {"sae_update_"}


def test_the_folder_is_the_list() -> None:
    files = {path.stem for path in (ROOT / "bench" / "ops").glob("*.py")} - {"__init__"}
    assert set(names()) == files and len(names()) == len(files)
    assert names() == tuple(name for family in FAMILIES for name in sorted(names(family)))
    assert tuple(FAMILIES) == folder.FAMILIES
    # what was read from the source is what the declaration says
    for name in names():
        benchmark = load(name)
        assert benchmark.name == name
        assert name in names(benchmark.family)
        assert (name in names(gpu=True)) == bool(benchmark.gpu_shapes), name


def test_a_new_file_is_in_the_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "__init__.py").touch()
    (tmp_path / "zeta.py").write_text("BENCHMARK = Benchmark(name='zeta', gpu_shapes={})\n")
    (tmp_path / "alpha.py").write_text("BENCHMARK = Benchmark(name='alpha', family='pairs')\n")
    monkeypatch.setattr(folder, "FOLDER", tmp_path)
    folder._declarations.cache_clear()
    try:
        assert names() == ("zeta", "alpha") and names(gpu=True) == ("zeta",)
        assert names("pairs") == ("alpha",)
        (tmp_path / "helper.py").write_text("x = 1\n")
        folder._declarations.cache_clear()
        with pytest.raises(ValueError, match=r"helper\.py must set BENCHMARK = Benchmark"):
            names()
    finally:
        folder._declarations.cache_clear()


def test_every_operator_in_the_sources_is_registered_and_shown() -> None:
    written = {
        ast.literal_eval(node.args[0]).split("(", 1)[0]
        for path in Path(ops.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Op"
    }
    assert len(written) >= 20
    assert set(REGISTERED) == written
    assert list(info.collect()["operators"]) == sorted(written)


def test_each_operator_belongs_to_one_benchmark() -> None:
    measured = [op for name in names() for op in load(name).ops]
    assert sorted(measured) == sorted(REGISTERED)


class Called(TorchDispatchMode):
    """The names of our operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mikernels":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", names())
def test_a_benchmark_runs_the_operators_it_names(name: str) -> None:
    benchmark, called = load(name), Called()
    for mode in benchmark.modes if benchmark.ops else ():
        inputs = benchmark.inputs(FAMILIES[benchmark.family]["smoke"], mode, 0)
        for provider in benchmark.providers:
            if not provider.name.startswith("ours") or CPU not in provider.devices:
                continue
            runner = provider.build(inputs, mode)
            with called:
                if runner.before is not None:
                    runner.before()
                runner.run()
    assert set(benchmark.ops) - ON_GPU <= called.names
    assert not ON_GPU & called.names


def test_the_gpu_check_measures_all_that_has_gpu_shapes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "RECORDS", tmp_path)
    monkeypatch.setattr(gpu_check, "capability", lambda: "9.0")
    parts = [part.name for part in gpu_check.parts("python")]
    measured = [name.removeprefix("bench_") for name in parts if name.startswith("bench_")]
    assert measured == [*names(gpu=True), "compile"]


def test_predictions_have_a_model_of_all_that_has_gpu_shapes() -> None:
    # case by case, of the committed files: test_every_gpu_case_is_predicted
    assert set(predict.OPS) == set(names("sae", gpu=True))
    for name in predict.OPS:
        assert set(load(name).gpu_shapes) == {predict.MODES.get(name, "fwd")}
    pairs = {case["op"] for case in predict_pairs.pair_cases(DEVICES["h200"])}
    assert pairs == set(names("pairs", gpu=True))
    attention = {case["op"] for case in predict_attention.attention_cases(DEVICES["h200"])}
    assert attention == set(names("attention", gpu=True))


def test_the_documentation_names_every_public_operator() -> None:
    public = {
        name
        for name in mikernels.__all__
        if inspect.isfunction(found := getattr(mikernels, name))
        and found.__module__.startswith("mikernels.ops.")
    }
    page = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    named = re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows[1:]))
    assert sorted(named) == sorted(public)
