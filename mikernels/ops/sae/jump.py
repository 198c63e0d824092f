# SPDX-License-Identifier: Apache-2.0
"""JumpReLU and the step, elementwise, with straight-through gradients at the threshold.

    jump(h, t) = h where h > t, else 0        step_above(h, t) = 1 where h > t, else 0

Neither has a useful derivative in t. With K a rectangle of area 1 and width eps around it, `K = 1 /
eps where |h - t| < eps / 2`, the estimates of arXiv 2407.14435 are, for an upstream gradient g,

    jump:   dh = g where h > t,   dt = -t K g          step:   dh = 0,   dt = -K g

What libraries do (t theirs, per feature; f the codes, in slots as `jump` returns them):

    SAELens               jump; step_above(h)
    its ste_to_input      jump(input_gradient="both"); step_above(h, to_input=True)
    its log_threshold     the same of `t = log_t.exp()`; also CLT-Forge (eps 1)
    dictionary_learning   jump; step_above(f)
    circuit-tracer        jump (eps 2), without a step
    Bussmann's BatchTopK  jump(h.relu()); step_above(f), both of `t = log_t.detach().exp() + (log_t
                          - log_t.detach())`: the factor t of d t / d log_t is missing there
    Goreg                 jump(input_gradient="relu"): dh = g where h >= 0; step_above(h)
    Tigges                jump(inclusive=True, threshold_gradient="score"): h >= t, dt = -h K g,
                          K with its edges

Of `f` and `h.relu()` the inactive pairs are at 0, which is inside K where t < eps / 2. For those
features pairs without a slot have a gradient too: keep them all, by a floor of -inf in
`slots_above`.

Any derivative is that of the formulas, in which K and what is above are constant. A NaN h counts as
above, so that a diverged run shows it.
"""

from __future__ import annotations

import math

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import FLOATS
from mikernels.ops.sae.gradients import by_feature_op, feature_sums

INPUT = ("gated", "relu", "both")
THRESHOLD = ("threshold", "score")


def check_bandwidth(op: str, bandwidth: float) -> None:
    """A finite number of at least 0."""
    if isinstance(bandwidth, bool) or not isinstance(bandwidth, int | float | torch.SymFloat):
        raise TypeError(f"{op}: bandwidth must be a number, got {type(bandwidth).__name__}")
    if not (bandwidth >= 0 and math.isfinite(bandwidth)):
        raise ValueError(
            f"{op}: bandwidth must be finite and at least 0 (0 is without a straight-through "
            f"gradient), got {bandwidth}"
        )


def check_forms(
    op: str, bandwidth: float, input_gradient: str, threshold_gradient: str = "threshold"
) -> None:
    check_bandwidth(op, bandwidth)
    if input_gradient not in INPUT:
        raise ValueError(f"{op}: input_gradient must be one of {INPUT}, got {input_gradient!r}")
    if threshold_gradient not in THRESHOLD:
        raise ValueError(
            f"{op}: threshold_gradient must be one of {THRESHOLD}, got {threshold_gradient!r}"
        )


