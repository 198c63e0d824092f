# SPDX-License-Identifier: Apache-2.0
"""torch.set_default_dtype is the user's: results keep their bits and dtypes under any."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import pytest
import torch
from one_level import one_impl
from op_samples import LAYOUTS, SAMPLES
from oracle import identical, num_threads, randn, random_indices

import mikernels as mk
from mikernels._dispatch import OPS
from mikernels.activations import TensorSource
from mikernels.integrations.saelens import export_sae
from mikernels.integrations.saelens import load_sae as load_saelens
from mikernels.nn import TopKSAE
from mikernels.optim import RowAdam
from mikernels.training import TrainConfig, Trainer, load_sae

OTHERS = [torch.bfloat16, torch.float64]


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


def tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, mk.SparseCodes | mk.Interactions):
        names = [f.name for f in fields(value)] if is_dataclass(value) else list(value.__slots__)
        return [t for name in names for t in tensors(getattr(value, name))]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors(item)]
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


def assert_same(a: object, b: object) -> None:
    found, expected = tensors(a), tensors(b)
    assert expected and len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype and identical(x, y)


B, P, W, R, D, F, H, DH = 2, 5, 4, 3, 6, 20, 2, 3
X, ROWS, COLS = randn(9, D), randn(F, D, seed=1), randn(7, D, seed=2)
DELTA, GRAD = randn(B, P, W, D, seed=3), randn(B, P, R, D, seed=4)
MASK, WEIGHTS = randn(W, R, seed=5), randn(B, seed=6)
DZ, W_O = randn(B, P, H, DH, seed=7), randn(H, DH, D, seed=8)
SAMPLES_A, SAMPLES_G = randn(4, P, D, seed=9), randn(4, P, W, seed=10)
INDICES = random_indices(9, 3, F)
CODES = mk.SparseCodes(randn(9, 3, seed=11).abs(), INDICES, F)
PLACES = torch.arange(F) % 5
HEADS = randn(2, 4, 5, 3, seed=12)
PUBLIC = {
    "attention_gradients": lambda: mk.attention_gradients(
        HEADS, HEADS, HEADS[:, :2], HEADS[:, :2], HEADS, causal=True, temperature=2.0
    ),
    "block_norms": lambda: mk.block_norms(randn(3, D, DH), randn(2, D, DH, seed=1).mT),
    "by_feature": lambda: mk.by_feature(INDICES.reshape(-1), F),
    "edge_mix": lambda: mk.edge_mix(randn(B, P, R, D), DELTA, MASK),
    "edge_scores": lambda: mk.edge_scores(DELTA, GRAD, prefix=2),
    "edge_scores_weighted": lambda: mk.edge_scores(DELTA, GRAD, weights=WEIGHTS[None]),
    "edge_scores_heads": lambda: mk.edge_scores_heads(DZ, W_O, GRAD, prefix=1),
    "edge_topk": lambda: mk.edge_topk(DELTA, GRAD, k=5, prefix=2),
    "feature_edges": lambda: mk.feature_edges(
        ROWS, COLS, k=6, row_scale=ROWS[:, 0], row_position=PLACES, col_position=PLACES[:7]
    ),
    "grad_gram": lambda: mk.grad_gram(SAMPLES_A, SAMPLES_G, normalize=True),
    "grad_gram_k": lambda: mk.grad_gram(SAMPLES_A, SAMPLES_G, k=3),
    "mass_threshold": lambda: mk.mass_threshold(X, 0.7, abs=True),
    "pairwise_products": lambda: mk.pairwise_products(X, COLS, weight=X[0]),
    "pairwise_topk": lambda: mk.pairwise_topk(X, COLS, k=5),
    "pairwise_topk_upper": lambda: mk.pairwise_topk(X, k=5, upper=True, by="value"),
    "positional_dot": lambda: mk.positional_dot(randn(W, P, D), X, torch.arange(9) % P),
    "qk_interactions": lambda: mk.qk_interactions(
        ROWS, COLS, randn(H, D, DH), randn(H, D, DH, seed=1), k=4
    ),
    "row_topk": lambda: mk.row_topk(X, 3),
    "second_moment": lambda: mk.second_moment(X, mask=X[:, 0] > 0),
    "sparse_decode": lambda: mk.sparse_decode(CODES, ROWS, X[0], prefixes=[4, F]),
    "topk_encode": lambda: mk.topk_encode(X, ROWS, ROWS[:, 0], k=3, b_dec=X[0]),
    "batch_topk_encode": lambda: mk.batch_topk_encode(X, ROWS, ROWS[:, 0], k=2.5),
    "groupmax_encode": lambda: mk.groupmax_encode(X, ROWS, ROWS[:, 0], k=4, b_dec=X[0]),
    "threshold_encode": lambda: mk.threshold_encode(X, ROWS, ROWS[:, 0], threshold=0.5),
    "threshold_encode of a bandwidth": lambda: mk.threshold_encode(
        X, ROWS, threshold=ROWS[:, 1].abs(), bandwidth=0.3
    ),
    "jump": lambda: mk.jump(X, 0.3, bandwidth=0.1),
    "step_above": lambda: mk.step_above(X, X[0], bandwidth=0.1),
    "codes": lambda: (CODES.l0(), CODES.fired(), CODES.to_dense()),
}


def test_every_public_operator_is_called() -> None:
    names = {name for name in mk.__all__ if getattr(mk, name).__class__.__name__ == "function"}
    # these take no tensor
    names -= {"accelerate", "log"}
    assert names - {"cpu_level", "force_level", "supported_levels"} <= set(PUBLIC)


@one_impl
@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize("name", PUBLIC)
def test_public_operators_give_the_same_bits(name, dtype, impl, monkeypatch) -> None:
    monkeypatch.setenv("MIKERNELS_IMPL", impl)
    expected = PUBLIC[name]()
    with default(dtype):
        found = PUBLIC[name]()
    assert_same(found, expected)


@one_impl
@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_registered_operators_give_the_same_bits(name, dtype, impl) -> None:
    for kind in (torch.float32, torch.bfloat16):
        runs = []
        for chosen in (torch.float32, dtype):
            samples = list(SAMPLES[name](LAYOUTS["dense"], 5, kind))
            with default(chosen):
                # an operator that writes into its arguments is seen there
                runs.append([(OPS[name](*given, impl=impl), given) for given in samples])
        assert_same(runs[1], runs[0])


def run(dtype: torch.dtype, folder, weights=None, **settings) -> list[object]:
    data, start = randn(128, D, seed=1), torch.Generator().manual_seed(0)
    tokens = 160 * settings.get("accumulation", 1)
    with default(dtype):
        sae = TopKSAE(D, F, 3, k_aux=4, dead_after=20, generator=start)
        config = TrainConfig(tokens, 16, lr=1e-2, log_every=3, **{"dtype": weights, **settings})
        trainer = Trainer(sae, TensorSource(data, 16), config, out_dir=folder, quiet=True)
        rows = trainer.run().rows
        loaded = load_sae(folder / "checkpoint-10")
        exported = load_saelens(export_sae(sae, folder / "saelens"))
        out = sae(data[:9])
        state = trainer.optimizer.state_dict()["state"]
        for entries in state.values():
            del entries["step"]  # torch's Adam keeps it in a dtype of its own choice
    timings = ("step_ms", "tokens_per_second", "waiting_seconds")
    numbers = [[v for name, v in row.items() if name not in timings] for row in rows]
    models = [m.state_dict() for m in (sae, loaded, exported)]
    return [numbers, [models, list(out), state]]


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize(
    "settings",
    [{"step": "fused"}, {"step": "fused", "weights": "bfloat16"}, {"step": "autograd"}]
    + [{"step": "dense"}, {"step": "fused", "accumulation": 2, "clip_norm": None}]
    + [{"step": "fused", "clip_norm": None}],
    ids=["fused", "fused-bfloat16", "autograd", "dense", "accumulation", "update"],
)
def test_training_gives_the_same_bits(settings, dtype, tmp_path) -> None:
    with num_threads(1):
        runs = [run(folder=tmp_path / str(d), dtype=d, **settings) for d in (torch.float32, dtype)]
    assert runs[1][0] == runs[0][0]
    assert_same(runs[1][1], runs[0][1])


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_row_adam_clips_to_the_same_bits(dtype) -> None:
    results = []
    for chosen in (torch.float32, dtype):
        p = torch.nn.Parameter(randn(6, 5))
        with default(chosen):
            optimizer = RowAdam([p], clip_norm=0.5)
            for step in range(3):
                optimizer.apply_gradients({p: randn(6, 5, seed=step)})
        results.append([p.detach(), *optimizer.state[p].values()])
    assert_same(results[1], results[0])
