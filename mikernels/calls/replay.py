# SPDX-License-Identifier: Apache-2.0
"""A saved call, run again: to the same bits, and as accurate as eager torch?

The call runs with the implementation that ran then, with another one (the reference) and, as the
reference, in float64. Bits are compared with those saved; they must be the same on the same kind of
processor. Every result is then held to the error-ratio rule against float64:

    max |result - exact| <= 2 max |reference - exact| + eps max |exact|

with the reference in the call's dtype, and NaN and infinity where float64 has them; eps is that of
the result's dtype, or of the one that is computed in if that is coarser. Selected indices must be
the reference's or float64's; where scores are within rounding of each other they may differ. Then a
row's values are compared index by index, and those whose index float64 has not, by size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mikernels import _ext
from mikernels._dispatch import FLOATS, IMPLS, accumulate_dtype
from mikernels.calls.saved import Call, load, machine, results_of
from mikernels.tensor_files import bytes_of

Results = dict[str, torch.Tensor]
# float64 is judged by a reference in float64, whose error nothing finer tells
FINEST = 2.0**-40
# of the saved machine: what is told where it differs
FACTS = ("mikernels", "torch", "cpu", "gpu", "matmul_precision", "deterministic")


@dataclass
class Replay:
    """What a replay found.

    Attributes:
        operator, implementation, reason: of the call that was saved.
        ran: the implementation that ran now. other: what it was compared with.
        warnings: how this machine differs from the one that saved it.
        findings: what was compared and is right. differences: what is not.
    """

    operator: str
    implementation: str
    reason: str
    ran: str
    other: str
    warnings: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def judge(self, text: str, right: bool) -> None:
        (self.findings if right else self.differences).append(text)


def replay(path: str | Path, impl: str = "reference") -> Replay:
    """Run a call saved by `mikernels.log("save", folder)` again, and compare.

    Args:
        path: the call's file.
        impl: what it is compared with, beside the result that was saved: "reference", "cpp",
            "triton", "cuda".

    Returns:
        A Replay, without `differences` where all is right.

    Raises:
        FileNotFoundError, ValueError: the file is missing, foreign or damaged; impl is none.
        RuntimeError: impl is not available here.

    Example:
        >>> from mikernels.calls.replay import replay
        >>> replay("calls/000001-encode.safetensors").differences  # doctest: +SKIP
        []
    """
    if impl not in IMPLS:
        raise ValueError(f"replay: impl must be one of {list(IMPLS)}, got {impl!r}")
    call = load(path)
    form, op = call.form, call.op
    found = Replay(op.name, form.implementation, form.reason, form.implementation, impl)
    device = _device(call, found)
    with _as_saved(call, found) as same_level:
        found.ran = _available(call, device, found)
        try:
            now = _run(call, found.ran, device)
        except (RuntimeError, ValueError, TypeError) as error:
            _judge_error(form.error, error, found)
            return found
        if form.error is not None:
            found.judge(f"{found.ran} returns, and raised then: {form.error}", False)
        eager = now if found.ran == "reference" else _run(call, "reference", device)
        others = {found.ran: now, impl: eager if impl == "reference" else _run(call, impl, device)}
        exact = _run(call, "reference", device, torch.float64)
    saved = call.results()
    if saved is not None:
        same = same_level and device is None and found.ran == form.implementation
        if not _judge_bits(saved, now, same, found):
            others = {"saved": saved, **others}
    elif form.error is None:
        found.warnings.append("no result was saved: the call had not ended when its process did")
    eps = _rounding(call)
    for name, results in others.items():
        if results is not eager:
            _judge_accuracy(name, results, eager, exact, eps, found)
    return found


def _rounding(call: Call) -> float:
    """One rounding of what the call computes in, whatever it returns."""
    dtypes = {t.dtype for t in call.tensors.values() if t.dtype in FLOATS}
    if dtypes == {torch.float64}:
        return FINEST
    return max(torch.finfo(accumulate_dtype(dtype)).eps for dtype in dtypes) if dtypes else 0.0


def _device(call: Call, found: Replay) -> str | None:
    """Where to run instead of where it ran: the CPU, for a GPU's call where there is none."""
    devices = {entry.tensor.device for entry in call.form.arguments if entry.tensor}
    if "cuda" not in devices or torch.cuda.is_available():
        return None
    found.warnings.append("saved on a GPU, which is not here: replayed on the CPU")
    return "cpu"


def _available(call: Call, device: str | None, found: Replay) -> str:
    """The implementation that ran, or what runs here in its place."""
    name, op = call.form.implementation, call.op
    args = call.arguments(device)
    if name == "dense" or not any(isinstance(a, torch.Tensor) for a in args):
        return name
    try:
        target = next(a.device for a in args if isinstance(a, torch.Tensor))
        op.resolve(name, target)
    except RuntimeError as error:
        instead, _ = op.owner(tuple(args))
        found.warnings.append(f"{error}; {instead} runs in its place")
        return instead
    return name


@contextmanager
def _as_saved(call: Call, found: Replay) -> Iterator[bool]:
    """The threads and the level of the saved call; yields whether this processor has the level."""
    then, now = call.form.machine, machine()
    for fact in FACTS:
        if getattr(then, fact) != now[fact]:
            found.warnings.append(f"{fact} was {getattr(then, fact)} and is {now[fact]}")
    threads, same = torch.get_num_threads(), True
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(then.threads)
        if then.level in _ext.supported_levels():
            stack.enter_context(_ext.force_level(str(then.level)))
        elif call.form.implementation == "cpp":
            same = False
            found.warnings.append(
                f"saved at level {then.level}, which this processor or build does not have: "
                f"replayed at {_ext.cpu_level()}"
            )
        yield same


