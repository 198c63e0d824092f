# SPDX-License-Identifier: Apache-2.0
"""The crossover table, and the search for it with a clock that answers what it is told."""

import json
from pathlib import Path

import pytest
import torch

from mikernels import _crossover
from mikernels._crossover import sparse_wins
from mikernels.bench.gpu import tune
from mikernels.bench.gpu.device import Cpu
from mikernels.bench.gpu.tune import Point, threshold
from mikernels.owning import owned

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _crossover.reload()
    yield
    monkeypatch.undo()
    _crossover.reload()


def test_packaged_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sparse_wins("encode", CPU, FP32, 768, 8 * 32, 32)
    assert not sparse_wins("encode", CPU, FP32, 768, 8 * 32 - 1, 32)
    assert sparse_wins("decode", CPU, FP32, 768, 32, 32)
    assert not sparse_wins("decode", CUDA, BF16, 2304, 139 * 64, 64)
    assert sparse_wins("decode", CUDA, BF16, 2304, 140 * 64, 64)
    assert sparse_wins("decode", CUDA, FP32, 2304, 24 * 64, 64)
    assert sparse_wins("decode", CUDA, torch.float64, 3, 4, 4)
    assert sparse_wins("encode", CUDA, BF16, 2304, 8 * 64, 64)
    entries = _crossover.load(_crossover.PACKAGED)
    assert all("predicted" in e["source"] or e["dtype"] == "float64" for e in entries["cuda"])


def test_user_table_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_crossover, "device_name", lambda device: f"my {device.type}")
    assert sparse_wins("decode", CUDA, BF16, 768, 200, 1)
    entry = {"op": "decode", "dtype": "bfloat16", "source": "measured"}
    tune.write(
        _crossover.user_table(),
        "my cuda",
        [{**entry, "d": 512, "threshold": 300.0}, {**entry, "d": 4096, "threshold": 50.0}],
    )
    # the nearest d in ratio: 768 is nearer to 512, 2304 to 4096
    assert not sparse_wins("decode", CUDA, BF16, 768, 200, 1)
    assert sparse_wins("decode", CUDA, BF16, 2304, 200, 1)
    # another dtype or operator: the packaged entries
    assert sparse_wins("decode", CUDA, FP32, 768, 24, 1)
    assert not sparse_wins("decode", CUDA, torch.float16, 768, 100, 1)
    assert sparse_wins("encode", CUDA, BF16, 768, 8, 1)


def test_write_keeps_other_devices() -> None:
    path = _crossover.user_table()
    first = {"op": "encode", "dtype": "*", "d": 0, "threshold": 1, "source": "measured"}
    tune.write(path, "a", [first])
    tune.write(path, "b", [first])
    tune.write(path, "a", [{**first, "threshold": 2}])
    table = json.loads(path.read_text())["devices"]
    assert table["a"][0]["threshold"] == 2 and table["b"] == [first]


def _entry(**changes: object) -> str:
    entry = {"op": "encode", "dtype": "*", "d": 0, "threshold": 1.0, "source": "x", **changes}
    return json.dumps({"schema": 1, "devices": {"a": [entry]}})


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{", "no JSON"),
        ("[]", "an object"),
        ('{"schema": 9, "devices": {}}', "a table of schema 1, got 9"),
        ('{"schema": 1}', "devices"),
        ('{"schema": true, "devices": {}}', "schema"),
        ('{"schema": 1, "devices": {}, "devices": {}}', "'devices' twice"),
        ("\ufeff{}", "byte order mark"),
        (_entry(threshold=-1), "devices.a.0.threshold"),
        (_entry(threshold=float("nan")), "NaN"),
        (_entry(threshold="8"), "devices.a.0.threshold"),
        (_entry(d=None), "devices.a.0.d"),
        (_entry(d=True), "devices.a.0.d"),
        (_entry(op=3), "devices.a.0.op"),
        (_entry(note=3), "devices.a.0.note"),
    ],
)
def test_a_damaged_table_is_named_and_does_not_count(text: str, field: str) -> None:
    path = _crossover.user_table()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=f"tuned.json: {path} must .*{field}"):
        _crossover.load(path)
    with pytest.warns(UserWarning, match=f"{path} must .*until then the packaged table counts"):
        _crossover.reload()
    assert not sparse_wins("encode", CPU, FP32, 768, 7, 1)
    # and is not written over: it may be something else
    with pytest.raises(ValueError, match=f"{path} must"):
        tune.write(path, "a", [])
    assert path.read_text() == text


