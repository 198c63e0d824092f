# SPDX-License-Identifier: Apache-2.0
"""Arguments for every registered operator: good ones in many layouts, and hostile ones."""

from __future__ import annotations

import attention_samples
import pair_samples
import torch
from oracle import randn, random_indices

from mikernels import by_feature
from mikernels._dispatch import accumulate_dtype
from mikernels._ragged import tokens_of

D, F, K = 6, 20, 3
LEVELS = torch.arange(F) % 3


def dense(*shape, dtype, seed=0):
    return randn(*shape, dtype=dtype, seed=seed)


def transposed(*shape, dtype, seed=0):
    return randn(*reversed(shape), dtype=dtype, seed=seed).permute(*reversed(range(len(shape))))


def strided(*shape, dtype, seed=0):
    return randn(*shape, 2, dtype=dtype, seed=seed)[..., 1]


LAYOUTS = {"dense": dense, "transposed": transposed, "strided": strided}


def slots(n):
    indices = random_indices(n, K, F)
    return indices, *by_feature(indices.reshape(-1), F)


def ragged_slots(n):
    """indices, row_offsets, offsets, order, tokens of K n slots: 0 to 2 K a token, some unused."""
    counts = torch.arange(n) % (2 * K + 1)
    counts = counts.where(counts.cumsum(0) <= n * K, 0)
    row_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    tokens = tokens_of("samples", row_offsets, n * K)
    indices = (torch.arange(n * K) - row_offsets[tokens] + 3 * tokens) % F
    return indices, row_offsets, *by_feature(indices, F), tokens


def by_feature_samples(make, n, dtype):
    yield slots(n)[0].reshape(-1), F


def row_topk_samples(make, n, dtype):
    yield make(n, F, dtype=dtype), K, False
    yield make(n, F, dtype=dtype), F, True


def encode_samples(make, n, dtype):
    x, w = make(n, D, dtype=dtype), make(F, D, dtype=dtype, seed=1)
    yield x, w, None, None, None, K, True
    b_enc, b_dec, scale = (make(size, dtype=dtype, seed=2) for size in (F, D, F))
    yield x, w, b_enc, b_dec, scale, 1, False


def batch_topk_encode_samples(make, n, dtype):
    x, w = make(n, D, dtype=dtype), make(F, D, dtype=dtype, seed=1)
    yield x, w, None, None, None, K * n, True
    b_enc, b_dec, scale = (make(size, dtype=dtype, seed=2) for size in (F, D, F))
    yield x, w, b_enc, b_dec, scale, n, False


def groupmax_encode_samples(make, n, dtype):
    x, w = make(n, D, dtype=dtype), make(F, D, dtype=dtype, seed=1)
    b_enc, b_dec, scale = (make(size, dtype=dtype, seed=2) for size in (F, D, F))
    yield x, w, None, None, None, 4, True
    for k in (1, F):
        yield x, w, b_enc, b_dec, scale, k, False


def threshold_encode_samples(make, n, dtype):
    x, w = make(n, D, dtype=dtype), make(F, D, dtype=dtype, seed=1)
    floor = make(F, dtype=accumulate_dtype(dtype), seed=3)
    yield x, w, None, None, floor
    b_enc, b_dec = make(F, dtype=dtype, seed=2), make(D, dtype=dtype, seed=2)
    yield x, w, b_enc, b_dec, floor


def decode_samples(make, n, dtype):
    values, w = make(n, K, dtype=dtype), make(F, D, dtype=dtype, seed=1)
    yield values, slots(n)[0], None, w, None
    yield values, slots(n)[0], None, w, make(D, dtype=dtype, seed=2)
    yield make(n * K, dtype=dtype), *ragged_slots(n)[:2], w, None


def decode_error_samples(make, n, dtype):
    x = make(n, D, dtype=accumulate_dtype(dtype), seed=3)
    for arguments in decode_samples(make, n, dtype):
        yield *arguments, x


def decode_levels_samples(make, n, dtype):
    x = make(n, D, dtype=accumulate_dtype(dtype), seed=3)
    for arguments in decode_samples(make, n, dtype):
        yield *arguments, x, LEVELS, make(3, 3, dtype=torch.float32, seed=4)


