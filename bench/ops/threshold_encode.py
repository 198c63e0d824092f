# SPDX-License-Identifier: Apache-2.0
"""JumpReLU encode: the features above a threshold of their own, about k a token."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import mikernels

from ..harness.spec import CPU, Benchmark, Outputs, Provider, Runner, Shape, Verdict, generator
from . import encode
from .encode import PIECE


class Inputs(encode.Inputs):
    """Encode's, and thresholds about where the k-th of F normal scores lies."""

    def __init__(self, shape: Shape, mode: str, seed: int):
        super().__init__(shape, mode, seed)
        # of unit-norm directions: the norm of a centred activation's number
        deviation = math.sqrt(1 + 0.1**2)
        level = torch.special.ndtri(torch.tensor(1 - shape.k / shape.f, dtype=torch.float64))
        spread = 0.02 * torch.randn(shape.f, generator=generator(seed + 1))
        self.threshold = (deviation * level + spread).float()


def _ours(inputs: Inputs) -> Outputs:
    codes = mikernels.threshold_encode(
        inputs.x, inputs.w_enc, inputs.b_enc, threshold=inputs.threshold, b_dec=inputs.b_dec
    )
    assert codes.row_offsets is not None
    return {"values": codes.values, "indices": codes.indices, "row_offsets": codes.row_offsets}


def _eager(inputs: Inputs) -> Outputs:
    """As SAELens has it: codes stay dense."""
    h = torch.addmm(inputs.b_enc, inputs.x - inputs.b_dec, inputs.w_enc.T)
    return {"dense": torch.relu(h) * (h > inputs.threshold)}


def _eager_slots(inputs: Inputs) -> Outputs:
    """And the slots of what is active, as sparse decoders need them."""
    dense = _eager(inputs)["dense"]
    tokens, indices = dense.nonzero(as_tuple=True)
    counts = torch.bincount(tokens, minlength=len(dense))
    row_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return {"values": dense[tokens, indices], "indices": indices, "row_offsets": row_offsets}


def _runner(encode: Callable[[Inputs], Outputs]) -> Callable[[Inputs, str], Runner]:
    return lambda inputs, mode: Runner(lambda: encode(inputs))


def _dense(outputs: Outputs, n_features: int) -> torch.Tensor:
    if "dense" in outputs:
        return outputs["dense"]
    codes = mikernels.SparseCodes.ragged(
        outputs["values"], outputs["indices"], outputs["row_offsets"], n_features
    )
    return codes.to_dense()


def _check(inputs: Inputs, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    """Values against fp64, and the pairs: those may differ that eager's own error decides."""
    ours, theirs = (_dense(o, inputs.shape.f) for o in (outputs, eager))
    w_enc, threshold = inputs.w_enc.double().T, inputs.threshold.double()
    errors, eager_errors, distances, scale = [], [], [0.0], 1.0
    for x, a, b in zip(*(t.split(PIECE) for t in (inputs.x, ours, theirs)), strict=True):
        h = (x.double() - inputs.b_dec.double()) @ w_enc + inputs.b_enc.double()
        scale = max(scale, float(h.abs().max()))
        for acts, found in ((a, errors), (b, eager_errors)):
            found.append(float(torch.where(acts != 0, acts.double() - h, 0).abs().max()))
        unlike = (a != 0) != (h > threshold)
        distances.append(float(torch.where(unlike, (h - threshold).abs(), 0).max()))
    error, eager_error = max(errors), max(eager_errors)
    allowed = 2 * eager_error + torch.finfo(ours.dtype).eps * scale
    wrong = []
    # written so that NaN is wrong
    if not all(e <= allowed < math.inf for e in errors):
        wrong.append(f"values: error {error:.2e}, allowed {allowed:.2e}")
    if not all(d <= allowed for d in distances):
        wrong.append(f"a pair {max(distances):.2e} from its threshold is wrong")
    active = float((ours != 0).sum()) / len(ours)
    detail = "; ".join(wrong) or f"{active:.1f} features a token"
    return Verdict(not wrong, error / scale, eager_error / scale, detail)


BENCHMARK = Benchmark(
    name="threshold_encode",
    ops=("threshold_encode",),
    summary="every feature above its threshold (JumpReLU), exactly",
    modes=("fwd",),
    shapes={"fwd": ("S1", "S2")},
    inputs=Inputs,
    providers=(
        Provider("ours", _runner(_ours), ours=True, screens=True, devices=(CPU,)),
        Provider("eager", _runner(_eager)),
        Provider("eager_slots", _runner(_eager_slots)),
    ),
    check=_check,
    flops=lambda s, mode: 2 * s.n * s.d * s.f,
    bytes=lambda s, mode, size: size * (s.n * s.d + s.f * s.d + s.f),
)
