# SPDX-License-Identifier: Apache-2.0
"""sparsify's SparseCoder at a small size, and what 20 steps, as its trainer takes them, leave.

The oracle is the library itself in fp64, and of `correct=True` the dense expression written out.
What a release lacks is left out (the variance of the whole batch, before 1.3.2).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate_cases import assert_as_accurate
from accelerate_rounded import assert_as_accurate_in_bf16
from oracle import randn

D, F, K, N, STEPS = 16, 64, 4, 32, 20


def library(name: str = "sparsify") -> Any:
    """A module of sparsify; the test is skipped where it is not installed."""
    # decided at its import: no Triton kernels for CPU tensors
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.importorskip(
            "sparsify", reason="eai-sparsify is not installed", exc_type=ImportError
        )
        return importlib.import_module(name)


# name -> settings of SparseCoderConfig beside num_latents and k
SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {},
    "groupmax": dict(activation="groupmax"),
    "multi-topk": dict(multi_topk=True),
    "groupmax, multi-topk": dict(activation="groupmax", multi_topk=True),
    "transcoder": dict(transcode=True),
    "skip transcoder": dict(transcode=True, skip_connection=True, multi_topk=True),
    "skip": dict(skip_connection=True),
    "norms kept": dict(normalize_decoder=False),
}


def make(name: str = "topk", **changes: Any) -> Any:
    """A sparse coder with weights and biases other than 0, which no decoder starts with."""
    sparsify = library()
    settings = {"num_latents": F, "k": K, **SETTINGS[name], **changes}
    torch.manual_seed(1)
    sae = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(**settings))
    with torch.no_grad():
        sae.encoder.weight.mul_(2)
        sae.encoder.bias.copy_(randn(F, seed=2) / 4)
        sae.b_dec.copy_(randn(D, seed=3) / 4)
        if sae.cfg.transcode:
            sae.W_dec.copy_(randn(F, D, seed=4) / 4)
        if sae.W_skip is not None:
            sae.W_skip.copy_(randn(D, D, seed=5) / 8)
    return sae


class Holder:
    """What `accelerate` asks of sparsify's trainer, which is made of a model and a data set."""

    def __init__(self, sae: Any):
        self.saes = {"layers.0": sae}
        # of a gradient of rounding size Adam's own 1e-8 would make a step of full length
        self.optimizers = [torch.optim.Adam(sae.parameters(), lr=3e-3, eps=1e-3)]
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(
                self.optimizers[0], lambda step: min((step + 1) / 4, 1, (STEPS - step) / 8)
            )
        ]
        # of tokens
        self.since_fired = torch.zeros(F, dtype=torch.long)
        self.step = 0

    @property
    def sae(self) -> Any:
        return self.saes["layers.0"]

    def double(self) -> Holder:
        self.sae.double()
        return self


Holder.__module__ = "sparsify.trainer"


