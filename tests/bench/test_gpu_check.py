# SPDX-License-Identifier: Apache-2.0
"""The part runner of gpu_check with parts of its own, and the real parts on a stand-in device."""

import itertools
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda

from mikernels._dispatch import OPS
from mikernels.bench import cli, load, names
from mikernels.bench.gpu import assumptions, gpu, gpu_check, gpu_parts
from mikernels.bench.gpu.device import Cuda
from mikernels.bench.gpu.gpu_check import Part, check, merge
from mikernels.bench.harness.spec import DTYPES, Provider, Runner


def python(name: str, code: str, seconds: float = 60.0, **more) -> Part:
    return Part(name, (sys.executable, "-c", code), seconds, **more)


def quiet(line: str) -> None:
    pass


def test_parts_run_fail_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "records"
    # a tool of a toolkit that is not on PATH
    kit = tmp_path / "bin" / "kit"
    kit.parent.mkdir()
    kit.write_text("#!/bin/sh\n")
    kit.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    chosen = [
        Part(
            "writes",
            (sys.executable, "-c", "open('{out}/r.json', 'w').write('[1]'); print('done')"),
            60,
            "r.json",
        ),
        python("fails", "import sys; print('x' * 9000); print('the reason'); sys.exit(3)"),
        python("env", "import os; assert os.environ['ANSWER'] == '42'", env={"ANSWER": "42"}),
        Part("missing", ("no-such-program-here",), 60),
        Part("tool", ("true",), 60, tool="no-such-tool-here"),
        Part("toolkit", ("{tool}",), 60, tool="kit"),
    ]
    lines: list[str] = []
    records = check(chosen, [out], say=lines.append)
    assert {name: r["status"] for name, r in records.items()} == {
        "writes": "ok",
        "fails": "failed",
        "env": "ok",
        "missing": "failed",
        "tool": "absent",
        "toolkit": "ok",
    }
    assert records["fails"]["reason"] == "exit code 3"
    assert records["fails"]["tail"].endswith("the reason\n")
    assert len(records["fails"]["tail"]) <= gpu_check.TAIL
    assert "no no-such-tool-here" in records["tool"]["reason"]
    assert any("the reason" in line for line in lines)
    assert json.loads((out / "fails.json").read_text())["status"] == "failed"


def test_parts_restart_where_they_were(tmp_path: Path) -> None:
    out, other = tmp_path / "a", tmp_path / "b"
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('.')"
    part, broken = python("part", code), python("broken", code + "; raise SystemExit(1)")
    for expected in ("..", "..."):
        # what failed is tried again
        check([part, broken], [out], say=quiet)
        assert count.read_text() == expected
    # a record in any of the folders counts
    check([part], [other, out], say=quiet)
    assert count.read_text() == "..."
    check([part], [out], force=True, say=quiet)
    assert count.read_text() == "...."


def test_parts_time_out_with_their_children(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid)!r}, 'w').write(str(p.pid)); print('started', flush=True); time.sleep(600)"
    )
    records = check([python("slow", code, 2.0), python("next", "")], [tmp_path], say=quiet)
    assert records["slow"]["status"] == "timeout" and "started" in records["slow"]["tail"]
    assert records["next"]["status"] == "ok"
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_parts_budget(tmp_path: Path) -> None:
    records = check([python("late", "")], [tmp_path], budget=0.0, say=quiet)
    assert records["late"]["status"] == "not run"


def test_merge_holds_records_and_results(tmp_path: Path) -> None:
    out, copy = tmp_path / "a", tmp_path / "b"
    facts = Part(
        "facts",
        (sys.executable, "-c", "open('{out}/facts.result.json', 'w').write('{\"gpu\": 1}')"),
        60,
        "facts.result.json",
    )
    later = python("later", "")
    check([later], [out], say=quiet)
    records = check([facts], [out], say=quiet)
    path = merge([facts, later], records, [out, copy])
    assert path == copy / gpu_check.MERGED
    merged = json.loads(path.read_text())
    assert merged["facts"] == {"gpu": 1} and merged["results"]["facts"] == {"gpu": 1}
    # of an earlier run
    assert merged["parts"]["later"]["status"] == "ok"
    assert {f.name for f in copy.iterdir()} == {gpu_check.MERGED, gpu_check.LOGS}
    with tarfile.open(copy / gpu_check.LOGS) as archive:
        assert sorted(archive.getnames()) == ["facts.log", "later.log"]
    # on another machine that file alone says what was done, and keeps its results
    for kept in out.iterdir():
        kept.unlink()
    records = check([later], [out, copy], say=quiet)
    assert not (out / "later.log").exists()
    assert json.loads(merge([facts, later], records, [out, copy]).read_text()) == merged


def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_check.main([]) == 2
    assert "gpu_check: no CUDA device" in capsys.readouterr().out


def test_main_exit_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "capability", lambda: "9.0")
    monkeypatch.setattr(gpu_check, "RECORDS", tmp_path / "records")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    chosen = [python("good", ""), python("bad", "raise SystemExit(1)")]
    monkeypatch.setattr(gpu_check, "parts", lambda: chosen)
    assert gpu_check.main(["--only", "good"]) == 0
    assert gpu_check.main([]) == 1
    assert (tmp_path / "out" / gpu_check.MERGED).exists()


