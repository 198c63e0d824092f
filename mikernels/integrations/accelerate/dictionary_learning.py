# SPDX-License-Identifier: Apache-2.0
"""dictionary_learning: its dictionaries and trainers.

`relu(W x + b)` is formed in a dictionary's `encode`, JumpReLU's in the trainer's `loss`. Decoders
that are nn.Linear `[d, F]` are laid out by feature; the trainer's `update`, with its projection and
its norms, is left as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from mikernels.integrations.accelerate.jumps import JumpReLU, Step
from mikernels.integrations.accelerate.plan import Method, Plan, refuse_overrides
from mikernels.integrations.lazy import Ledger, leave_products
from mikernels.rebind import rebound

PACKAGE = "dictionary_learning"
DICTIONARIES = {
    *("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"),
    *("GatedAutoEncoder", "AutoEncoder", "AutoEncoderNew"),
}
TRAINERS = {
    *("TopKTrainer", "BatchTopKTrainer", "MatryoshkaBatchTopKTrainer", "JumpReluTrainer"),
    *("GatedSAETrainer", "GatedAnnealTrainer", "StandardTrainer", "StandardTrainerAprilUpdate"),
    "PAnnealTrainer",
}
# sizes of the dictionary that is tried
D, F, K = 12, 45, 5


def plan(obj: Any, *, correct: bool = False) -> Plan:
    if hasattr(obj, "ae") and hasattr(obj, "loss"):
        return _plan_of_trainer(obj)
    return _plan_of_dictionary(obj)


def _library() -> str:
    try:
        return f"dictionary_learning {version('dictionary-learning')}"
    except PackageNotFoundError:
        return "dictionary_learning (from source)"


def _sizes(ae: Any) -> tuple[int, int]:
    if hasattr(ae, "W_enc"):
        d, f = ae.W_enc.shape
    else:
        f, d = ae.encoder.weight.shape
    if d == f:
        raise ValueError(
            f"accelerate: expected more features than activations' width, got dict_size {f} and "
            f"activation_dim {d}, of which encoder and decoder cannot be told apart"
        )
    return d, f


def _maker(kind: type, name: str, d: int, f: int) -> Callable[[Ledger], Callable[..., Any]]:
    function: Any = getattr(kind, name)

    def make(ledger: Ledger) -> Callable[..., Any]:
        known, used = function.__globals__, function.__code__.co_names
        jumps = {"JumpReLUFunction": JumpReLU, "StepFunction": Step}
        stand_ins = {n: c(known[n]) for n, c in jumps.items() if n in used and n in known}
        changed = rebound(function, **stand_ins) if stand_ins else function
        return leave_products(changed, d, f, ledger)

    return make


def _plan_of_dictionary(ae: Any) -> Plan:
    names = ("encode", "decode", "forward")
    kind = refuse_overrides(ae, PACKAGE, names)
    if kind.__name__ not in DICTIONARIES:
        raise TypeError(
            f"accelerate: dictionary_learning's {kind.__name__} is not supported; supported are "
            f"{', '.join(sorted(DICTIONARIES))}, and {', '.join(sorted(TRAINERS))}"
        )
    d, f = _sizes(ae)
    linear = (
        [(ae.encoder, "weight", 0), (ae.decoder, "weight", 1)] if hasattr(ae, "encoder") else []
    )
    return Plan(
        _library(),
        [Method(ae, name, _maker(kind, name, d, f)) for name in ("encode", "forward")],
        [ae],
        linear or [(ae, "W_enc", 1), (ae, "W_dec", 0)],
        lambda: _twin(kind),
    )


def _plan_of_trainer(trainer: Any) -> Plan:
    kind = refuse_overrides(trainer, PACKAGE, ("loss", "get_auxiliary_loss", "update_threshold"))
    if kind.__name__ not in TRAINERS:
        raise TypeError(
            f"accelerate: dictionary_learning's {kind.__name__} is not supported; supported are "
            f"{', '.join(sorted(TRAINERS))}, and {', '.join(sorted(DICTIONARIES))}"
        )
    whole = _plan_of_dictionary(trainer.ae)
    d, f = _sizes(trainer.ae)
    whole.methods.append(Method(trainer, "loss", _maker(kind, "loss", d, f)))
    if isinstance(getattr(trainer, "optimizer", None), torch.optim.Optimizer):
        whole.optimizers = [trainer.optimizer]
    whole.twin = lambda: _trainer_twin(kind)
    return whole


def _filled(ae: Any) -> None:
    with torch.no_grad():
        for name, parameter in ae.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) * (0.3 if name == "threshold" else 0.1))
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def _groups() -> list[int]:
    return [7, 13, F - 20]


def _twin(kind: Any) -> tuple[Any, Callable[[Any], dict[str, torch.Tensor]]]:
    sizes: tuple[Any, ...] = (D, F)
    if kind.__name__ in ("AutoEncoderTopK", "BatchTopKSAE"):
        sizes = (D, F, K)
    elif kind.__name__ == "MatryoshkaBatchTopKSAE":
        sizes = (D, F, K, _groups())
    made = kind(*sizes)
    _filled(made)
    if hasattr(made, "k"):
        made.threshold.fill_(0.5)
    x = torch.randn(17, D)

    def step(ae: Any) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            out, features = ae(x, output_features=True)
            return {"reconstruction": out, "l0": (features != 0).float().sum(-1)}

    return made, step


def _trainer_twin(kind: Any) -> tuple[Any, Callable[[Any], dict[str, torch.Tensor]]]:
    offered = {
        "steps": 10,
        "activation_dim": D,
        "dict_size": F,
        "layer": 0,
        "lm_name": "none",
        "device": "cpu",
        "k": K,
        "group_fractions": [0.2, 0.3, 0.5],
        "warmup_steps": 1,
        "sparsity_warmup_steps": 2,
        "threshold_start_step": 0,
        "sparsity_function": "Lp",
        "anneal_start": 5,
        "target_l0": 6.0,
        "seed": 0,
    }
    accepted = inspect.signature(kind).parameters
    made = kind(**{name: value for name, value in offered.items() if name in accepted})
    _filled(made.ae)
    if hasattr(made, "num_tokens_since_fired"):
        made.num_tokens_since_fired[::3] = 20_000_000
    x = torch.randn(17, D)

    def step(trainer: Any) -> dict[str, torch.Tensor]:
        loss = trainer.loss(x, step=3)
        loss.backward()
        ae = trainer.ae
        found = {f"gradient of {n}": p.grad for n, p in ae.named_parameters() if p.grad is not None}
        found["loss"] = loss.detach()
        if hasattr(trainer, "num_tokens_since_fired"):
            found["tokens since fired"] = trainer.num_tokens_since_fired
        return found

    return made, step
