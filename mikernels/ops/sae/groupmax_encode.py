# SPDX-License-Identifier: Apache-2.0
"""GroupMax encode: `h = (x - b_dec) w_enc^T + b_enc`, the best of `h * scale` in each group.

The F features are k groups of F / k consecutive ones, and a token has exactly one feature of each
(sparsify's `activation="groupmax"`). Order within a group: score descending, then feature
ascending; NaN ranks first. ReLU follows the selection, so a group without a positive score carries
a zero, with zero gradient. Slot j is group j's, so indices ascend.

On the CPU the screen of mikernels/ops/sae/encode.py finds the winners. Features stream in order, so
a token is in one group at a time, and one bound a token serves all groups: tau, the largest lower
bound of the group's features so far, which begins anew at -inf with each group. A feature whose
upper bound is below tau has one above it and cannot win; those that are left when the group ends,
nearly always one, are scored exactly with the token's other groups. A maximum needs no selection,
so tau rises with every candidate; of a group of m random scores some ln m are candidates.
Scratch: encode's panels, a byte a feature and, for chunks of tokens that fit 64 MB, 4k + 64
candidates of 16 bytes a token. The N x F matrix is never formed.

On a GPU torch's products of a few tokens and features at a time, and a maximum over each group
(kernels/sae/groupmax_encode.py).
"""

from __future__ import annotations

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import Op, check_k
from mikernels.ops.sae.encode import Encode, check_operands, scores
from mikernels.values.codes import SparseCodes


def reference(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    k: int,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    h = scores(x, w_enc, b_enc, b_dec)
    n, f = h.shape
    ranked = h if scale is None else h * scale.to(h.dtype)
    # of equal ones torch's max is the first, and NaN is above all
    within = ranked.reshape(n, k, f // k).max(-1).indices
    indices = within + torch.arange(0, f, f // k, device=x.device)
    values = h.gather(-1, indices)
    return (values.relu() if relu else values).to(x.dtype), indices


def _fake(x, w_enc, b_enc, b_dec, scale, k, relu):
    shape = (x.shape[0], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


groupmax_encode_op = Op(
    "groupmax_encode(Tensor x, Tensor w_enc, Tensor? b_enc, Tensor? b_dec, Tensor? scale,"
    " SymInt k, bool relu) -> (Tensor values, Tensor indices)",
    reference,
    _fake,
    operands={
        "x": "T[N,d]",
        "w_enc": "T[F,d]",
        "b_enc": "T[F]",
        "b_dec": "T[d]",
        "scale": "T[F]",
        "k": "1..F",
    },
    triton="sae.groupmax_encode:groupmax_encode",
)


class _GroupMaxEncode(Encode):
    @staticmethod
    def forward(x, w_enc, b_enc, b_dec, scale, k, relu, impl):
        return groupmax_encode_op(x, w_enc, b_enc, b_dec, scale, k, relu, impl=impl)


@in_own_dtype
def groupmax_encode(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None = None,
    *,
    k: int,
    b_dec: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    relu: bool = True,
    impl: str | None = None,
) -> SparseCodes:
    """The best feature of each of k groups for every token, exactly, without the N x F matrix.

    `h = (x - b_dec) w_enc^T + b_enc`; of features `j F / k .. (j + 1) F / k - 1` the one with the
    largest `h * scale` is kept in slot j with value `relu(h)` (GroupMax, EleutherAI's sparsify).
    For fp32 inputs the winners are those of fp32 scores.

    Args:
        x: `[..., d]` activations; float32, bfloat16, float16 or float64, any strides.
        w_enc: `[F, d]` encoder directions as rows, any strides (pass `W.T` of a `[d, F]` matrix).
        b_enc: `[F]` or None.
        k: groups, and active features a token; divides F.
        b_dec: `[d]` subtracted from x, or None.
        scale: `[F]` ranking weights, e.g. decoder norms; not differentiated.
        relu: clamp the winners at 0; slots at 0 get no gradient.
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        SparseCodes with values `[..., k]` in the dtype of x and indices `[..., k]` int64 ascending.
        Gradients of any order: x, w_enc, b_enc, b_dec, from the k slots only, accumulated in fp32;
        the selection is constant.

    Raises:
        TypeError, ValueError: for dtypes, devices, shapes or k other than the above.

    Example:
        >>> codes = mk.groupmax_encode(torch.randn(4, 16), torch.randn(64, 16), k=4)
        >>> bool((codes.indices // 16 == torch.arange(4)).all())  # one of each 16
        True
    """
    n_features, d = check_operands("groupmax_encode", x, w_enc, b_enc, b_dec, scale)
    check_k("groupmax_encode", k, n_features, "rows of w_enc")
    if n_features % k:
        below = max(m for m in range(1, k) if n_features % m == 0)
        raise ValueError(
            f"groupmax_encode: k must divide {n_features} (rows of w_enc) into groups of one size, "
            f"got {k}; the next k below that does is {below}"
        )
    impl = groupmax_encode_op.resolve(impl, x.device)
    ranks = None if scale is None else scale.detach()
    rows = x.reshape(x.shape[:-1].numel(), d)
    values, indices = _GroupMaxEncode.apply(rows, w_enc, b_enc, b_dec, ranks, k, relu, impl)
    shape = (*x.shape[:-1], k)
    return SparseCodes._trusted(values.reshape(shape), indices.reshape(shape), n_features)
