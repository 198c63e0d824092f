# SPDX-License-Identifier: Apache-2.0
"""The call log: what it says, that it is off when it is off, and calls saved and replayed."""

import json
import logging
import re
import shutil
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from op_samples import LAYOUTS, SAMPLES
from oracle import identical, randn
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import mikernels
from mikernels import _ext, _triton, cli, row_topk, sparse_decode, topk_encode
from mikernels._dispatch import OPS, Op
from mikernels.calls import log as switching
from mikernels.calls.replay import replay
from mikernels.calls.saved import load
from mikernels.owning import owned

built = pytest.mark.skipif(_ext.C is None, reason=_ext.MISSING)
OPERATORS = logging.getLogger("mikernels.ops")


@pytest.fixture(autouse=True)
def off():
    yield
    mikernels.log("off")
    switching._switch.start(switching.Setting(logging.NOTSET, shown=False))
    assert all(type(op) is Op for op in OPS.values())


@pytest.fixture
def lines(caplog):
    own = "mikernels.ops"
    return lambda: [r.getMessage() for r in caplog.records if r.name == own]


def files(folder):
    return sorted(folder.glob("*.safetensors"))


@built
def test_a_line_says_what_runs_on_what_and_why(lines, monkeypatch):
    x, w = randn(6, 4), randn(64, 4, seed=1).T.contiguous().T.requires_grad_()
    with mikernels.log("info"):
        codes = topk_encode(x, w, k=2)
        topk_encode(x, w, k=32)
        topk_encode(x, w, k=2, impl="reference")
        monkeypatch.setenv("MIKERNELS_IMPL", "cpp")
        named = topk_encode(x, w, k=2)
        monkeypatch.delenv("MIKERNELS_IMPL")
        sparse_decode(named, w).sum().backward()
        codes.values.sum().backward()
    level, said = mikernels.cpu_level(), lines()
    operands = "encode(x=float32[6, 4], w_enc=float32[64, 4] strides [1, 64], b_enc=None, "
    assert all(line.startswith(operands) and " on cpu -> " in line for line in said[:4])
    assert f"-> cpp at {level} (auto: CPU tensors; F / k = 32 is not below" in said[0]
    assert "-> dense (auto: F / k = 2 is below the crossover 8 (encode, float32, d 4))" in said[1]
    assert said[2].endswith("-> reference (impl='reference')")
    assert said[3].endswith(f"-> cpp at {level} (MIKERNELS_IMPL=cpp)")
    assert said[4].startswith("decode(")
    backward = [line for line in said if line.endswith("in a backward)")]
    assert {line.partition("(")[0] for line in backward} >= {"gather_dot", "feature_sum"}
    # an encoder's in the way that was asked for then
    ways = [re.search(r"MIKERNELS_IMPL|auto", line)[0] for line in backward]
    assert set(ways) == {"MIKERNELS_IMPL", "auto"}


def test_the_ways_of_a_gpu(monkeypatch):
    """In words, of tensors that are not there."""
    op = OPS["row_topk"]
    with FakeTensorMode():
        args = torch.empty(3, 9, device="cuda"), 2, False
        doubles = torch.empty(3, 9, device="cuda", dtype=torch.float64), 2, False
    for name in ("_cuda_op", "_triton"):
        monkeypatch.setattr(op, name, object())
    monkeypatch.setattr(_ext, "cuda_unsupported", lambda device: "")
    assert op.owner(args) == ("cuda", "CUDA tensors")
    assert op.owner(doubles)[0] == "reference" and "float64" in op.owner(doubles)[1]
    monkeypatch.setattr(_ext, "cuda_unsupported", lambda device: "has no code for it")
    monkeypatch.setattr(_triton, "unsupported", lambda device: "")
    assert op.owner(args) == ("triton", "no CUDA C++: has no code for it")
    monkeypatch.setattr(_triton, "unsupported", lambda device: "is too old")
    assert op.owner(args)[0] == "reference" and op.owner(args)[1].endswith("no Triton: is too old")


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("impl", [None, "reference"])
def test_what_is_chosen_is_what_runs(name, impl, monkeypatch):
    op, arguments = OPS[name], next(iter(SAMPLES[name](LAYOUTS["dense"], 5, torch.float32)))
    chosen, _ = op.choice(arguments, impl, True)
    ran = []
    for attribute, meant in (("default", "cpp"), ("reference", "reference")):
        run = getattr(op, attribute)
        watched = lambda *args, run=run, meant=meant: ran.append(meant) or run(*args)  # noqa: E731
        monkeypatch.setattr(op, attribute, watched)
    if op._dense is not None:
        run = op._dense.run
        object.__setattr__(op._dense, "run", lambda *args: ran.append("dense") or run(*args))
    try:
        op(*arguments, impl=impl)
    finally:
        if op._dense is not None:
            object.__setattr__(op._dense, "run", run)
    assert ran[0] == (chosen if op._has_cpp or chosen == "dense" or impl else "cpp")