def gather_dot_samples(make, n, dtype):
    rows, w = make(n, D, dtype=dtype), make(F, D, dtype=dtype, seed=1)
    yield rows, w, slots(n)[0], None, None
    yield rows, w, *ragged_slots(n)[:2], None
    rows = make(3, n, D, dtype=dtype)
    yield rows, w, slots(n)[0], None, LEVELS
    yield rows, w, *ragged_slots(n)[:2], LEVELS


def feature_sum_samples(make, n, dtype):
    rows = make(n, D, dtype=dtype, seed=1)
    yield make(n, K, dtype=dtype), rows, *slots(n)[1:], None
    yield make(n * K, dtype=dtype), rows, *ragged_slots(n)[2:]


def sae_gradients_samples(make, n, dtype):
    rows = tuple(make(size, D, dtype=dtype, seed=size) for size in (n, n, F))
    out = torch.zeros(F, D), torch.zeros(F, D), torch.zeros(F)
    yield make(n, K, dtype=dtype), *slots(n), None, *rows, None, None, *out, True
    indices, _, *by_feature = ragged_slots(n)
    ragged = make(n * K, dtype=dtype), indices, *by_feature
    yield *ragged, *rows, None, None, *out, True
    # another width of x and a dy for each level; then also the gradient at the pre-activations
    rows = make(3, n, D, dtype=dtype), make(n, D + 1, dtype=dtype, seed=1), rows[2]
    out = torch.zeros(F, D), torch.zeros(F, D + 1), torch.zeros(F)
    yield make(n, K, dtype=dtype), *slots(n), None, *rows, LEVELS, None, *out, True
    yield *ragged, *rows, LEVELS, make(n * K, dtype=dtype, seed=4), *out, False


def weighted_row_sum_samples(make, n, dtype):
    yield make(n, 1, dtype=torch.float32)[:, 0], make(n, D, dtype=dtype, seed=1)


def adam_rows_samples(make, n, dtype):
    acc = accumulate_dtype(dtype)
    moments = torch.zeros(n, D, dtype=acc), torch.zeros(n, D, dtype=acc)
    lr, step = torch.tensor(1e-3), torch.tensor(1)
    hyper = lr, 0.9, 0.999, 1e-8, step, torch.tensor(0.5, dtype=acc)
    yield dense(n, D, dtype=dtype), make(n, D, dtype=dtype, seed=1), *moments, *hyper, True, True


def grad_sumsq_samples(make, n, dtype):
    yield make(n, D, dtype=dtype, seed=1), dense(n, D, dtype=dtype), True


def sae_update_samples(make, n, dtype):
    acc = accumulate_dtype(dtype)
    tokens = make(n, D, dtype=dtype, seed=1), make(n, D, dtype=dtype, seed=2)
    weights = dense(F, D, dtype=dtype, seed=3), dense(F, D, dtype=dtype, seed=4)
    moments = [torch.zeros(F, D, dtype=acc) for _ in range(4)]
    shadow = torch.zeros(F, D, dtype=torch.bfloat16)
    hyper = torch.tensor(1e-3), 0.9, 0.999, 1e-8, torch.tensor(1), torch.tensor(0.5, dtype=acc)
    rest = *tokens, *weights, *moments, shadow, None, *hyper, True, True
    yield make(n, K, dtype=dtype), *slots(n), None, *rest
    indices, _, *by_feature = ragged_slots(n)
    yield make(n * K, dtype=dtype), indices, *by_feature, *rest


SAMPLES = {
    "by_feature": by_feature_samples,
    "row_topk": row_topk_samples,
    "encode": encode_samples,
    "batch_topk_encode": batch_topk_encode_samples,
    "groupmax_encode": groupmax_encode_samples,
    "threshold_encode": threshold_encode_samples,
    "decode": decode_samples,
    "decode_error": decode_error_samples,
    "decode_levels": decode_levels_samples,
    "gather_dot": gather_dot_samples,
    "feature_sum": feature_sum_samples,
    "sae_gradients_": sae_gradients_samples,
    "sae_update_": sae_update_samples,
    "weighted_row_sum": weighted_row_sum_samples,
    "adam_rows_": adam_rows_samples,
    "grad_sumsq": grad_sumsq_samples,
    **pair_samples.SAMPLES,
    **attention_samples.SAMPLES,
}


