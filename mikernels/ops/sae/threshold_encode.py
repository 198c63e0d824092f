# SPDX-License-Identifier: Apache-2.0
"""Threshold encode: `h = (x - b_dec) w_enc^T + b_enc`, every pair with `h > floor[feature]`.

The codes are ragged: a token has as many slots as features above their floor. Slots are stored by
token, then by feature. `h` is compared as the operator returns it, in the accumulation dtype, so
that what is kept does not hang on the rounding of 16-bit values. NaN is kept, so that a diverged
run shows it; h at the floor is not; a floor of -inf keeps all but -inf. The number of slots is a
shape that hangs on the data: a GPU is waited for.

On the CPU the screen of mikernels/ops/sae/encode.py finds the pairs, with the feature's floor in
place of the token's bound. Its |h - s| <= e is of h as it is compared, an fp64 sum rounded once,
and e covers the rounding of s + e too; the floor enters unrounded, as the other side of the
comparison. So a pair with s + e < floor has h < floor, and every other one is computed, also where
e is not finite. Those wait, 16,384 to a thread, and then a token's are computed together: where
most pass, the rows of w_enc stay in cache meanwhile, and the time is that of the products in fp64.
Neither the N x F matrix nor a sort is made. Scratch: encode's panels, 64 MB of packed tokens at
most, 16 MB of scores for up to 8 tokens, and 8 bytes a slot. On a GPU the scores of some tokens at
a time are torch's own product (mikernels/kernels/sae/threshold_encode.py).

JumpReLU (arXiv 2407.14435) is `threshold_encode`: slots above the thresholds, then
mikernels/ops/sae/jump.py. With a bandwidth, slots reach as far below the threshold as its
straight-through gradient does; there their value is 0, and so they are inactive.
"""

from __future__ import annotations

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import FLOATS, Op, accumulate_dtype
from mikernels.ops.sae.encode import check_operands, encode_gradients, scores
from mikernels.ops.sae.jump import check_forms, gather_features, jump, jump_floor
from mikernels.values.codes import SparseCodes