def test_debug_shows_results_times_inner_calls_and_errors(lines):
    x, w = randn(6, 4), randn(64, 4, seed=1)
    with mikernels.log("debug"):
        topk_encode(x, w, k=32)
        with pytest.raises((ValueError, RuntimeError), match=r"k .*in 1\.\."):
            OPS["row_topk"](x, 99, False)
    said = lines()
    outer, inner, gave = (s.startswith for s in (said[0], said[1], said[3]))
    assert outer("encode(") and inner("  row_topk(scores=float32[6, 64], k=32")
    assert gave("encode gave float32[6, 32], int64[6, 32] after ")
    assert re.search(r"after [\d.]+ (us|ms)$", said[3])
    assert said[-1].startswith("row_topk raised ")


def test_off_is_off_after_blocks_errors_and_levels(lines, capsys):
    x = randn(3, 9)

    def logged():
        before = len(lines())
        row_topk(x, 2)
        return len(lines()) - before

    assert logged() == 0
    with pytest.raises(ZeroDivisionError), mikernels.log("info"):
        raise ZeroDivisionError
    assert logged() == 0
    for name in ("mikernels.ops", "mikernels"):
        logging.getLogger(name).setLevel(logging.INFO)
        assert logged() == 1
        logging.getLogger(name).setLevel(logging.NOTSET)
        assert logged() == 0
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.DEBUG)
    assert logged() == 0
    root.setLevel(before)
    # blocks that do not nest, as those of two threads
    first, second = mikernels.log("info"), mikernels.log("debug")
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert logged() == 2
    second.__exit__(None, None, None)
    mikernels.log("off")
    assert logged() == 0
    assert all(type(op) is Op and op.default is vars(op)["default"] for op in OPS.values())


def test_lines_go_to_standard_error_where_nobody_else_takes_them(run_python, tmp_path):
    """And an import does not load what only a log that is on needs."""
    with mikernels.log("save", tmp_path / "former"):
        row_topk(randn(3, 9), 2)
    script = f"""
        import sys, torch, mikernels
        mikernels.row_topk
        for name in ("pydantic", "safetensors", "mikernels.calls.recorded"):
            assert name not in sys.modules, name
        x, err = torch.randn(3, 9), sys.stderr
        sys.stderr = sys.stdout
        with mikernels.log("info"):
            mikernels.row_topk(x, 2)
        mikernels.row_topk(x, 2)
        sys.stderr = err
        mikernels.log("save", {str(tmp_path / "own")!r})
    """
    assert run_python(script).count("mikernels: row_topk(scores=float32[3, 9], k=2") == 1
    assert not list((tmp_path / "own").iterdir()), "let go of at the end"
    # where nobody has asked for an operator before, as the command does
    script = f"""
        from mikernels.calls.replay import replay
        print(replay({str(files(tmp_path / "former")[0])!r}).differences)
    """
    assert run_python(script) == "[]\n"


def test_a_setting_that_fails_changes_nothing_and_ended_blocks_are_over(tmp_path):
    (tmp_path / "file").touch()
    gone = mikernels.log("save", tmp_path / "gone")
    mikernels.log("save", tmp_path / "mine")
    shutil.rmtree(tmp_path / "gone")
    (tmp_path / "gone").touch()
    for fails in (lambda: mikernels.log("save", tmp_path / "file"), gone.__enter__):
        with pytest.raises(FileExistsError):
            fails()
        # still saved, by one who still owns the folder
        row_topk(randn(3, 9), 2)
        with pytest.raises(BlockingIOError), owned(tmp_path / "mine", "test"):
            pass
    assert len(files(tmp_path / "mine")) == 2
    mikernels.log("off")
    # as threads do: both are made before either is entered
    first, second = mikernels.log("info"), mikernels.log("debug")
    with first, second:
        pass
    assert all(type(op) is Op for op in OPS.values())
    for folder in (3, "", b"calls"):
        with pytest.raises(TypeError, match="log: folder must be a path"):
            mikernels.log("save", folder)


def test_threads_are_named_and_may_call_while_it_is_switched(lines):
    x, stop, wrong = randn(3, 9), threading.Event(), []
    expected = row_topk(x, 2)

    def call():
        while not stop.is_set():
            if not all(map(torch.equal, row_topk(x, 2), expected)):
                wrong.append(1)

    thread = threading.Thread(target=call, name="loader")
    thread.start()
    while not any(line.startswith("[loader] row_topk(") for line in lines()):
        with mikernels.log("debug"):
            row_topk(x, 2)
    stop.set()
    thread.join()
    assert not wrong


