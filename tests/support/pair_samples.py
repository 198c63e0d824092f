# SPDX-License-Identifier: Apache-2.0
"""Arguments for the registered operators on pairs: good ones in many layouts, and hostile ones."""

from __future__ import annotations

import torch
from oracle import randint

import mikernels  # noqa: F401  # registers the operators
from mikernels._dispatch import accumulate_dtype

# positions, rows of the other side, width, replicates, rank of a head
P, M, D, Q, E = 3, 7, 6, 2, 4


def ranks(n, limit, seed=0):
    return torch.randint(0, limit + 1, (n,), generator=torch.Generator().manual_seed(seed))


def pair_products_samples(make, n, dtype):
    acc = accumulate_dtype(dtype)
    a, b = make(2, P, n, D, dtype=dtype), make(2, P, M, D, dtype=dtype, seed=1)
    scale, weights = make(D, dtype=dtype, seed=2), make(Q, 2, dtype=acc, seed=3)
    yield a, b, None, None, None, False, torch.zeros(1, n, M, dtype=acc)
    yield a, b, scale, weights, ranks(M, n + 2), False, torch.zeros(Q, n, M, dtype=acc)
    yield a, a, scale, None, None, True, torch.zeros(n, n, 1, dtype=acc).movedim(2, 0)


def edge_mix_samples(make, n, dtype):
    delta, mask = make(2, P, n, D, dtype=dtype), make(n, M, dtype=dtype, seed=1)
    yield None, delta, mask
    for readers in (1, M):
        yield make(2, P, readers, D, dtype=dtype, seed=2), delta, mask


def edge_heads_samples(make, n, dtype):
    acc = accumulate_dtype(dtype)
    dz, w_o = make(2, P, n, E, dtype=dtype), make(n, E, D, dtype=dtype, seed=1)
    grad, weights = make(2, P, M, D, dtype=dtype, seed=2), make(Q, 2, dtype=acc, seed=3)
    yield dz, w_o, grad, None, None, torch.zeros(1, n, M, dtype=acc)
    yield dz, w_o, grad, weights, ranks(M, n + 2), torch.zeros(Q, n, M, dtype=acc)


def positional_dot_samples(make, n, dtype):
    acc = accumulate_dtype(dtype)
    operands = make(2, P, D, dtype=dtype), make(n, D, dtype=dtype, seed=1), ranks(n, P - 1)
    yield *operands, None, torch.zeros(n, 2, dtype=acc)
    yield *operands, make(n, dtype=dtype, seed=2), torch.zeros(2, n, dtype=acc).T


def pairwise_topk_samples(make, n, dtype):
    a, b = make(2, P, n, D, dtype=dtype), make(2, P, M, D, dtype=dtype, seed=1)
    scales = make(n, dtype=dtype, seed=2), make(M, dtype=dtype, seed=3)
    rows = torch.arange(n)
    least = float("-inf")
    yield a, b, None, None, None, None, 5, "abs", least, False
    yield a, b, *scales, ranks(n, 3), ranks(M, 4, 1), 2**63 - 1, "value", -1.5, False
    yield a, a, None, None, rows, rows, 9, "abs", 0.5, True
    yield a, a, None, None, None, None, 9, "value", least, True


def gram_products_samples(make, n, dtype):
    acc = accumulate_dtype(dtype)
    side = make(n, P, D, dtype=dtype), make(n, P, E, dtype=dtype, seed=1)
    other = make(M, 2, D, dtype=dtype, seed=2), make(M, 2, E, dtype=dtype, seed=3)
    yield *side, *other, False, torch.zeros(n, M, dtype=acc)
    yield *side, *side, True, torch.zeros(n, n, dtype=acc)


def block_norms_samples(make, n, dtype):
    yield make(n, E, D, dtype=dtype), make(M, D, P, dtype=dtype, seed=1)


def mass_threshold_samples(make, n, dtype):
    yield make(n + 1, 3, dtype=dtype), 0.7, True
    yield make(n + 1, dtype=dtype).relu(), 1.0, False


SAMPLES = {
    "pair_products_": pair_products_samples,
    "edge_mix": edge_mix_samples,
    "edge_heads_": edge_heads_samples,
    "positional_dot_": positional_dot_samples,
    "pairwise_topk": pairwise_topk_samples,
    "gram_products_": gram_products_samples,
    "block_norms": block_norms_samples,
    "mass_threshold": mass_threshold_samples,
}


