# SPDX-License-Identifier: Apache-2.0
"""The GPU side of the benchmarks, on CPU tensors with a stand-in for torch.cuda."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda
from typer.testing import CliRunner

from mikernels.bench import load, names
from mikernels.bench.cli import app
from mikernels.bench.gpu import device as devices
from mikernels.bench.gpu import gpu, predicted
from mikernels.bench.gpu.device import Cpu, Cuda, Meter
from mikernels.bench.harness import correctness, harness, report, results, spec
from mikernels.bench.harness.spec import GPU_SHAPES, SHAPES

SMOKE = SHAPES["smoke"]


@pytest.fixture
def api() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def cuda(api: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    device = Cuda(api, "cpu")
    real = devices.get
    monkeypatch.setattr(devices, "get", lambda name: device if name == "cuda" else real(name))
    whole = gpu.peaks
    monkeypatch.setattr(gpu, "peaks", lambda device: whole(device, 1e-5))
    return device


def providers(op: str) -> str:
    """What runs on CPU tensors, without what is slow or 16-bit only on a GPU."""
    known = {e.name for e in harness.contenders(load(op), kind="cuda")}
    return ",".join(sorted(n for n in known - {"compile", "csr"} if ":" not in n))


def invoke(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"[\s│╭╮╰╯─]+", " ", result.output)


# heads' results and mass_threshold have no GPU kernel of ours
@pytest.mark.parametrize("op", names(gpu=True))
def test_bench_cuda_runs_and_reports(op: str, cuda: Cuda, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    words = [op, "--device", "cuda", "--shape", "smoke", "--rounds", 2, "--budget", 0]
    words += ["--providers", providers(op), "--json", path]
    code, output = invoke(*words)
    assert code == 0, output
    assert "Fake GPU (132 SMs" in output and f"{op} {load(op).modes[0]} smoke" in output
    file = results.load(path)
    assert file["machine"]["gpu"]["sms"] == 132 and file["peaks"]["gpu"]["bf16_gflops"] > 0
    dtypes = {case["dtype"] for case in file["cases"]}
    assert dtypes == ({"bfloat16", "float32"} if len(load(op).gpu_dtypes) > 1 else {"float32"})
    for case in file["cases"]:
        ours = report.provider(case, "ours")
        # the stand-in's clock ticks 0.5 ms an event, and its calls allocate 4096 bytes
        assert ours["ms"]["p50"] == 0.5 and ours["extra_bytes"] == 4096
        assert ours["host_ms"] > 0 and ours["level"] is None
        assert ours["rates"]["gbs_fraction"] > 0 and ours["rates"]["gflops_fraction"] >= 0
    before = path.read_bytes()
    assert "kept from" in invoke(*words, "--resume")[1]
    assert [c["op"] for c in results.load(path)["cases"]] == [
        c["op"] for c in json.loads(before)["cases"]
    ]


def test_bench_cuda_times_calls_on_the_device(cuda: Cuda, api: FakeCuda) -> None:
    benchmark = load("decode")
    options = harness.Options(
        providers=("ours", "eager"), rounds=4, budget=0.0, device=cuda, dtype="fp32"
    )
    case = harness.measure(benchmark, SMOKE, "fwd", options)
    assert all(len(p["times_ms"]) == 4 for p in case["providers"])
    # each call is preceded by a spin that covers its launches; the device is awaited once a round
    assert len(api.spins) == 2 * (2 + 2 + 4) and api.spins[-1] > 1
    assert not api.pending and api.synchronized == 1 + 2 * 2 + 1 + 4


def test_bench_eager_out_of_memory_is_a_result(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load("encode")

    def fails(inputs, mode):
        def run():
            raise torch.OutOfMemoryError("CUDA out of memory")

        return spec.Runner(run)

    eager = spec.Provider("eager", fails)
    ours = benchmark.provider("ours")
    starved = replace(benchmark, providers=(ours, eager))
    options = harness.Options(rounds=2, budget=0.0, device=cuda)
    case = harness.measure(starved, SMOKE, "fwd", options)
    records = {p["name"]: p for p in case["providers"]}
    assert records["eager"]["status"] == "failed" and "memory" in records["eager"]["reason"]
    assert records["ours"]["status"] == "ok" and len(records["ours"]["times_ms"]) == 2
    with pytest.raises(torch.OutOfMemoryError):
        harness.measure(replace(starved, yardstick=None), SMOKE, "fwd", options)


def test_bench_cuda_goes_on_after_a_broken_case(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(inputs, mode):
        raise RuntimeError("eager [cannot] do this")

    broken = replace(load("row_topk"), providers=(spec.Provider("eager", fails),))
    monkeypatch.setattr("mikernels.bench.ops.row_topk.BENCHMARK", broken)
    words = ["row_topk", "adam", "--device", "cuda", "--shape", "smoke", "--mode", "fwd,step"]
    code, output = invoke(*words, "--providers", "eager", "--check", "--dtype", "fp32")
    assert code == 1 and "adam step smoke" in output
    assert "row_topk fwd smoke fp32: error RuntimeError: eager [cannot] do this" in output
    assert "FAIL row_topk fwd smoke fp32: RuntimeError" in output


def test_bench_out_of_memory_in_the_race(cuda: Cuda) -> None:
    benchmark = load("decode")

    def build(inputs, mode):
        calls = []

        def run():
            calls.append(1)
            if len(calls) > 3:
                raise torch.OutOfMemoryError("no room beside the others")
            return inner.run()

        inner = benchmark.provider("eager").build(inputs, mode)
        return spec.Runner(run)

    hungry = spec.Provider("hungry", build)
    some = replace(benchmark, providers=(hungry, benchmark.provider("eager")))
    options = harness.Options(rounds=3, budget=0.0, device=cuda)
    records = {p["name"]: p for p in harness.measure(some, SMOKE, "fwd", options)["providers"]}
    assert records["hungry"]["status"] == "failed" and records["hungry"]["times_ms"] == []
    assert "in the race" in records["hungry"]["reason"]
    assert len(records["eager"]["times_ms"]) == 3


def test_provider_patterns() -> None:
    shown = [e.name for e in harness.contenders(load("encode"), ("*", "!compile", "!s*"), "cuda")]
    assert "compile" not in shown and "sparsify" not in shown
    assert {"ours", "eager", "mm_row_topk"} <= set(shown)


@pytest.mark.parametrize("op", ["row_topk", "encode"])
def test_bench_gate_judges_a_sample(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # room for 7 tokens of fp64 scores
    monkeypatch.setattr(correctness, "SCORE_BYTES", 7 * 8 * SMOKE.f)
    benchmark = load(op)
    inputs = benchmark.inputs(SMOKE, "fwd", 0)
    outputs = benchmark.provider("ours").build(inputs, "fwd").run()
    eager = benchmark.provider("eager").build(inputs, "fwd").run()
    verdict = benchmark.check(inputs, "fwd", outputs, eager)
    assert verdict.ok and "7 of 64 tokens judged" in verdict.detail
    # token 0 is one of them
    outputs["indices"][0, 0] = (outputs["indices"][0, 0] + 1) % SMOKE.f
    assert not benchmark.check(inputs, "fwd", outputs, eager).ok


def test_bench_gate_compares_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "PIECE", 7)
    exact = torch.randn(5, 5, dtype=torch.float64)
    off = exact.clone()
    off[3, 3] += 0.25
    assert correctness._worst(off, exact) == pytest.approx(0.25)
    off[1, 1] = torch.nan
    assert not correctness._worst(off, exact) <= 1


def test_meter_subtracts_what_the_gate_holds(api: FakeCuda) -> None:
    meter = Meter(Cuda(api, "cpu"))
    api.bytes += 1000
    with meter.ignoring():
        api.bytes += 50_000
    meter.built()
    assert meter.kept == 1000
    meter.watch()
    meter.watch_peak()
    assert meter.extra() == 4096 + 1000
    # the host's memory is measured elsewhere
    on_host = Meter(Cpu())
    on_host.built()
    assert on_host.kept == 0


def test_device_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.get("cpu").kind == "cpu"
    with pytest.raises(ValueError, match="must be cpu or cuda, got 'tpu'"):
        devices.get("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU; use --device cpu"):
        devices.get("cuda")


def test_bench_cuda_options(cuda: Cuda) -> None:
    for words, message in (
        (["encode", "--shape", "G9"], "must be one of G1, G2, G3, G4, S0, S1, S2, smoke"),
        (["encode", "--dtype", "fp8"], "--dtype must be one of bf16, fp16, fp32, got 'fp8'"),
        (["step", "--dtype", "bf16"], "none of step is measured in --dtype bf16"),
    ):
        code, output = invoke(*words, "--device", "cuda", "--check")
        assert code == 2 and message in output
    code, output = invoke("encode", "--dtype", "bf16", "--check")
    assert code == 2 and "--dtype must be one of fp32, got 'bf16'" in output


def test_every_gpu_case_is_predicted() -> None:
    for key in ("h100", "h200"):
        for op in names():
            benchmark = load(op)
            for mode, shapes in benchmark.gpu_shapes.items():
                for name in shapes:
                    for dtype in set(benchmark.gpu_dtypes) - {"fp16"}:
                        case = {
                            "op": op,
                            "mode": mode,
                            "shape": vars((GPU_SHAPES | spec.FAMILIES[benchmark.family])[name]),
                            "dtype": str(spec.DTYPES[dtype]).removeprefix("torch."),
                        }
                        found = predicted.find(case, f"NVIDIA {key.upper()} 80GB HBM3")
                        assert found is not None and 0 < found["floor_ms"] <= found["ms"]
                        assert sum(p["ms"] for p in found["parts"]) == pytest.approx(
                            found["ms"], rel=1e-2
                        )
    assert predicted.find({"dtype": "float32"}, "Some GPU") is None


def test_report_shows_prediction_beside_measurement(cuda: Cuda, tmp_path: Path) -> None:
    options = harness.Options(
        providers=("ours", "eager"), rounds=2, budget=0.0, device=cuda, dtype="fp32"
    )
    case = harness.measure(load("decode"), SMOKE, "fwd", options)
    case["shape"] = vars(GPU_SHAPES["G2"])
    predicted.attach(case, {"gpu": {"name": "NVIDIA H200"}})
    lines = " ".join(predicted.lines(case))
    assert "ours: predicted 1.31 ms, measured 0.5 ms" in lines
    assert "eager: predicted" in lines and "gather 1.29" in lines
    assert predicted.lines({"providers": []}) == []