# raw operators guard memory: each of these would read or write outside a tensor
SHORT = torch.zeros(2, dtype=torch.int64)
X, V, W = torch.zeros(5, D), torch.zeros(5, K), torch.zeros(F, D)
HOSTILE = {
    "decode: fewer values than indices": ("decode", (V[:2], slots(5)[0], None, W, None)),
    "decode: fewer indices than values": ("decode", (V, slots(2)[0], None, W, None)),
    "decode: short bias": ("decode", (V, slots(5)[0], None, W, torch.zeros(D - 1))),
    "decode: bias of another dtype": ("decode", (V, slots(5)[0], None, W, torch.zeros(D).half())),
    "decode: int32 indices": ("decode", (V, slots(5)[0].int(), None, W, None)),
    "decode_error: short x": ("decode_error", (V, slots(5)[0], None, W, None, X[:2])),
    "decode_error: narrow x": ("decode_error", (V, slots(5)[0], None, W, None, X[:, :2])),
    "decode_error: x of another dtype": ("decode_error", (V, slots(5)[0], None, W, None, X.half())),
    "decode_levels: short x": (
        "decode_levels",
        (V, slots(5)[0], None, W, None, X[:2], LEVELS, torch.ones(3, 3)),
    ),
    "decode_levels: short levels": (
        "decode_levels",
        (V, slots(5)[0], None, W, None, X, LEVELS[:2], torch.ones(3, 3)),
    ),
    "decode_levels: a level too many": (
        "decode_levels",
        (V, slots(5)[0], None, W, None, X, LEVELS, torch.ones(2, 2)),
    ),
    "decode_levels: no levels": (
        "decode_levels",
        (V, slots(5)[0], None, W, None, X, LEVELS, torch.ones(0, 0)),
    ),
    "decode_levels: a mix that is not square": (
        "decode_levels",
        (V, slots(5)[0], None, W, None, X, LEVELS, torch.ones(3, 4)),
    ),
    "gather_dot: short rows": ("gather_dot", (X[:2], W, slots(5)[0], None, None)),
    "gather_dot: narrow rows": ("gather_dot", (X[:, :2], W, slots(5)[0], None, None)),
    "gather_dot: levels of one matrix": ("gather_dot", (X, W, slots(5)[0], None, LEVELS)),
    "gather_dot: a level too many": ("gather_dot", (X[None], W, slots(5)[0], None, LEVELS)),
    "feature_sum: short rows": ("feature_sum", (V, X[:2], *slots(5)[1:], None)),
    "feature_sum: short order": ("feature_sum", (V, X, slots(5)[1], SHORT, None)),
    "encode: narrow x": ("encode", (X[:, :2], W, None, None, None, K, True)),
    "encode: short b_enc": ("encode", (X, W, W[:3, 0], None, None, K, True)),
    "encode: short b_dec": ("encode", (X, W, None, X[0, :2], None, K, True)),
    "encode: short scale": ("encode", (X, W, None, None, W[:3, 0], K, True)),
    "encode: b_enc of another dtype": ("encode", (X, W, W[:, 0].half(), None, None, K, True)),
    "encode: w_enc of another dtype": ("encode", (X, W.half(), None, None, None, K, True)),
    "encode: k = 0": ("encode", (X, W, None, None, None, 0, True)),
    "encode: k > F": ("encode", (X, W, None, None, None, F + 1, True)),
    "batch_topk_encode: narrow x": (
        "batch_topk_encode",
        (X[:, :2], W, None, None, None, K, True),
    ),
    "batch_topk_encode: short scale": (
        "batch_topk_encode",
        (X, W, None, None, W[:3, 0], K, True),
    ),
    "batch_topk_encode: total < 0": ("batch_topk_encode", (X, W, None, None, None, -1, True)),
    "batch_topk_encode: total > N F": (
        "batch_topk_encode",
        (X, W, None, None, None, 5 * F + 1, True),
    ),
    "groupmax_encode: long b_enc": (
        "groupmax_encode",
        (X, W, torch.zeros(F + 1), None, None, 4, True),
    ),
    "groupmax_encode: k = 0": ("groupmax_encode", (X, W, None, None, None, 0, True)),
    "groupmax_encode: k > F": ("groupmax_encode", (X, W, None, None, None, 2 * F, True)),
    "groupmax_encode: uneven groups": ("groupmax_encode", (X, W, None, None, None, K, True)),
    "threshold_encode: narrow x": ("threshold_encode", (X[:, :2], W, None, None, W[:, 0])),
    "threshold_encode: short floor": ("threshold_encode", (X, W, None, None, W[:3, 0])),
    "threshold_encode: floor of another dtype": (
        "threshold_encode",
        (X, W, None, None, W[:, 0].double()),
    ),
    "threshold_encode: floor of the dtype of 16-bit x": (
        "threshold_encode",
        (X.half(), W.half(), None, None, W[:, 0].half()),
    ),
    "threshold_encode: short b_dec": ("threshold_encode", (X, W, None, X[0, :2], W[:, 0])),
    "decode: values and ragged indices": (
        "decode",
        (V, ragged_slots(5)[0], ragged_slots(5)[1], W, None),
    ),
    "decode: padded, with row_offsets": ("decode", (V, slots(5)[0], SHORT, W, None)),
    "decode: ragged, without row_offsets": (
        "decode",
        (V.reshape(-1), ragged_slots(5)[0], None, W, None),
    ),
    "decode: slots without tokens": (
        "decode",
        (V.reshape(-1), ragged_slots(5)[0], SHORT[:1], W, None),
    ),
    "decode_error: x of fewer tokens than row_offsets": (
        "decode_error",
        (V.reshape(-1), *ragged_slots(5)[:2], W, None, X[:2]),
    ),
    "gather_dot: rows of fewer tokens than row_offsets": (
        "gather_dot",
        (X[:2], W, *ragged_slots(5)[:2], None),
    ),
    "feature_sum: a token outside": (
        "feature_sum",
        (V.reshape(-1), X[:2], *ragged_slots(5)[2:]),
    ),
    "sae_gradients_: ragged, without tokens": (
        "sae_gradients_",
        (V.reshape(-1), ragged_slots(5)[0], *ragged_slots(5)[2:4], None, X, X, W, None, None)
        + (W.clone(), W.clone(), torch.zeros(F), False),
    ),
    "weighted_row_sum: short weights": ("weighted_row_sum", (W[:3, 0], W)),
    "row_topk: k > F": ("row_topk", (X, D + 1, True)),
    "row_topk: k < 0": ("row_topk", (X, -1, True)),
    "row_topk: integers": ("row_topk", (X.int(), 2, True)),
    "by_feature: no features": ("by_feature", (slots(5)[0].reshape(-1), -1)),
    "by_feature: int32": ("by_feature", (slots(5)[0].reshape(-1).int(), F)),
    "sae_gradients_: short output": (
        "sae_gradients_",
        (V, *slots(5), None, X, X, W, None, None, W[:3].clone(), W.clone(), torch.zeros(F), False),
    ),
    "sae_gradients_: output of another dtype": (
        "sae_gradients_",
        (V, *slots(5), None, X, X, W, None, None, W.half(), W.clone(), torch.zeros(F), False),
    ),
    **pair_samples.HOSTILE,
    **attention_samples.HOSTILE,
}