def test_compiled_graphs_are_traced_once_said_and_not_traced_anew(lines):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x, w = randn(5, 6), randn(64, 6, seed=1)
    expected = topk_encode(x, w, k=3).values
    compiled = torch.compile(
        lambda x: topk_encode(x, w, k=3).values, fullgraph=True, backend=counter
    )
    assert torch.equal(compiled(x), expected) and not lines()
    with mikernels.log("info"):
        assert torch.equal(compiled(x), expected)
        assert [line.split(":")[0] for line in lines()] == [
            "encode traced by torch.compile, torch.export or fake tensors"
        ]
    frames = counter.frame_count
    assert torch.equal(compiled(x), expected) and counter.frame_count == frames


@pytest.mark.parametrize("name", SAMPLES)
def test_every_operator_is_saved_as_it_was_and_replays(name, tmp_path):
    op, given = OPS[name], []
    samples = list(SAMPLES[name](LAYOUTS["strided"], 5, torch.float32))
    with mikernels.log("save", tmp_path):
        for arguments in samples:
            given.append([a.clone() if isinstance(a, torch.Tensor) else a for a in arguments])
            op(*arguments)
    assert len(files(tmp_path)) == len(given) > 0
    for path, arguments in zip(files(tmp_path), given, strict=True):
        for a, b in zip(arguments, load(path).arguments(), strict=True):
            assert identical(a, b) if isinstance(a, torch.Tensor) else (a, type(a)) == (b, type(b))
        found = replay(path)
        assert found.findings and not found.differences and not found.warnings


def test_strides_sharing_and_alignment_come_back(tmp_path):
    base = randn(8, 12)
    rows, w = base[1:7, 2:6], base.flatten()[5:85].view(20, 4)  # overlap
    wide = randn(1, 4).expand(6, 4)
    with mikernels.log("save", tmp_path):
        OPS["encode"](rows, w, None, None, None, 3, True)
        OPS["encode"](wide, w[::2], None, None, torch.full((10,), float("nan")), 3, False)
    x, again = load(files(tmp_path)[0]).arguments()[:2]
    for a, b in ((x, rows), (again, w)):
        assert torch.equal(a, b) and a.stride() == b.stride()
        assert a.data_ptr() % 64 == b.data_ptr() % 64
    assert again.data_ptr() - x.data_ptr() == w.data_ptr() - rows.data_ptr()
    x[0, 3] = 7
    assert (again == 7).any(), "memory that was shared is shared"
    second = load(files(tmp_path)[1]).arguments()
    assert second[0].stride() == wide.stride() and second[1].stride() == w[::2].stride()
    assert second[4].isnan().all()
    assert not replay(files(tmp_path)[0]).differences