def test_the_real_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "RECORDS", tmp_path)
    monkeypatch.setattr(gpu_check, "capability", lambda: "9.0")
    monkeypatch.delenv("MIKERNELS_ARCHS", raising=False)
    found = gpu_check.parts("python")
    assert len({part.name for part in found}) == len(found)
    assert found[0].env["MIKERNELS_ARCHS"] == "9.0"
    modules = {
        part.command[3] for part in found if "mikernels.bench.gpu.gpu_parts" in part.command[:3]
    }
    modules |= {part.command[-2] for part in found if part.tool == "compute-sanitizer"}
    assert modules == set(gpu_parts.PARTS)
    for part in found:
        if part.name.startswith("bench_"):
            ops, patterns = part.command[4], part.command[part.command.index("--providers") + 1]
            chosen = [load(name) for name in (names() if ops == "all" else [ops])]
            cli._check_providers(chosen, tuple(patterns.split(",")), None, "cuda")
        paths = [word for word in part.command if word.startswith("tests/")]
        assert all((gpu_check.ROOT / path).exists() for path in paths), paths
        assert bool(paths) == (part.name in ("tests", "cpu_tests"))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    monkeypatch.setattr(gpu, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(gpu, "SIZES", dict.fromkeys(gpu.SIZES, 32))
    monkeypatch.setattr(gpu_parts, "RUNS", 2)
    # Triton's and CUDA's own providers need a GPU
    real = gpu_parts._measured
    monkeypatch.setattr(
        gpu_parts, "_measured", lambda *a: (case for case in real(*a) if ":" not in case[0])
    )
    return Cuda(FakeCuda(), "cpu")


def test_every_operator_is_checked(device: Cuda) -> None:
    """In one dtype at least; of the registry, so that none is forgotten."""
    titles = [title.split() for title, *_ in gpu_parts._registered(device)]
    assert {(name, dtype) for name, _, _, dtype, *_ in titles} == {
        (name, dtype) for name in OPS for dtype in DTYPES
    }
    measured = {title.split()[0] for title, *_ in gpu_parts._measured(device)}
    assert measured == set(names(gpu=True))


@pytest.mark.parametrize("part", ["facts", "once", "tiny", "determinism", "graph"])
def test_gpu_parts(part: str, device: Cuda, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert gpu_parts.main([part, str(path)], device) == 0
    found = json.loads(path.read_text())
    assert found["wrong"] == {}
    if part == "facts":
        assert found["machine"]["gpu"]["name"] == "Fake GPU" and "row_topk" in found["backends"]
        return
    assert "encode fwd fp32 ours" in found["right"]
    assert "gram_products_ sample 1 bf16" in found["right"]
    seen = {name.split()[0] for name in found["right"]}
    assert seen == {*OPS, *names(gpu=True)} - (
        gpu_parts.WAITING | {"step"} if part == "graph" else set()
    )
    assert bool(device.api.captured) == (part == "graph")


def test_a_part_in_several_processes(device: Cuda, monkeypatch, tmp_path: Path) -> None:
    first = itertools.islice(gpu_parts._registered(device), 5)
    few = [(f"case {i}", *rest) for i, (_, *rest) in enumerate(first)]
    few[3] = ("bad", Provider("ours", lambda inputs, mode: 1 / 0), None, "fwd")
    monkeypatch.setattr(gpu_parts, "_cases", lambda *a: iter(few))

    class Process:
        def __init__(self, command):
            *_, self.path, self.share = command

        def wait(self):
            if self.share != "2/3":
                gpu_parts.main(["once", self.path, self.share], device)
            return 1

    monkeypatch.setattr(gpu_parts.subprocess, "Popen", Process)
    monkeypatch.setattr(gpu_parts, "WORKERS", 3)
    path = tmp_path / "once.json"
    assert gpu_parts.main(["once", str(path)]) == 1
    found = json.loads(path.read_text())
    assert found["right"] == ["case 0", "case 1", "case 4"]
    assert found["wrong"].keys() == {"bad", "once.json.2"}
    assert list(tmp_path.iterdir()) == [path]


def test_gpu_part_finds_what_is_wrong(
    device: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bad = Provider("ours", lambda inputs, mode: Runner(lambda: {"y": torch.rand(9)}), ours=True)
    broken = Provider("ours2", lambda inputs, mode: Runner(lambda: 1 / 0), ours=True)
    cases = [("bad", bad, None, "fwd"), ("broken", broken, None, "fwd")]
    monkeypatch.setattr(gpu_parts, "_cases", lambda *a: iter(cases))
    path = tmp_path / "result.json"
    for part, reason in (("determinism", "differs in y"), ("graph", "other values in y")):
        assert gpu_parts.main([part, str(path)], device) == 1
        wrong = json.loads(path.read_text())["wrong"]
        assert reason in wrong["bad"] and "ZeroDivisionError" in wrong["broken"]


def test_two_devices(device: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_parts.two_devices(device)["absent"]
    monkeypatch.setattr(device.api, "device_count", lambda: 2)
    assert device.second() == "cuda:1"
    # two places that any machine has
    for second, wrong, right in (("cpu", 0, 150), ("meta", 150, 0)):
        monkeypatch.setattr(device, "second", lambda second=second: second)
        found = gpu_parts.two_devices(device)
        assert len(found["wrong"]) >= wrong and len(found["right"]) >= right
        assert not (found["right"] if wrong else found["wrong"])


def test_assumptions_items(device: Cuda) -> None:
    found = assumptions.run(device, 0.004)
    assert len(found["items"]) == 14
    assert found["wrong"] == {}


def test_assumptions_records_what_cannot_run(device: Cuda) -> None:
    ground = assumptions.Ground(device)
    item = assumptions.Item("statement", 1.0, 0.5, 1.5, "ms", "a plan")
    ground.judge(item, lambda: 1.2)
    ground.judge(item, lambda: 2.0)
    ground.judge(item, lambda: 1 / 0)
    assert [f["verdict"] for f in ground.found] == ["holds", "refuted", "not measured"]
    assert "ZeroDivisionError" in ground.found[-1]["why"]