def _run(call: Call, name: str, device: str | None, dtype: torch.dtype | None = None) -> Results:
    """Results by name, those that the operator writes included, of fresh arguments."""
    op, args = call.op, call.arguments(device)
    if dtype is not None:
        args = [
            a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in args
        ]
    with torch.no_grad():
        gave = op.run_as(name, tuple(args))
    named = results_of(op, args, gave)
    return {name: t.cpu() for name, t in named.items() if t is not None}


def _judge_error(then: str | None, now: Exception, found: Replay) -> None:
    told = f"{type(now).__name__}: {now}"
    if then is None:
        found.judge(f"{found.ran} raises {told}, and did not then", False)
    else:
        found.judge(f"{found.ran} raises {told}; then it raised {then}", then == told)


def _judge_bits(saved: Results, now: Results, same: bool, found: Replay) -> bool:
    """Whether the bits are those that were saved."""
    differing = [n for n in saved if n not in now or not identical(saved[n], now[n])]
    if not differing:
        found.judge(f"{found.ran}: the bits that were saved", True)
    elif same:
        found.judge(f"{found.ran}: other bits than those saved in {', '.join(differing)}", False)
    else:
        found.warnings.append(
            f"{found.ran}: other bits than those saved in {', '.join(differing)}, as another "
            f"level, implementation or device may have"
        )
    return not differing


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits, except that one NaN is as good as another."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.is_floating_point():
        if not torch.equal(a.isnan(), b.isnan()):
            return False
        a, b = (t.masked_fill(t.isnan(), 0) for t in (a, b))
    # bytes: -0 is not 0
    return bytes_of(a) == bytes_of(b)


def _judge_accuracy(
    name: str, results: Results, eager: Results, exact: Results, eps: float, found: Replay
) -> None:
    """Every result by the error-ratio rule; indices by equality with the reference's or exact."""
    for key, t in results.items():
        if not t.shape == exact[key].shape == eager[key].shape:
            shapes = f"{list(eager[key].shape)} by the reference, {list(exact[key].shape)} in it"
            found.judge(f"{name}: {key} has shape {list(t.shape)}; {shapes} in float64", False)
            return
    selected = None
    for key, t in results.items():
        if t.is_floating_point():
            continue
        if any(torch.equal(t, other[key]) for other in (eager, exact)):
            found.judge(f"{name}: {key} is the reference's", True)
        else:
            # a selection [N, k] beside its values, or else an error
            selects = t.dim() == 2 and any(
                v.is_floating_point() and v.shape == t.shape for v in results.values()
            )
            found.judge(
                f"{name}: {key} differs from float64's in {int((t != exact[key]).sum()):,} of "
                f"{t.numel():,} places",
                selects,
            )
        if t.dim() == 2:
            selected = (t, eager[key], exact[key])
    for key, t in results.items():
        if t.is_floating_point():
            least = max(eps, torch.finfo(t.dtype).eps)
            _judge_values(f"{name}: {key}", t, eager[key], exact[key], selected, least, found)


def _judge_values(
    what: str,
    t: torch.Tensor,
    eager: torch.Tensor,
    exact: torch.Tensor,
    selected: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    eps: float,
    found: Replay,
) -> None:
    dtype = t.dtype
    t, eager, exact = t.double(), eager.double(), exact.double()
    exact_of_eager = exact
    if selected is not None and all(s.shape == t.shape for s in selected):
        own, eagers, exacts = selected
        eager, exact_of_eager = _matched(eager, eagers, exact, exacts)
        t, exact = _matched(t, own, exact, exacts)
    rounded = exact.to(dtype).double()
    finite = rounded.isfinite()
    if not identical(t[~finite], rounded[~finite]):
        found.judge(f"{what} has NaN or infinity elsewhere than float64", False)
        return
    if not finite.any():
        found.judge(f"{what} is not finite anywhere, as in float64", True)
        return
    error = (t[finite] - exact[finite]).abs().max().item()
    known = exact_of_eager.to(dtype).isfinite()
    allowed = (eager[known] - exact_of_eager[known]).abs().max().item()
    limit = 2 * allowed + eps * exact[finite].abs().max().item()
    found.judge(
        f"{what} is within {error:.2e} of float64, {limit:.2e} is allowed",
        error <= limit,
    )


def _matched(
    values: torch.Tensor, indices: torch.Tensor, exact: torch.Tensor, exacts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both values, each row in an order in which what belongs together meets.

    Rows of the same indices stay. In others the slots of indices that both have come first, by
    index; then the others, which stand for scores that are near each other, by size.
    """
    moved = (indices != exacts).any(-1)
    ours, theirs = indices[moved], exacts[moved]
    # [rows, slots, slots], of the few rows where near scores changed places
    both = ours[:, :, None] == theirs[:, None, :]
    pair = []
    for v, i, shared in ((values, ours, both.any(2)), (exact, theirs, both.any(1))):
        v = v.clone()
        # two stable sorts, the lesser key first
        by_size, order = v[moved].sort(dim=-1, stable=True)
        key = i.masked_fill(~shared, torch.iinfo(i.dtype).max).gather(-1, order)
        v[moved] = by_size.gather(-1, key.sort(dim=-1, stable=True).indices)
        pair.append(v)
    return pair[0], pair[1]