def _operands(
    op: str, h: torch.Tensor, threshold: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(h, torch.Tensor):
        raise TypeError(f"{op}: h must be a torch.Tensor, got {type(h).__name__}")
    if not isinstance(threshold, torch.Tensor):
        if isinstance(threshold, bool) or not isinstance(threshold, int | float | torch.SymFloat):
            raise TypeError(
                f"{op}: threshold must be a tensor or a number, got {type(threshold).__name__}"
            )
        threshold = torch.full((), float(threshold), dtype=h.dtype, device=h.device)
    for name, t in (("h", h), ("threshold", threshold)):
        if t.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be floating, got {t.dtype}; pass {name}.float()")
    if threshold.device != h.device:
        raise ValueError(
            f"{op}: threshold must be on the device of h ({h.device}), got {threshold.device}; "
            f"move it"
        )
    sizes = zip(reversed(threshold.shape), reversed(h.shape), strict=False)
    if threshold.dim() > h.dim() or any(a != b and a != 1 for a, b in sizes):
        raise ValueError(
            f"{op}: threshold must broadcast to h {list(h.shape)}, got {list(threshold.shape)}; "
            f"of slots, pass gather_features(threshold, indices)"
        )
    return h, threshold


def _below(h: torch.Tensor, threshold: torch.Tensor, inclusive: bool) -> torch.Tensor:
    return h < threshold if inclusive else h <= threshold


def _inside(
    h: torch.Tensor, threshold: torch.Tensor, bandwidth: float, inclusive: bool
) -> torch.Tensor:
    distance = ((h - threshold) / bandwidth).abs()
    return distance <= 0.5 if inclusive else distance < 0.5


def _in_one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The wider of the first two tensors' dtypes."""
    dtype = torch.promote_types(tensors[0].dtype, tensors[1].dtype)
    return tuple(t.to(dtype) for t in tensors)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(h, threshold, bandwidth, inclusive, input_gradient, threshold_gradient):
        return h.masked_fill(_below(h, threshold, inclusive), 0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, threshold, *ctx.forms = inputs
        ctx.save_for_backward(h, threshold)

    @staticmethod
    @in_own_dtype
    def backward(ctx, g):
        bandwidth, inclusive, input_gradient, threshold_gradient = ctx.forms
        saved = ctx.saved_tensors
        h, threshold, g = _in_one_dtype(*saved, g)
        dh = dt = estimate = None
        if bandwidth:
            height = threshold if threshold_gradient == "threshold" else h
            inside = _inside(h, threshold, bandwidth, inclusive)
            estimate = torch.where(inside, height / bandwidth * g, 0)
        if ctx.needs_input_grad[0]:
            cut = h < 0 if input_gradient == "relu" else _below(h, threshold, inclusive)
            dh = g.masked_fill(cut, 0)
            if input_gradient == "both" and estimate is not None:
                dh = dh + estimate
            dh = dh.to(saved[0].dtype)
        if ctx.needs_input_grad[1] and estimate is not None:
            dt = -estimate.sum_to_size(threshold.shape).to(saved[1].dtype)
        return dh, dt, None, None, None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(h, threshold, bandwidth, inclusive, to_input):
        return (~_below(h, threshold, inclusive)).to(h.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, threshold, *ctx.forms = inputs
        ctx.save_for_backward(h, threshold)

    @staticmethod
    @in_own_dtype
    def backward(ctx, g):
        bandwidth, inclusive, to_input = ctx.forms
        saved = ctx.saved_tensors
        h, threshold, g = _in_one_dtype(*saved, g)
        dh = dt = None
        if bandwidth:
            inside = _inside(h, threshold, bandwidth, inclusive)
            estimate = torch.where(inside, 1.0 / bandwidth * g, 0)
            if ctx.needs_input_grad[0] and to_input:
                dh = estimate.to(saved[0].dtype)
            if ctx.needs_input_grad[1]:
                dt = -estimate.sum_to_size(threshold.shape).to(saved[1].dtype)
        return dh, dt, None, None, None


@in_own_dtype
def jump(
    h: torch.Tensor,
    threshold: torch.Tensor | float,
    *,
    bandwidth: float,
    inclusive: bool = False,
    input_gradient: str = "gated",
    threshold_gradient: str = "threshold",
) -> torch.Tensor:
    """JumpReLU: h where it is above its threshold, else 0, with a straight-through gradient.

    The module's docstring has the formulas, and which arguments are which library's.

    Args:
        h: floating, any shape and strides: dense `[N, F]`, or the values of slots `[S]`.
        threshold: floating, broadcastable to h (of slots: `gather_features(threshold, indices)`),
            or a number. It is compared, and its gradient summed, in the wider of the two dtypes.
        bandwidth: eps, width of the rectangle K; 0 gives the threshold no gradient.
        inclusive: above is `h >= threshold`, and K has its edges.
        input_gradient: "gated" is g where h is above; "relu" is g where h >= 0; "both" is "gated"
            less the threshold's estimate, since the jump moves with h as it does with -threshold.
        threshold_gradient: "threshold" is `-threshold K g`, "score" is `-h K g`.

    Returns:
        In the shape and dtype of h.

    Raises:
        TypeError, ValueError: for arguments other than the above.

    Example:
        >>> h = torch.tensor([0.2, 0.6, -1.0])
        >>> mk.jump(h, 0.5, bandwidth=0.1)
        tensor([0.0000, 0.6000, 0.0000])
    """
    h, threshold = _operands("jump", h, threshold)
    check_forms("jump", bandwidth, input_gradient, threshold_gradient)
    return _Jump.apply(h, threshold, bandwidth, bool(inclusive), input_gradient, threshold_gradient)


@in_own_dtype
def step_above(
    h: torch.Tensor,
    threshold: torch.Tensor | float,
    *,
    bandwidth: float,
    inclusive: bool = False,
    to_input: bool = False,
) -> torch.Tensor:
    """1 where h is above its threshold, else 0, with a straight-through gradient: L0, to be summed.

    Args:
        h, threshold, bandwidth, inclusive: as in `jump`.
        to_input: h gets the negative of the threshold's gradient, rather than none.

    Returns:
        In the shape and dtype of h.

    Raises:
        TypeError, ValueError: for arguments other than the above.

    Example:
        >>> h, threshold = torch.tensor([0.2, 0.6]), torch.tensor([0.5, 0.5], requires_grad=True)
        >>> l0 = mk.step_above(h, threshold, bandwidth=0.4).sum()
        >>> l0.backward()
        >>> l0.item(), threshold.grad.tolist()  # 0.6 alone lies within 0.2 of its threshold
        (1.0, [-0.0, -2.5])
    """
    h, threshold = _operands("step_above", h, threshold)
    check_bandwidth("step_above", bandwidth)
    return _Step.apply(h, threshold, bandwidth, bool(inclusive), bool(to_input))


@torch.no_grad()
def jump_floor(
    threshold: torch.Tensor,
    *,
    bandwidth: float,
    inclusive: bool = False,
    input_gradient: str = "gated",
) -> torch.Tensor:
    """Below what `jump` and `step_above` of these arguments give nothing, of float32 or float64.

    `slots_above` with this floor holds every pair that has a value or a gradient.
    """
    check_forms("jump_floor", bandwidth, input_gradient)
    floor = threshold
    if bandwidth:
        # the distance is rounded three times before it is compared with a half
        floor = threshold - (0.5 + 4 * torch.finfo(threshold.dtype).eps) * bandwidth
    if input_gradient == "relu":
        floor = floor.clamp_max(0)
    if bandwidth or inclusive or input_gradient == "relu":
        # at the floor is below it
        floor = floor.nextafter(torch.full_like(floor, -torch.inf))
    return floor


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(parameter, indices, impl):
        return parameter.index_select(0, indices.reshape(-1)).reshape(indices.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        parameter, indices, ctx.impl = inputs
        ctx.n_features = parameter.shape[0]
        ctx.save_for_backward(indices)

    @staticmethod
    @in_own_dtype
    def backward(ctx, d_slots):
        (indices,) = ctx.saved_tensors
        # feature_sum's bias, of rows without columns
        coefficients = d_slots.reshape(-1, 1)
        rows = coefficients.new_empty(coefficients.shape[0], 0)
        _, sums = feature_sums(
            coefficients, rows, indices.reshape(-1, 1), None, ctx.n_features, ctx.impl
        )
        return sums, None, None


@in_own_dtype
def gather_features(
    parameter: torch.Tensor, indices: torch.Tensor, *, impl: str | None = None
) -> torch.Tensor:
    """`parameter[indices]`: what slots need of a number per feature, such as its threshold.

    The gradient sums the slots of each feature in their order, in the accumulation dtype and
    without atomics, so that it has the same bits every time, on a GPU too; gradients of any order.

    Args:
        parameter: `[F]` float32, bfloat16, float16 or float64.
        indices: any shape, int64 in 0..F-1.
        impl: of the gradient's sum: None (best for the device), "cpp", "triton" or "reference".

    Raises:
        TypeError, ValueError, IndexError: for a dtype, shape or index other than the above.
    """
    if parameter.dtype not in FLOATS:
        raise TypeError(f"gather_features: parameter must be floating, got {parameter.dtype}")
    if parameter.dim() != 1:
        raise ValueError(
            f"gather_features: parameter must be [F], got {list(parameter.shape)}; reshape it"
        )
    if indices.dtype != torch.int64:
        raise TypeError(f"gather_features: indices must be int64, got {indices.dtype}")
    impl = by_feature_op.resolve(impl, parameter.device)
    return _GatherFeatures.apply(parameter, indices, impl)