def test_a_table_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t" / "tuned.json"
    with pytest.raises(ValueError, match="beyond|compliant"):
        tune.write(path, "a", [{"op": "encode", "threshold": float("inf")}])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="tune: the table must be written to"):
        tune.write(tmp_path / "file" / "tuned.json", "a", [])
    with owned(path.parent, "another", ".tuned.json.lock"), pytest.raises(BlockingIOError):
        tune.write(path, "a", [])
    assert not list(path.parent.iterdir())


def test_asked_while_compiling() -> None:
    tune.write(_crossover.user_table(), "elsewhere", [])

    def choose(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if sparse_wins("encode", x.device, x.dtype, 64, x.shape[0], 1) else x - 1

    for n in (4, 16):
        x = torch.zeros(n)
        compiled = torch.compile(choose, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), choose(x))


def points(*pairs: tuple[int, float]) -> list[Point]:
    return [Point(ratio, sparse, 1.0) for ratio, sparse in pairs]


def test_threshold_interpolates() -> None:
    # time ratio 4 at F / k = 16 and 1 / 4 at 64: equal half-way in logarithms
    assert threshold(points((16, 4.0), (64, 0.25))) == 32.0
    assert threshold(points((16, 0.5), (64, 0.25))) == 0.0
    assert threshold(points((16, 2.0), (64, 1.5))) == 128.0
    # noise below the last loss does not count
    assert threshold(points((2, 0.9), (4, 2.0), (8, 0.5), (16, 0.25))) == pytest.approx(
        5.7, abs=0.1
    )


class Told(Cpu):
    """Times by the path's place among those of a point; each really runs once."""

    def __init__(self, *seconds: float):
        self.seconds_of = seconds
        self.calls = 0

    def median(self, function, times=10, warm=3):
        assert isinstance(function(), torch.Tensor | tuple) or function() is not None
        self.calls += 1
        return self.seconds_of[(self.calls - 1) % len(self.seconds_of)]


def test_run_measures_every_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SLOTS", {"encode": 4, "decode": 4})
    lines: list[str] = []
    entries = tune.run(Told(2.0, 1.0), lines.append, scale=0.1)
    assert {(e["op"], e["dtype"], e["d"]) for e in entries} == {
        ("encode", "float32", 768),
        ("decode", "float32", 768),
    }
    # never within the grid
    assert [e["threshold"] for e in entries] == [128.0, 1024.0]
    assert any("sparse wins from F / k = 128" in line for line in lines)


def test_slow_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SLOTS", {"encode": 4, "decode": 4})
    quiet = lambda line: None  # noqa: E731
    assert tune.slow_choices(Told(2.0, 1.0, 1.04), quiet, scale=0.1) == []
    slow = tune.slow_choices(Told(2.0, 1.0, 1.06), quiet, scale=0.1)
    assert len(slow) == len(tune.ENCODE_RATIOS) + len(tune.DECODE_RATIOS)


def test_paths_agree() -> None:
    device = Cpu()
    torch.manual_seed(0)
    values, w = torch.rand(5, 3), torch.randn(40, 7)
    indices = torch.tensor([[0, 11, 39]] * 5)
    dense = tune.dense_decode(values, indices, w)
    sparse = tune.decode_op.default(values, indices, None, w, None)
    torch.testing.assert_close(dense, sparse)
    assert tune.encode_points(device, "fp32", 16, 2, scale=0.1, ratios=(4,), auto=True)[0].auto > 0
