# SPDX-License-Identifier: Apache-2.0
"""SAEs judged where the features are known: activations made by SAELens' SynthSAEBench tools.

    x = sum_j a_j v_j + bias,  a sparse, v_j unit directions           (arXiv 2602.14687)

The features fire with Zipf's frequencies, weakly correlated; some are children that fire only with
their parent and exclude their siblings. A latent is scored as a detector of the feature that its
decoder row is most similar to. The data and every figure but `fvu` are sae-lens' own: a judge that
we did not write. It needs `sae-lens`, `scipy` and `plotly`.

Seeds: `torch.randn` from one seed gives the features of a world and the decoder of a new SAE alike,
so an SAE of the world's seed (0, and 42 of "16k") would know them before any training.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch

from mikernels.nn import SAE


class Size(NamedTuple):
    """Settings of a world.

    "16k" is SynthSAEBench-16k's published configuration. "small" is scaled to a CPU: features,
    width, roots and depth, rank, frequencies (8.8 active features on average, in place of 34),
    and no steps that make the features more orthogonal; the rest is as published.
    """

    features: int
    d: int
    frequencies: tuple[float, float]
    roots: int
    depth: int
    rank: int
    orthogonal_steps: int
    seed: int


SIZES = {
    "small": Size(1024, 96, (0.33, 1e-3), 16, 2, 8, 0, 0),
    "16k": Size(16_384, 768, (0.4, 5e-4), 128, 3, 25, 100, 42),
}


class DenseView:
    """An SAE of ours as SAELens' evaluations call one: dense activations in and out.

    Attributes:
        W_dec: `[F, d]`.
    """

    def __init__(self, sae: SAE):
        self.sae = sae

    @property
    def W_dec(self) -> torch.Tensor:
        return self.sae.w_dec.detach()

    def eval(self) -> DenseView:
        self.sae.eval()
        return self

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """`[n, F]`."""
        return self.sae.encode(x).to_dense()

    def decode(self, acts: torch.Tensor) -> torch.Tensor:
        """`[n, d]`."""
        return acts @ self.sae.w_dec + self.sae.b_dec


def world(size: str = "small", seed: int | None = None) -> Any:
    """A `sae_lens.synthetic.SyntheticModel`; `world(...).sample(n)` gives activations `[n, d]`.

    Args:
        size: "small" or "16k" (1e14 operations to build: save it with its own `save`).
        seed: of the features; None is the size's own.

    Raises:
        ValueError: for another size. ImportError: sae-lens, scipy or plotly is missing.
    """
    if size not in SIZES:
        raise ValueError(f"world: size must be one of {list(SIZES)}, got {size!r}")
    s, tools = SIZES[size], _tools("world")
    orthogonal = tools.OrthogonalizationConfig(num_steps=s.orthogonal_steps, lr=3e-4)
    config = tools.SyntheticModelConfig(
        num_features=s.features,
        hidden_dim=s.d,
        firing_probability=tools.ZipfianFiringProbabilityConfig(
            exponent=0.5, max_prob=s.frequencies[0], min_prob=s.frequencies[1]
        ),
        hierarchy=tools.HierarchyConfig(
            total_root_nodes=s.roots,
            branching_factor=4,
            max_depth=s.depth,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=orthogonal if s.orthogonal_steps else None,
        correlation=tools.LowRankCorrelationConfig(rank=s.rank, correlation_scale=0.1),
        mean_firing_magnitudes=tools.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=tools.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=s.seed if seed is None else seed,
    )
    return tools.SyntheticModel(config)


@torch.no_grad()
def judge(
    sae: Any, world: Any, samples: int = 32_768, seed: int = 0, batch_size: int = 2048
) -> dict[str, float]:
    """Figures of an SAE on fresh activations of a world.

    Args:
        sae: an SAE of ours, or any object with SAELens' `eval`, `encode`, `decode` and `W_dec`.
            It must have been initialised from another seed than the world.
        world: of `world()`.
        samples: activations that are judged on. seed: of them; the global generator is left alone.
        batch_size: rows at a time.

    Returns:
        f1, precision, recall: means over latents of the detection of their nearest feature. mcc:
        mean |cos| of the best one-to-one match of decoder rows and features. uniqueness: different
        nearest features a latent. dead: share of latents that never fire on the samples. l0:
        active latents, true_l0: active features a sample. fvu: variance unexplained. shrinkage:
        norm of the reconstruction over that of the sample.

    Raises:
        ValueError: samples or batch_size below 1. ImportError: as `world`.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"judge: {name} must be at least 1, got {value}")
    tools = _tools("judge")
    view = DenseView(sae) if isinstance(sae, SAE) else sae
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = tools.eval_sae_on_synthetic_data(
            view, world.feature_dict, world.activation_generator, samples, batch_size
        )
    kind = found.classification
    return {
        "f1": kind.f1_score,
        "precision": kind.precision,
        "recall": kind.recall,
        "mcc": found.mcc,
        "uniqueness": found.uniqueness,
        "dead": found.dead_latents / view.W_dec.shape[0],
        "l0": found.sae_l0,
        "true_l0": found.true_l0,
        "fvu": 1 - found.explained_variance,
        "shrinkage": found.shrinkage,
    }


def _tools(who: str) -> Any:
    try:
        return importlib.import_module("sae_lens.synthetic")
    except ImportError as error:
        raise ImportError(
            f"{who}: sae-lens must be installed with scipy and plotly, got {error}; "
            f"`make bench-peers`, or `pip install sae-lens scipy`"
        ) from error