def reference(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    floor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h = scores(x, w_enc, b_enc, b_dec)
    kept = ~(h <= floor)
    tokens, indices = kept.nonzero(as_tuple=True)
    row_offsets = torch.zeros(h.shape[0] + 1, dtype=torch.int64, device=h.device)
    row_offsets[1:] = kept.sum(-1).cumsum(0)
    return h[tokens, indices], indices, row_offsets


def _fake(x, w_enc, b_enc, b_dec, floor):
    slots = torch.library.get_ctx().new_dynamic_size()
    return (
        floor.new_empty(slots),
        x.new_empty(slots, dtype=torch.int64),
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
    )


threshold_encode_op = Op(
    "threshold_encode(Tensor x, Tensor w_enc, Tensor? b_enc, Tensor? b_dec, Tensor floor)"
    " -> (Tensor values, Tensor indices, Tensor row_offsets)",
    reference,
    _fake,
    operands={
        "x": "T[N,d]",
        "w_enc": "T[F,d]",
        "b_enc": "T[F]",
        "b_dec": "T[d]",
        "floor": "acc[F]",
    },
    triton="sae.threshold_encode:threshold_encode",
)


class _SlotsAbove(torch.autograd.Function):
    @staticmethod
    def forward(x, w_enc, b_enc, b_dec, floor, impl):
        return threshold_encode_op(x, w_enc, b_enc, b_dec, floor, impl=impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w_enc, _, b_dec, _, ctx.impl = inputs
        _, indices, row_offsets = output
        ctx.save_for_backward(x, w_enc, b_dec, indices, row_offsets)
        ctx.mark_non_differentiable(indices, row_offsets)

    @staticmethod
    @in_own_dtype
    def backward(ctx, dvalues, *_):
        x, w_enc, b_dec, indices, row_offsets = ctx.saved_tensors
        dvalues = dvalues.to(x.dtype)
        saved = x, w_enc, b_dec, dvalues, indices, row_offsets
        found = encode_gradients(dvalues, *saved, False, ctx.needs_input_grad, ctx.impl)
        return *found, None, None


def _of_features(
    op: str,
    name: str,
    given: torch.Tensor | float,
    x: torch.Tensor,
    n_features: int,
    *,
    negative: bool,
) -> torch.Tensor:
    """`given` as `[F]` or 0-dim in the accumulation dtype; NaN is refused, and unless `negative`
    what is below 0: on the CPU after one read, on a GPU and in a graph by the device."""
    acc = accumulate_dtype(x.dtype)
    if isinstance(given, bool) or not isinstance(
        given, int | float | torch.SymInt | torch.SymFloat | torch.Tensor
    ):
        raise TypeError(f"{op}: {name} must be a tensor or a number, got {type(given).__name__}")
    if not isinstance(given, torch.Tensor):
        given = torch.full((), float(given), dtype=acc, device=x.device)
    if given.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be floating, got {given.dtype}; pass {name}.float()")
    if given.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device}, got {given.device}; move it")
    if given.dim() and tuple(given.shape) != (n_features,):
        raise ValueError(
            f"{op}: {name} must have shape [{n_features}] (rows of w_enc) or none, got "
            f"{list(given.shape)}"
        )
    if not given.is_meta:
        fine = (~given.isnan() if negative else given >= 0).all()
        message = f"{op}: {name} must not be NaN" + ("" if negative else ", and at least 0")
        # a fake tensor has another type and no numbers
        if (
            given.device.type != "cpu"
            or torch.compiler.is_compiling()
            or type(given) not in (torch.Tensor, torch.nn.Parameter)
        ):
            torch._assert_async(fine, f"{message}, got others")
        elif not fine:
            bad = given[given.isnan() if negative else ~(given >= 0)].reshape(-1)[0]
            raise ValueError(f"{message}, got {bad.item()}; clamp it")
    return given.to(acc)


def _slots(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    floor: torch.Tensor,
    impl: str,
) -> SparseCodes:
    """h of checked operands, in the accumulation dtype."""
    n_features, d = w_enc.shape
    rows = x.reshape(x.shape[:-1].numel(), d)
    floor = floor.detach().expand(n_features)
    values, indices, row_offsets = _SlotsAbove.apply(rows, w_enc, b_enc, b_dec, floor, impl)
    return SparseCodes._trusted(values, indices, n_features, row_offsets)


@in_own_dtype
def slots_above(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    floor: torch.Tensor | float,
    *,
    wide: bool = False,
    impl: str | None = None,
) -> SparseCodes:
    """The pre-activations of every token that are above their feature's floor.

    Args:
        x: `[..., d]`, N tokens in all. w_enc: `[F, d]`. b_enc: `[F]` or None. b_dec: `[d]` or None.
        floor: `[F]`, or a number or 0-dim for all features; may be negative, -inf keeps all; not
            differentiated.
        wide: values in the accumulation dtype, as they were compared, rather than that of x.
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        Ragged SparseCodes whose values are h, of any sign. Gradients of any order: x, w_enc, b_enc,
        b_dec; the selection is constant.

    Raises:
        TypeError, ValueError: for dtypes, devices or shapes other than the above, or a NaN floor.
    """
    n_features, _ = check_operands("slots_above", x, w_enc, b_enc, b_dec, None)
    limits = _of_features("slots_above", "floor", floor, x, n_features, negative=True)
    impl = threshold_encode_op.resolve(impl, x.device)
    codes = _slots(x, w_enc, b_enc, b_dec, limits, impl)
    return codes if wide else codes.to(x.dtype)


@in_own_dtype
def threshold_encode(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None = None,
    *,
    threshold: torch.Tensor | float,
    b_dec: torch.Tensor | None = None,
    bandwidth: float = 0.0,
    inclusive: bool = False,
    input_gradient: str = "gated",
    threshold_gradient: str = "threshold",
    impl: str | None = None,
) -> SparseCodes:
    """JumpReLU: the features of N tokens whose pre-activation is above their threshold.

    `h = (x - b_dec) w_enc^T + b_enc`; codes are h where `h > threshold`, else 0. A threshold of 0
    is ReLU. The decision is that of fp32 scores (fp64 for fp64), whatever the dtype of x.

    Args:
        x: `[..., d]` activations, N tokens in all; float32, bfloat16, float16 or float64, any
            strides.
        w_enc: `[F, d]` encoder directions as rows, any strides (pass `W.T` of a `[d, F]` matrix).
        b_enc: `[F]` or None.
        threshold: `[F]` floating, or a number or 0-dim for all features; at least 0. It is compared
            in the accumulation dtype (float32 for 16-bit x).
        b_dec: `[d]` subtracted from x, or None.
        bandwidth: width eps of the straight-through gradient of the threshold; 0 gives it none.
            Otherwise the codes also hold pairs within eps / 2 below the threshold, with value 0.
        inclusive, input_gradient, threshold_gradient: which straight-through form, as in
            `mikernels.jump`, where the forms of other libraries are listed. With "relu" the codes
            also hold, with value 0, all pairs with h >= 0.
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        Ragged SparseCodes of the N tokens: values `[S]` in the dtype of x, by token, indices
        ascending within one; S hangs on the data, so a GPU is waited for. Slots of value 0 are
        inactive. Gradients of any order of the formulas: x, w_enc, b_enc, b_dec, threshold; sums
        over slots are taken in fp32 (fp64 for fp64) and in the same order every time.

    Raises:
        TypeError, ValueError: for dtypes, devices, shapes, thresholds or forms other than the
            above.

    Example:
        >>> x, w_enc = torch.randn(4, 16), torch.randn(64, 16)
        >>> codes = mk.threshold_encode(x, w_enc, threshold=1.5)
        >>> h = x @ w_enc.T
        >>> torch.allclose(codes.to_dense(), h * (h > 1.5), atol=1e-5)
        True
    """
    op = "threshold_encode"
    n_features, _ = check_operands(op, x, w_enc, b_enc, b_dec, None)
    check_forms(op, bandwidth, input_gradient, threshold_gradient)
    theta = _of_features(op, "threshold", threshold, x, n_features, negative=False)
    impl = threshold_encode_op.resolve(impl, x.device)
    floor = jump_floor(
        theta, bandwidth=bandwidth, inclusive=inclusive, input_gradient=input_gradient
    )
    codes = _slots(x, w_enc, b_enc, b_dec, floor, impl)
    values = codes.values
    # else every slot is above its threshold
    if bandwidth or inclusive or input_gradient == "relu":
        if theta.dim():
            theta = gather_features(theta, codes.indices, impl=impl)
        values = jump(
            values,
            theta,
            bandwidth=bandwidth,
            inclusive=inclusive,
            input_gradient=input_gradient,
            threshold_gradient=threshold_gradient,
        )
    return SparseCodes._trusted(values.to(x.dtype), codes.indices, n_features, codes.row_offsets)
