# SPDX-License-Identifier: Apache-2.0
"""The operators by hand: in your own module, with gradients, beside what they replace.

Each takes and gives tensors. None makes the tokens x features matrix that dense code is made of.
"""

import torch
from options import options

import mikernels as mk

o = options(__doc__, tokens=1_024, features=16_384)

# %% Weights of any library: rows are features; `[d, F]` is passed as `w.T`, without a copy
random = torch.Generator().manual_seed(0)
d, k = 512, 32
x = torch.randn(o.tokens, d, generator=random)
w_enc = (torch.randn(o.features, d, generator=random) / d**0.5).requires_grad_()
w_dec = (torch.randn(o.features, d, generator=random) / d**0.5).requires_grad_()
b_enc, b_dec = torch.zeros(o.features), torch.zeros(d)

# %% Encode: the k best features of every token, exactly
codes = mk.topk_encode(x, w_enc, b_enc, k=k, b_dec=b_dec)
dense = torch.relu((x - b_dec) @ w_enc.T + b_enc)
best = dense.topk(k)
same = torch.equal(codes.indices, best.indices.sort(-1).values)
print(f"codes {list(codes.values.shape)}, dense {list(dense.shape)}: same features {same}")

# %% Decode and train: gradients reach the weights through the k slots of each token alone
loss = (mk.sparse_decode(codes, w_dec, b_dec) - x).square().sum()
found = torch.autograd.grad(loss, [w_enc, w_dec])
kept = torch.zeros_like(dense).scatter(1, best.indices, best.values)
expected = torch.autograd.grad((kept @ w_dec + b_dec - x).square().sum(), [w_enc, w_dec])
for name, ours, theirs in zip(("w_enc", "w_dec"), found, expected, strict=True):
    print(f"gradient of {name} off by {(ours - theirs).norm() / theirs.norm():.0e} of its norm")

# %% Which features are most alike: the strongest of F (F - 1) / 2 pairs, without the matrix
directions = torch.nn.functional.normalize(w_dec.detach(), dim=-1)
pairs = mk.pairwise_topk(directions, k=3, by="value", upper=True)
for value, one, other in zip(pairs.values, pairs.rows, pairs.cols, strict=True):
    print(f"features {one} and {other}: cosine {value:+.3f}")

# %% Every writer against every reader, as edge attribution needs it: [B, P, W, d] x [B, P, R, d]
moved, grad = (torch.randn(4, 16, n, d, generator=random) for n in (79, 37))
scores = mk.edge_scores(moved, grad)
naive = torch.einsum("bpwd,bprd->wr", moved, grad)
off = (scores - naive).norm() / naive.norm()
print(f"edges {list(scores.shape)}, off by {off:.0e} of their norm")
