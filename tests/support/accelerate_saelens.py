# SPDX-License-Identifier: Apache-2.0
"""SAELens' SAEs and trainers at a small size, and what 20 steps of its own trainer leave.

The oracle is the library itself in fp64. What a release lacks is skipped, and named.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_cases import assert_as_accurate
from oracle import randn

D, F, N, D_OUT, STEPS = 16, 64, 32, 12, 20
# features that begin below what fires
DEAD = F // 4
# of the activations; with it no selection is nearer to a tie than ten roundings
SEED = 2000
# where no rounding decides what fires: a feature for every direction, and dead ones, of which
# AuxK takes all
D_APART = 32
F_APART = 2 * D_APART + 8

JUMP = dict(jumprelu_bandwidth=0.4, l0_coefficient=0.05, l0_warm_up_steps=5)
# name -> training class, settings, how far biases are lowered so that few features are active
TRAINING: dict[str, tuple[str, dict[str, Any], float]] = {
    "topk": ("TopKTrainingSAE", dict(k=4), 0.0),
    "topk, norms kept": ("TopKTrainingSAE", dict(k=4, rescale_acts_by_decoder_norm=False), 0.0),
    "topk, sparse": (
        "TopKTrainingSAE",
        dict(k=4, rescale_acts_by_decoder_norm=False, use_sparse_activations=True),
        0.0,
    ),
    "batchtopk": ("BatchTopKTrainingSAE", dict(k=3.7), 0.0),
    "matryoshka": (
        "MatryoshkaBatchTopKTrainingSAE",
        dict(k=3.3, matryoshka_widths=[10, 30, F]),
        0.0,
    ),
    "matryoshka, aux by level": (
        "MatryoshkaBatchTopKTrainingSAE",
        dict(k=3.3, matryoshka_widths=[10, 30, F], use_matryoshka_aux_loss=True),
        0.0,
    ),
    "jumprelu": ("JumpReLUTrainingSAE", dict(**JUMP), 0.0),
    "jumprelu, quadratic": (
        "JumpReLUTrainingSAE",
        dict(**JUMP, jumprelu_sparsity_loss_mode="quadratic", target_l0=4.0),
        0.0,
    ),
    "jumprelu, tanh": (
        "JumpReLUTrainingSAE",
        dict(**JUMP, jumprelu_sparsity_loss_mode="tanh", pre_act_loss_coefficient=0.01),
        0.0,
    ),
    "jumprelu, to input": (
        "JumpReLUTrainingSAE",
        dict(**JUMP, jumprelu_ste_to_input=True, pre_act_loss_coefficient=0.01),
        0.0,
    ),
    "gated": ("GatedTrainingSAE", dict(l1_coefficient=0.05, l1_warm_up_steps=5), 2.2),
    "standard": ("StandardTrainingSAE", dict(l1_coefficient=0.05, l1_warm_up_steps=5), 2.2),
}
# name -> inference class, settings, biases
INFERENCE: dict[str, tuple[str, dict[str, Any], float]] = {
    "topk": ("TopKSAE", dict(k=4), 0.0),
    "topk, by norms": ("TopKSAE", dict(k=4, rescale_acts_by_decoder_norm=True), 0.0),
    "jumprelu": ("JumpReLUSAE", {}, 0.0),
    "gated": ("GatedSAE", {}, 2.2),
    "standard": ("StandardSAE", {}, 2.2),
    "transcoder": ("Transcoder", {}, 2.2),
    "skip_transcoder": ("SkipTranscoder", {}, 2.2),
    "jumprelu_transcoder": ("JumpReLUTranscoder", {}, 0.0),
    "jumprelu_skip_transcoder": ("JumpReLUSkipTranscoder", {}, 0.0),
}


def library(name: str = "sae_lens") -> Any:
    return importlib.import_module(name)


def _class(name: str) -> Any:
    kind = getattr(library("sae_lens.saes"), name, None)
    if kind is None:
        pytest.skip(f"sae-lens {library().__version__} has no {name}")
    return kind


def config(kind: Any, **settings: Any) -> Any:
    """The configuration of a class; skips what this release's has no field for."""
    made = next(
        found
        for base in kind.__mro__
        if (found := getattr(library(base.__module__), f"{base.__name__}Config", None)) is not None
    )
    fields = {f.name for f in dataclasses.fields(made)}
    if lacking := settings.keys() - fields:
        pytest.skip(f"sae-lens {library().__version__}: {made.__name__} has no {min(lacking)}")
    if "Transcoder" in kind.__name__:
        settings = dict(apply_b_dec_to_input=False, d_out=D_OUT) | settings
    try:
        return made(**dict(d_in=D, d_sae=F) | settings)
    except ValueError as error:
        pytest.skip(f"sae-lens {library().__version__} refuses {settings}: {error}")