def variants(op, good, **changes):
    """Name -> (op, the good arguments with some replaced: place -> value)."""
    return {
        f"{op}: {what.replace('_', ' ')}": (
            op,
            tuple(change.get(place, value) for place, value in enumerate(good)),
        )
        for what, change in changes.items()
    }


N = 5
A, B, SCALE, WEIGHTS = randint(2, P, N, D), randint(2, P, M, D), randint(D), randint(Q, 2)
OUT, PREFIX = torch.zeros(Q, N, M), torch.full((M,), 3)
DZ, W_O, MASK = randint(2, P, N, E), randint(N, E, D), randint(N, M)
GRADS, VECTORS, POSITIONS = randint(2, P, D), randint(N, D), torch.tensor([0, 2, 1, 2, 0])
ACTS, GRADS_OUT = randint(N, P, D), randint(N, P, E)
ACTS_2, GRADS_OUT_2 = randint(M, P, D), randint(M, P, E)


def moved(position):
    return torch.tensor([0, 2, position, 2, 0])


HOSTILE = {
    **variants(
        "pair_products_",
        (A, B, SCALE, WEIGHTS, PREFIX, False, OUT),
        fewer_rows_of_out={6: OUT[:, :2].clone()},
        fewer_columns_of_out={6: OUT[:, :, :2].clone()},
        out_of_two_dimensions={6: OUT[0].clone()},
        out_of_another_dtype={6: OUT.half()},
        wider_out={6: OUT.double()},
        narrow_b={1: B[..., :2]},
        wide_b={1: randint(2, P, M, D + 40)},
        fewer_examples_of_b={1: B[:1]},
        fewer_positions_of_b={1: B[:, :1]},
        b_of_three_dimensions={1: B[0]},
        b_of_another_dtype={1: B.half()},
        integers={0: A.int(), 1: B.int(), 2: None},
        short_scale={2: SCALE[:2]},
        scale_of_another_dtype={2: SCALE.half()},
        weights_of_fewer_examples={3: WEIGHTS[:, :1]},
        weights_of_fewer_replicates={3: WEIGHTS[:1]},
        weights_of_one_dimension={3: WEIGHTS[0]},
        weights_of_another_dtype={3: WEIGHTS.half()},
        short_prefix={4: PREFIX[:2]},
        int32_prefix={4: PREFIX.int()},
        symmetric_of_two_sizes={4: None, 5: True},
    ),
    **variants(
        "edge_mix",
        (randint(2, P, M, D), A, MASK),
        mask_of_fewer_writers={2: MASK[:2]},
        mask_of_one_dimension={2: MASK[:, 0]},
        mask_of_another_dtype={2: MASK.half()},
        narrow_base={0: randint(2, P, M, 2)},
        base_of_fewer_readers={0: randint(2, P, 2, D)},
        base_of_fewer_positions={0: randint(2, 1, M, D)},
        base_of_fewer_examples={0: randint(1, P, M, D)},
        base_of_three_dimensions={0: randint(2, P, D)},
        base_of_another_dtype={0: randint(2, P, M, D).half()},
        integers={0: None, 1: A.int(), 2: MASK.int()},
    ),
    **variants(
        "edge_heads_",
        (DZ, W_O, B, WEIGHTS, PREFIX, OUT),
        fewer_heads_of_w_o={1: W_O[:2]},
        low_rank_w_o={1: W_O[:, :2]},
        narrow_w_o={1: W_O[..., :2]},
        w_o_of_another_dtype={1: W_O.half()},
        narrow_grad={2: B[..., :2]},
        fewer_positions_of_grad={2: B[:, :1]},
        fewer_examples_of_grad={2: B[:1]},
        grad_of_another_dtype={2: B.half()},
        integers={0: DZ.int(), 1: W_O.int(), 2: B.int()},
        weights_of_fewer_examples={3: WEIGHTS[:, :1]},
        weights_of_fewer_replicates={3: WEIGHTS[:1]},
        weights_of_another_dtype={3: WEIGHTS.half()},
        short_prefix={4: PREFIX[:2]},
        int32_prefix={4: PREFIX.int()},
        fewer_rows_of_out={5: OUT[:, :2].clone()},
        fewer_columns_of_out={5: OUT[:, :, :2].clone()},
        out_of_another_dtype={5: OUT.half()},
    ),
    **variants(
        "positional_dot_",
        (GRADS, VECTORS, POSITIONS, VECTORS[:, 0], torch.zeros(N, 2)),
        position_at_the_end={2: moved(P)},
        negative_position={2: moved(-1)},
        position_far_out={2: moved(2**40)},
        short_positions={2: POSITIONS[:2]},
        int32_positions={2: POSITIONS.int()},
        narrow_vectors={1: VECTORS[:, :2]},
        fewer_vectors={1: VECTORS[:2]},
        vectors_of_another_dtype={1: VECTORS.half()},
        grads_of_two_dimensions={0: GRADS[0]},
        integers={0: GRADS.int(), 1: VECTORS.int(), 3: None},
        short_scale={3: VECTORS[:2, 0]},
        scale_of_another_dtype={3: VECTORS[:, 0].half()},
        fewer_rows_of_out={4: torch.zeros(2, 2)},
        fewer_columns_of_out={4: torch.zeros(N, 1)},
        out_of_another_dtype={4: torch.zeros(N, 2).half()},
    ),
    **variants(
        "pairwise_topk",
        (A, B, A[0, 0, :, 0], B[0, 0, :, 0], ranks(N, 3), ranks(M, 3), 4, "abs", 0.0, False),
        narrow_b={1: B[..., :2]},
        fewer_examples_of_b={1: B[:1]},
        fewer_positions_of_b={1: B[:, :1]},
        b_of_another_dtype={1: B.half()},
        integers={0: A.int(), 1: B.int(), 2: None, 3: None},
        short_row_scale={2: A[0, 0, :2, 0]},
        short_col_scale={3: B[0, 0, :2, 0]},
        row_scale_of_another_dtype={2: A[0, 0, :, 0].half()},
        col_scale_of_another_dtype={3: B[0, 0, :, 0].half()},
        short_row_rank={4: ranks(2, 3)},
        short_col_rank={5: ranks(2, 3)},
        int32_row_rank={4: ranks(N, 3).int()},
        int32_col_rank={5: ranks(M, 3).int()},
        one_rank={4: None},
        no_pairs_to_keep={6: 0},
        negative_k={6: -1},
        symmetric_of_two_sizes={2: None, 3: None, 4: None, 5: None, 9: True},
    ),
    **variants(
        "gram_products_",
        (ACTS, GRADS_OUT, ACTS_2, GRADS_OUT_2, False, torch.zeros(N, M)),
        fewer_samples_of_grads={1: GRADS_OUT[:2]},
        fewer_positions_of_grads={1: GRADS_OUT[:, :1]},
        grads_of_another_dtype={1: GRADS_OUT.half()},
        narrow_acts2={2: ACTS_2[..., :2]},
        fewer_samples_of_acts2={2: ACTS_2[:2]},
        fewer_positions_of_acts2={2: ACTS_2[:, :1]},
        acts2_of_another_dtype={2: ACTS_2.half()},
        narrow_grads2={3: GRADS_OUT_2[..., :2]},
        fewer_samples_of_grads2={3: GRADS_OUT_2[:2]},
        acts_of_two_dimensions={0: ACTS[:, 0]},
        integers={0: ACTS.int(), 1: GRADS_OUT.int(), 2: ACTS_2.int(), 3: GRADS_OUT_2.int()},
        symmetric_of_two_sizes={4: True},
        fewer_rows_of_out={5: torch.zeros(2, M)},
        fewer_columns_of_out={5: torch.zeros(N, 2)},
        out_of_another_dtype={5: torch.zeros(N, M).half()},
    ),
    **variants(
        "block_norms",
        (ACTS, randint(M, D, E)),
        narrow_b={1: randint(M, 2, E)},
        b_of_two_dimensions={1: randint(M, D)},
        b_of_another_dtype={1: randint(M, D, E).half()},
        integers={0: ACTS.int(), 1: randint(M, D, E).int()},
    ),
    **variants(
        "mass_threshold",
        (VECTORS, 0.5, True),
        nothing={0: VECTORS[:0]},
        integers={0: VECTORS.int()},
    ),
}