def test_a_wrong_result_is_a_difference(tmp_path, monkeypatch, capsys):
    op, scores = OPS["row_topk"], randn(3, 9)
    right = op.reference
    wrong = lambda *args: (right(*args)[0] * 1.001, right(*args)[1])  # noqa: E731
    with monkeypatch.context() as patch, mikernels.log("save", tmp_path):
        patch.setattr(op, "reference", wrong)
        op(scores, 2, False, impl="reference")
    path = files(tmp_path)[0]
    found = replay(path)
    assert len(found.differences) == 2, found
    assert "other bits than those saved in result.values" in found.differences[0]
    assert found.differences[1].startswith("saved: result.values is within")
    asked = ["mikernels", "replay", str(path), "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    told = json.loads((tmp_path / "found.json").read_text())
    assert all(difference in capsys.readouterr().out for difference in found.differences[:1])
    assert stop.value.code == 1 and told["differences"] == found.differences
    # swapped neighbours are no rounding
    with monkeypatch.context() as patch, mikernels.log("save", tmp_path):
        patch.setattr(op, "reference", lambda *a: tuple(t.flip(-1) for t in right(*a)))
        op(scores, 2, False, impl="reference")
    assert replay(files(tmp_path)[1]).differences


def test_a_selection_among_near_scores_is_no_difference(tmp_path):
    """fp32's sums rank two scores otherwise than fp64's."""
    x = torch.tensor([[1.0, 1.0, 1.0]])
    w = torch.tensor([[2.0**24, 1.0, -(2.0**24)], [0.5, 0.25, 0.0], [0.1, 0.1, 0.1]])
    with mikernels.log("save", tmp_path):
        OPS["encode"](x, w, None, None, None, 1, True, impl="reference")
    found = replay(files(tmp_path)[0])
    assert not found.differences


def test_a_value_at_another_index_is_a_difference(tmp_path, monkeypatch):
    """Also where bits need not be the same: at a level that is not here."""
    op, scores = OPS["row_topk"], randn(3, 9)
    values, indices = op(scores, 2, False)
    indices[1] = indices[1].flip(0)
    with monkeypatch.context() as patch, mikernels.log("save", tmp_path):
        patch.setattr(op, "reference", lambda *args: (values, indices))
        op(scores, 2, False, impl="reference")
    monkeypatch.setattr("mikernels.calls.replay._judge_bits", lambda *args: False)
    found = replay(files(tmp_path)[0])
    assert len(found.differences) == 1, found


def test_a_call_that_raised_raises_again(tmp_path):
    with mikernels.log("save", tmp_path), pytest.raises((ValueError, RuntimeError)) as error:
        OPS["row_topk"](randn(3, 9), 99, False)
    found = replay(files(tmp_path)[0])
    assert not found.differences and str(error.value) in found.findings[0]


@built
def test_a_level_that_is_not_here_is_a_warning(tmp_path, monkeypatch):
    with mikernels.log("save", tmp_path):
        row_topk(randn(3, 9), 2)
    monkeypatch.setattr(_ext, "supported_levels", lambda: ("portable",))
    found = replay(files(tmp_path)[0])
    assert "saved at level" in found.warnings[0] and not found.differences


def broken(path, how):
    data = path.read_bytes()
    if how == "foreign":
        save_file({"x": torch.zeros(3)}, path)
    elif how == "missing":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "bit":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    else:
        new = {
            "empty": b"",
            "cut": data[:-7],
            "noise": b"\x07" * 300,
            "version": data.replace(b'\\"version\\": 1', b'\\"version\\": 9'),
            "number": data.replace(b'\\"value\\": 2', b'\\"value\\": 3'),
            "operator": data.replace(b'\\"operator\\": \\"row', b'\\"operator\\": \\"wor'),
            "strides": data.replace(b'\\"strides\\": [9, 1]', b'\\"strides\\": [8, 1]'),
        }[how]
        assert new != data
        path.write_bytes(new)


DAMAGES = ("foreign", "missing", "folder", "bit", "empty", "cut", "noise")
DAMAGES += ("version", "number", "operator", "strides")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_or_foreign_file_is_named(tmp_path, how):
    with mikernels.log("save", tmp_path):
        row_topk(randn(3, 9), 2)
    path = files(tmp_path)[0]
    broken(path, how)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(f"replay: {path} must ")):
        replay(path)


def test_saving_stops_at_its_limits_and_where_it_fails(tmp_path, monkeypatch):
    x = randn(3, 9)
    expected, _ = row_topk(x, 2)
    with mikernels.log("save", tmp_path / "calls", max_calls=2):
        row_topk(x, 2)
        row_topk(x, 2)
        with pytest.warns(UserWarning, match="no more calls are saved .* max_calls=2"):
            row_topk(x, 2)
        row_topk(x, 2)
    assert len(files(tmp_path / "calls")) == 2
    with (
        mikernels.log("save", tmp_path / "calls", max_bytes=100),
        pytest.warns(UserWarning, match="max_bytes=100"),
    ):
        row_topk(x, 2)

    def full(*args):
        raise OSError(28, "No space left on device")

    # numbers go on, and the call itself is not harmed
    with mikernels.log("save", tmp_path / "calls"):
        row_topk(x, 2)
        monkeypatch.setattr("mikernels.calls.saved.write_tensors", full)
        with pytest.warns(UserWarning, match="a call must be written to .*No space left"):
            assert torch.equal(row_topk(x, 2)[0], expected)
        row_topk(x, 2)
    numbers = [int(path.name.split("-")[0]) for path in files(tmp_path / "calls")]
    assert numbers == [1, 2, 3]


def test_what_has_no_bytes_is_shown_and_not_saved(tmp_path, lines):
    with mikernels.log("save", tmp_path), pytest.warns(UserWarning, match="meta device"):
        row_topk(torch.empty(3, 9, device="meta"), 2)
    with mikernels.log("save", tmp_path), FakeTensorMode():
        fake = torch.empty(3, 9)
        with pytest.warns(UserWarning, match="is not saved: scores is a FakeTensor"):
            row_topk(fake, 2)
    assert not files(tmp_path) and "FakeTensor float32[3, 9]" in " ".join(lines())


def test_bad_arguments_are_refused_and_change_nothing(tmp_path):
    for error, arguments in (
        (TypeError, (None,)),
        (TypeError, (True,)),
        (ValueError, ("verbose",)),
        (ValueError, ("save",)),
        (ValueError, ("info", tmp_path)),
    ):
        with pytest.raises(error, match="log: (level|folder) must"):
            mikernels.log(*arguments)
    with pytest.raises(ValueError, match="log: max_calls must be at least 1, got 0"):
        mikernels.log("save", tmp_path, max_calls=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="log: calls must be written to"):
        mikernels.log("save", tmp_path / "file")
    assert type(OPS["row_topk"]) is Op
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row_topk(randn(3, 9), 2)
    assert not files(Path(tmp_path))