def mangled(arguments):
    """(what was done, arguments): one argument at a time replaced by what it must not be."""
    for place, value in enumerate(arguments):

        def instead(other, what, place=place):
            return f"argument {place}: {what}", (*arguments[:place], other, *arguments[place + 1 :])

        if isinstance(value, torch.Tensor):
            for dtype in (torch.int64, torch.int32, torch.bool, torch.complex64, torch.float8_e5m2):
                if dtype != value.dtype:
                    yield instead(value.to(dtype), f"{dtype}")
            for dtype in (torch.float16, torch.float32, torch.float64):
                if dtype != value.dtype:
                    yield instead(value.to(dtype), f"{dtype}")
            yield instead(value[None], "one dimension more")
            yield instead(value.new_zeros((0,) * value.dim()), "no entries")
            for axis in range(value.dim()):
                size = value.shape[axis]
                if size:
                    yield instead(value.select(axis, 0), f"no axis {axis}")
                    yield instead(value.narrow(axis, 0, size - 1).clone(), f"short axis {axis}")
                yield instead(torch.cat([value, value], axis), f"long axis {axis}")
            if value.dtype == torch.int64 and value.numel():
                for number in (-1, -(2**62), 2**20, 2**62):
                    other = value.clone()
                    other.view(-1)[-1] = number
                    yield instead(other, f"{number} among the entries")
                yield instead(value.flip(-1) if value.dim() else value - 9, "reversed")
        elif isinstance(value, int) and not isinstance(value, bool):
            for number in (-(2**62), -1, 0, 2**20):
                yield instead(number, f"{number}")


def copies(arguments):
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
