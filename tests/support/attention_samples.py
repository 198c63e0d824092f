# SPDX-License-Identifier: Apache-2.0
"""Arguments for the registered operators on attention: good ones, and hostile ones."""

from __future__ import annotations

import torch
from oracle import randint
from pair_samples import variants

B, H, G, S, E, F = 2, 4, 2, 7, 6, 5


def attention_gradients_samples(make, n, dtype):
    shapes = (B, H, n, F), (B, H, n, E), (B, G, S, E), (B, G, S, F), (B, H, n, F)
    tensors = [make(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
    keep = make(1, H, n, S, dtype=torch.float32, seed=5) > -1
    yield *tensors, None, None, 0.4, 0.0, True, 0, 1.0
    yield *tensors, keep, make(B, 1, n, S, dtype=dtype, seed=6), 0.4, 3.0, False, 5, 2.0
    yield *tensors, keep[:, :1, :1], None, 0.4, 0.0, True, 2**62, 0.5


SAMPLES = {"attention_gradients": attention_gradients_samples}

T = 3
GRAD, Q, K = randint(B, H, T, F), randint(B, H, T, E), randint(B, G, S, E)
V, KEEP = randint(B, G, S, F), randint(B, 1, T, S) > 0

HOSTILE = variants(
    "attention_gradients",
    (GRAD, Q, K, V, GRAD, KEEP, randint(1, H, 1, S), 0.5, 0.0, True, 2, 1.0),
    narrow_grad={0: GRAD[..., :2]},
    short_grad={0: GRAD[:, :, :2]},
    grad_of_fewer_heads={0: GRAD[:, :2]},
    grad_of_another_dtype={0: GRAD.half()},
    q_of_three_dimensions={1: Q[0]},
    q_of_heads_that_share_unevenly={0: GRAD[:, :3], 1: Q[:, :3], 4: GRAD[:, :3], 6: None},
    narrow_k={2: K[..., :2]},
    k_of_fewer_examples={2: K[:1]},
    k_of_another_dtype={2: K.half()},
    no_heads_of_keys={2: K[:, :0], 3: V[:, :0]},
    short_v={3: V[:, :, :2]},
    narrow_v={3: V[..., :2]},
    v_of_fewer_heads={3: V[:, :1]},
    short_out={4: GRAD[:, :, :2]},
    out_of_another_dtype={4: GRAD.double()},
    integers={0: GRAD.int(), 1: Q.int(), 2: K.int(), 3: V.int(), 4: GRAD.int()},
    short_keep={5: KEEP[..., :2]},
    keep_of_fewer_queries={5: KEEP[:, :, :2]},
    keep_of_two_dimensions={5: KEEP[0, 0]},
    keep_of_numbers={5: KEEP.float()},
    keep_of_bytes={5: KEEP.byte()},
    short_bias={6: randint(1, H, 1, 2)},
    bias_of_fewer_heads={6: randint(1, 2, 1, S)},
    bias_of_integers={6: randint(1, H, 1, S).int()},
    negative_window={10: -1},
)