def batches(
    dtype: torch.dtype = torch.float32, *, strided: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets of every step, the same numbers in every dtype and layout."""
    mix, offset, to = randn(D, D, seed=6) / 4, randn(D, seed=7) / 2, randn(D, D, seed=8) / 4
    found = []
    for step in range(STEPS):
        x = (randn(N, D, seed=10 + step) @ mix + offset).bfloat16().to(dtype)
        y = (x.double() @ to.double()).bfloat16().to(dtype)
        if strided:
            x, y = x.T.contiguous().T, torch.cat([y, y], 1)[:, :D]
        found.append((x, y))
    return found


@functools.cache
def takes_variance() -> bool:
    """Whether this release lets a caller give the variance of the whole batch."""
    return "total_variance" in inspect.signature(library().SparseCoder.forward).parameters


@functools.cache
def adds_bias_to_aux() -> bool:
    """Whether this release decodes AuxK with the bias, as those before 1.3.3 do."""
    forward = inspect.unwrap(library().SparseCoder.forward)
    return "decoder_impl" not in forward.__code__.co_names


@dataclass
class Run:
    """What steps left: losses, parameters and Adam's moments; which features did not fire in each
    step; AuxK's losses."""

    numbers: dict[str, torch.Tensor]
    silent: torch.Tensor
    aux: torch.Tensor


Each = Callable[[int, Any], object]


def train(
    holder: Holder,
    data: list[tuple[torch.Tensor, torch.Tensor]],
    *,
    autocast: bool = False,
    parts: int = 1,
    clip: float | None = None,
    k_decay: int = 0,
    each: Each = lambda step, sae: None,
) -> Run:
    """The body of the library's `fit` for one hookpoint, from the holder's step on.

    Args:
        parts: micro-batches whose gradients are added up. clip: of the gradient's norm.
        k_decay: steps over which k falls from 3 K to K.
    """
    sae, optimizer = holder.sae, holder.optimizers[0]
    losses, silent, aux = [], [], []
    # the library's decorator says the same of a GPU
    cast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)
    for step, (x, y) in enumerate(data[holder.step :], holder.step):
        each(step, sae)
        if k_decay:
            sae.cfg.k = K if step >= k_decay else round(3 * K - 2 * K * step / k_decay)
        y = y if sae.cfg.transcode else x
        if sae.cfg.normalize_decoder and not sae.cfg.transcode:
            sae.set_decoder_norm_to_unit_norm()
        dead = holder.since_fired > N
        fired = torch.zeros(F, dtype=torch.bool)
        more = {"total_variance": (y - y.mean(0)).pow(2).sum()} if takes_variance() else {}
        for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with cast():
                out = sae(x_part, y_part, dead_mask=dead, **more)
            fired[out.latent_indices.flatten()] = True
            loss = out.fvu + out.auxk_loss / 4 + out.multi_topk_fvu / 8
            (loss / parts).backward()
            losses.append(loss.detach().double())
            aux.append(out.auxk_loss.detach().double())
        if sae.cfg.normalize_decoder and not sae.cfg.transcode:
            sae.remove_gradient_parallel_to_decoder_directions()
        if clip:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        holder.schedulers[0].step()
        holder.since_fired += N
        holder.since_fired[fired] = 0
        holder.step += 1
        silent.append(holder.since_fired > 0)
    parameters = {n: t.detach().clone() for n, t in sae.state_dict().items()}
    moments = {
        f"{name} of {i}": state[name].clone()
        for i, state in optimizer.state_dict()["state"].items()
        for name in ("exp_avg", "exp_avg_sq")
    }
    numbers = {"losses": torch.stack(losses), **parameters, **moments}
    return Run(numbers, torch.stack(silent), torch.stack(aux))


@functools.cache
def unaccelerated(name: str) -> tuple[Run, Run]:
    """All steps of the library as it is, in fp64 and in fp32."""
    exact = train(Holder(make(name)).double(), batches(torch.float64))
    return exact, train(Holder(make(name)), batches())


def assert_same_training(found: Run, exact: Run, eager: Run, *, low: bool = False) -> None:
    """Numbers by the error-ratio rule; firing statistics equal, or where the library computes in
    bf16, about as often other than in fp64 as its own."""
    if low:
        # moments are those of the last few steps alone
        runs = [
            ({n: t for n, t in run.numbers.items() if not n.startswith("exp_avg")}, run.silent)
            for run in (found, exact, eager)
        ]
        assert_as_accurate_in_bf16(*runs)
        return
    assert_as_accurate(found.numbers, exact.numbers, eager.numbers)
    assert torch.equal(found.silent, eager.silent)


def dense_loss(
    sae: Any, x: torch.Tensor, y: torch.Tensor, dead: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss as one expression of dense matrices, for autograd, with its parts.

    All that the library's own encoder leaves out of the gradient is in it.
    """
    cfg, centred = sae.cfg, x if sae.cfg.transcode else x - sae.b_dec
    h = torch.relu(centred @ sae.encoder.weight.T + sae.encoder.bias)
    if cfg.activation == "groupmax":
        best = h.unflatten(-1, (cfg.k, -1)).argmax(-1)
        chosen = best + torch.arange(cfg.k) * (F // cfg.k)
    else:
        chosen = h.topk(cfg.k).indices

    def decoded(chosen: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(h).scatter(-1, chosen, 1)
        return (h * kept) @ sae.W_dec

    out = decoded(chosen) + sae.b_dec
    if sae.W_skip is not None:
        out = out + x @ sae.W_skip.T
    error = y - out
    variance = (y - y.mean(0)).square().sum()
    k_aux = D // 2
    n_dead = int(dead.sum())
    kept = h.masked_fill(~dead, -torch.inf).topk(min(k_aux, n_dead)).indices
    guess = decoded(kept) + (sae.b_dec if adds_bias_to_aux() else 0)
    parts = {
        "fvu": error.square().sum() / variance,
        "aux": min(n_dead / k_aux, 1) * (guess - error.detach()).square().sum() / variance,
    }
    if cfg.multi_topk:
        more = decoded(h.topk(4 * cfg.k).indices) + sae.b_dec
        parts["multi"] = (more - y).square().sum() / variance
    return parts["fvu"] + parts["aux"] / 4 + parts.get("multi", torch.zeros(())) / 8, parts