def make(
    name: str,
    *,
    inference: bool = False,
    dtype: torch.dtype = torch.float32,
    crowded: bool = False,
    apart: bool = False,
    **settings: Any,
) -> Any:
    """An SAE, with the same weights in every dtype; some of its features are dead.

    Args:
        crowded: half of all features are active at a token, few otherwise.
        apart: as `batches(apart=...)` is made for.
    """
    kind_name, own, low = (INFERENCE if inference else TRAINING)[name]
    kind = _class(kind_name)
    settings = own | settings
    if apart:
        settings |= dict(d_in=D_APART, d_sae=F_APART)
        if "matryoshka_widths" in settings:
            settings |= dict(matryoshka_widths=[10, 30, F_APART])
        # active pre-activations begin at 1.1
        low = low and 0.7
    if settings.get("jumprelu_sparsity_loss_mode") == "quadratic" and not hasattr(
        library(kind.__module__), "_validate_jumprelu_config"
    ):
        pytest.skip(f"sae-lens {library().__version__}: JumpReLU has no quadratic loss")
    threshold = 0.0 if crowded else 1.0 if apart else 2.3
    sae = kind(config(kind, **settings))
    with torch.no_grad():
        for at, (n, p) in enumerate(sorted(sae.named_parameters())):
            new = randn(*p.shape, seed=at + 1)
            if n in ("W_enc", "W_dec"):
                _set_matrix(p if n == "W_dec" else p.T, new if n == "W_dec" else new.T, apart)
            elif n == "W_skip":
                p.copy_(0.2 * new)
            elif n == "threshold":
                p.copy_(threshold + 0.005 * new.abs())
            elif n == "log_threshold":
                p.copy_((threshold + 0.005 * new.abs()).log())
            else:
                p.copy_(0.02 * new)
            if n in ("b_enc", "b_gate"):
                p.sub_(0.0 if crowded else low)
                p[-(8 if apart else DEAD) :].sub_(3.0)
    if dtype is not torch.float32:
        sae.to(dtype=dtype)
    if dtype is torch.float64:
        # the library keeps thresholds in fp32
        for p in sae.parameters():
            p.data = p.data.double()
    return sae


def _set_matrix(rows: torch.Tensor, new: torch.Tensor, apart: bool) -> None:
    """Vectors of features, of norms near 1; the encoder's near the decoder's."""
    f, d = rows.shape
    base = randn(f, d, seed=50)
    base /= base.norm(dim=1, keepdim=True)
    if apart:
        base[: 2 * d] = torch.cat([torch.eye(d), -torch.eye(d)])
    norms = torch.linspace(0.99, 1.01, f) if apart else torch.linspace(0.8, 1.2, f)
    rows.copy_((base + (0.0005 if apart else 0.1) * new) * norms[:, None])


def batches(
    steps: int = STEPS, *, dtype: torch.dtype = torch.float32, apart: str = ""
) -> list[torch.Tensor]:
    """Activations: the same numbers in every dtype.

    With `apart`, the name of a case, each token is of as many directions as features are to fire.
    """
    if apart:
        return [_apart(step, apart).to(dtype) for step in range(steps)]
    mix, offset = randn(D, D, seed=3) / 4, randn(D, seed=4) / 2
    return [
        (randn(N, D, seed=SEED + step) + randn(N, D, seed=99 + step) @ mix + offset).to(dtype)
        for step in range(steps)
    ]


def _apart(step: int, name: str) -> torch.Tensor:
    sizes = torch.tensor([1.1, 1.7, 2.2, 2.7]) + 0.02 * randn(N, 4, seed=10 + step).clamp(-1, 1)
    # what a batch has too many for its k goes from the last tokens, whose features fire elsewhere
    total = int(TRAINING[name][1].get("k", 4) * N)
    lacking = 4 * N - total
    sizes[N - lacking :, 3] = 0.0
    order = torch.randperm(D_APART, generator=torch.Generator().manual_seed(step))
    x = 0.015 * randn(N, D_APART, seed=200 + step).clamp(-2, 2)
    for token in range(N):
        # all directions one way, then all the other way, twice
        sign = 1 if token * 4 // D_APART % 2 == 0 else -1
        for slot in range(4):
            x[token, order[(4 * token + slot) % D_APART]] += sign * sizes[token, slot]
    return x


def trainer(sae: Any, data: Iterable[torch.Tensor] = (), **settings: Any) -> Any:
    """SAELens' own: warm-up, a cosine, decay, clipping, and features that die after two steps."""
    given = dict(
        total_training_samples=STEPS * N,
        train_batch_size_samples=N,
        lr=3e-3,
        lr_end=1e-3,
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=4,
        lr_decay_steps=4,
        dead_feature_window=1,
        feature_sampling_window=7,
        n_batches_for_norm_estimate=3,
    )
    made = library("sae_lens.config").SAETrainerConfig(**(given | settings))
    return library("sae_lens.training.sae_trainer").SAETrainer(
        cfg=made, sae=sae, data_provider=iter(data)
    )


def resume(made: Any, first: Any, folder: Path) -> None:
    """Load what another trainer saved, with the weights of its SAE."""
    made.sae.load_weights_from_checkpoint(folder)
    made.load_trainer_state(folder)
    # releases before 6.52 save how far a coefficient's schedule is, and load no value for it
    for name, schedule in made.coefficient_schedulers.items():
        schedule.current_value = first.coefficient_schedulers[name].current_value


@dataclass
class Run:
    """What training leaves.

    Attributes:
        losses: name -> [steps]. parameters: and buffers, and Adam's moments.
        fired, passes: [steps, F], how often each feature fired so far and since when not.
        dead: how many features were dead at each step. seen: what hooks saw.
    """

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    fired: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    passes: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    dead: list[int] = field(default_factory=list)
    seen: list[torch.Tensor] = field(default_factory=list)


def state(sae: Any, optimizer: Any = None) -> dict[str, torch.Tensor]:
    """Parameters, buffers, and Adam's moments of them."""
    found = {n: t.detach().clone() for n, t in sae.state_dict().items()}
    for n, p in sae.named_parameters():
        for key, value in (optimizer.state.get(p, {}) if optimizer else {}).items():
            found[f"{key} of {n}"] = value.detach().clone()
    return found


def train(
    trainer: Any,
    data: list[torch.Tensor],
    each: Callable[[int, Any, Run], object] = lambda step, trainer, run: None,
) -> Run:
    """A step of the trainer for every batch; `each(step, trainer, run)` is called before it."""
    run = Run()
    losses: dict[str, list[torch.Tensor]] = {}
    fired, passes = [], []
    for step, x in enumerate(data):
        each(step, trainer, run)
        run.dead.append(int(trainer.dead_neurons.sum()))
        output = trainer.step(x)
        trainer.n_training_steps += 1
        for n, value in {"loss": output.loss, **output.losses}.items():
            losses.setdefault(n, []).append(torch.as_tensor(value).detach().double())
        fired.append(trainer.act_freq_scores.clone())
        passes.append(trainer.n_forward_passes_since_fired.clone())
    run.losses = {n: torch.stack(values) for n, values in losses.items()}
    run.parameters = state(trainer.sae, trainer.optimizer)
    run.fired, run.passes = torch.stack(fired), torch.stack(passes)
    return run


def assert_equal_runs(got: Run, exact: Run, eager: Run, dtype: torch.dtype = torch.float32) -> None:
    """By the error-ratio rule; the same features fire, and are dead, at every step."""
    assert_as_accurate(got.losses, exact.losses, eager.losses, dtype)
    assert_as_accurate(got.parameters, exact.parameters, eager.parameters, dtype)
    seen = [{str(i): t for i, t in enumerate(run.seen)} for run in (got, exact, eager)]
    assert_as_accurate(*seen, dtype)
    for run in (exact, eager):
        assert torch.equal(got.fired.double(), run.fired.double())
        assert torch.equal(got.passes.double(), run.passes.double())
        assert got.dead == run.dead
    assert float(got.fired.sum()) > 0 and got.dead[-1] > 0


def steps_without_library(
    sae: Any,
    data: list[torch.Tensor],
    *,
    accumulate: int = 1,
) -> dict[str, torch.Tensor]:
    """A training loop of one's own around `training_forward_pass`: losses, parameters."""
    kind = library("sae_lens.saes.sae").TrainStepInput
    known = {f.name for f in dataclasses.fields(kind)}
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    losses = []
    f = sae.cfg.d_sae
    dead = torch.arange(f) >= f - DEAD
    for step, x in enumerate(data):
        given = {
            "sae_in": x,
            "dead_neuron_mask": dead,
            "coefficients": {n: 0.05 for n in sae.get_coefficients()},
            "n_training_steps": step,
            "is_logging_step": False,
        }
        output = sae.training_forward_pass(kind(**{n: v for n, v in given.items() if n in known}))
        (output.loss / accumulate).backward()
        losses.append(output.loss.detach().double())
        if step % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()
    return {"losses": torch.stack(losses)} | state(sae, optimizer)
