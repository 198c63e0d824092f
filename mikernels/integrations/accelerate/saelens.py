# SPDX-License-Identifier: Apache-2.0
"""SAELens: training SAEs, inference SAEs and transcoders, trainers and runners.

`h = x W_enc + b_enc` is formed in `encode`, `encode_with_hidden_pre` and, of gated SAEs,
`calculate_aux_loss`; `training_forward_pass` and `forward` are entered too, so that the decoder's
norms are taken once a step. The trainer is left as it is: its statistics come from codes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from mikernels.integrations.accelerate.jumps import JumpReLU, Step
from mikernels.integrations.accelerate.plan import Method, Plan, refuse_overrides
from mikernels.integrations.lazy import Lazy, Ledger, leave_products
from mikernels.rebind import rebound

PACKAGE = "sae_lens"
NAMES = (
    *("training_forward_pass", "encode_with_hidden_pre", "encode", "calculate_aux_loss"),
    *("forward", "forward_with_activations", "decode"),
)
# not `decode`: its products are those of activations
ENTERED = tuple(name for name in NAMES if name != "decode")
KNOWN = {
    *("TopKTrainingSAE", "BatchTopKTrainingSAE", "MatryoshkaBatchTopKTrainingSAE"),
    *("JumpReLUTrainingSAE", "GatedTrainingSAE", "StandardTrainingSAE"),
    *("TopKSAE", "JumpReLUSAE", "GatedSAE", "StandardSAE"),
    *("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"),
}
# what holds SAEs
TRAINERS = ("SAETrainer", "MultiSAETrainer")
RUNNERS = ("LanguageModelSAETrainingRunner", "SAETrainingRunner", "MultiSAETrainingRunner")

ERROR_TERM = "an error term beside hooks"

# sizes of the SAE that is tried: odd ones, d below F
SMALL = {"d_in": 12, "d_sae": 45, "d_out": 10, "k": 5, "target_l0": 6.0}


def plan(obj: Any, *, correct: bool = False) -> Plan:
    name = next((c.__name__ for c in type(obj).__mro__ if c.__module__.startswith(PACKAGE)), "")
    if name in TRAINERS or name in RUNNERS:
        return _plan_of_holder(obj, name)
    kind = refuse_overrides(obj, PACKAGE, NAMES)
    if kind.__name__ not in KNOWN:
        raise TypeError(
            f"accelerate: SAELens' {kind.__name__} is not supported; supported are "
            f"{', '.join(sorted(KNOWN))}, and {', '.join((*TRAINERS, *RUNNERS))}"
        )
    d, f = obj.W_enc.shape
    if d == f:
        raise ValueError(
            f"accelerate: expected more features than activations' width, got d_sae {f} and d_in "
            f"{d}, of which encoder and decoder cannot be told apart; SAEs of this size are fast"
        )
    methods = [
        Method(obj, name, _maker(kind, name, d, f)) for name in ENTERED if hasattr(kind, name)
    ]
    return Plan(
        f"sae-lens {_version()}",
        methods,
        [obj],
        [(obj, "W_enc", 1)],
        lambda: _twin(kind, obj.cfg),
    )


def _version() -> str:
    import sae_lens

    return str(sae_lens.__version__)


def _maker(kind: type, name: str, d: int, f: int) -> Callable[[Ledger], Callable[..., Any]]:
    function: Any = getattr(kind, name)

    def make(ledger: Ledger) -> Callable[..., Any]:
        changed = function
        known = getattr(function, "__globals__", {})
        used = getattr(getattr(function, "__code__", None), "co_names", ())
        jumps = {"JumpReLU": JumpReLU, "Step": Step}
        stand_ins = {n: c(known[n]) for n, c in jumps.items() if n in used and n in known}
        if stand_ins:
            changed = rebound(function, **stand_ins)
        left = leave_products(changed, d, f, ledger)
        return _as_with_hooks(left, function, f, ledger) if name == "encode" else left

    return make


def _as_with_hooks(
    left: Callable[..., Any], own: Callable[..., Any], f: int, ledger: Ledger
) -> Callable[..., Any]:
    """`encode`, which gives a dense tensor where its hooks are disabled and with them it gave one:
    an error term takes the one from the other, so that both must be rounded alike."""
    last_was_dense = False

    @functools.wraps(own)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal last_was_dense
        hooks = self.hook_dict
        if self.hook_sae_acts_post is hooks.get("hook_sae_acts_post"):
            found = left(self, *args, **kwargs)
            last_was_dense = not isinstance(found, Lazy)
            return found
        if last_was_dense and _is_hooked(hooks["hook_sae_acts_pre"]):
            # what was selected from was dense already
            ledger.looked(ERROR_TERM, ("...", f))
            with ledger.within, torch._C.DisableTorchFunction():
                return own(self, *args, **kwargs)
        found = left(self, *args, **kwargs)
        return found._look(ERROR_TERM) if last_was_dense and isinstance(found, Lazy) else found

    return run


def _is_hooked(module: torch.nn.Module) -> bool:
    return any(
        getattr(module, f"_{kind}_hooks")
        for kind in ("forward_pre", "forward", "backward_pre", "backward")
    )


def _plan_of_holder(obj: Any, name: str) -> Plan:
    if name in RUNNERS and getattr(getattr(obj, "cfg", None), "compile_sae", False):
        raise ValueError(
            "accelerate: expected a runner that does not compile its SAE, got compile_sae=True; "
            "set it to False"
        )
    if hasattr(obj, "sae"):
        saes, optimizers = [obj.sae], [getattr(obj, "optimizer", None)]
    elif isinstance(getattr(obj, "trainers", None), dict):
        saes = [t.sae for t in obj.trainers.values()]
        optimizers = [t.optimizer for t in obj.trainers.values()]
    elif isinstance(getattr(obj, "saes", None), dict):
        saes, optimizers = list(obj.saes.values()), []
    else:
        raise ValueError(
            f"accelerate: expected a {name} with an attribute sae, trainers or saes, got none; "
            f"accelerate its SAEs"
        )
    plans = [plan(sae) for sae in saes]
    whole = plans[0]
    for more in plans[1:]:
        whole = whole.with_more(more)
    whole.optimizers = [o for o in optimizers if isinstance(o, torch.optim.Optimizer)]
    return whole


def _twin(kind: Any, cfg: Any) -> tuple[Any, Callable[[Any], dict[str, torch.Tensor]]]:
    """A small SAE of these settings, and a step of it."""
    given = {field.name for field in dataclasses.fields(cfg)}
    changes: dict[str, Any] = {n: v for n, v in SMALL.items() if n in given}
    if getattr(cfg, "target_l0", None) is None:
        changes.pop("target_l0", None)
    if "matryoshka_widths" in given:
        changes["matryoshka_widths"] = [7, 20, SMALL["d_sae"]]
    changes |= {"device": "cpu", "dtype": "float32", "reshape_activations": "none"}
    # a configuration writes into its metadata what it was made with
    changes["metadata"] = copy.deepcopy(cfg.metadata)
    small = dataclasses.replace(cfg, **{n: v for n, v in changes.items() if n in given})
    made = kind(small)
    with torch.no_grad():
        for parameter in made.parameters():
            # away from zeros, at which much is hidden; thresholds stay positive
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) * 0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    x = torch.randn(17, small.d_in)
    trains = hasattr(made, "training_forward_pass")
    # with layers that normalise, AuxK is refused by the library itself
    normal = getattr(cfg, "normalize_activations", "none")
    dead = torch.rand(small.d_sae) < 0.4
    if normal in ("constant_norm_rescale", "layer_norm"):
        dead = torch.zeros_like(dead)

    def step(sae: Any) -> dict[str, torch.Tensor]:
        if not trains:
            with torch.no_grad():
                acts = sae.encode(x)
                out = sae(x)
                found = {"sae_out": out, "l0": acts.bool().float().sum(-1)}
            return found
        inputs = _inputs(x, dead, {n: 0.3 for n in sae.get_coefficients()})
        output = sae.training_forward_pass(inputs)
        output.loss.backward()
        firing = output.feature_acts.bool().float()
        return {
            "loss": output.loss.detach(),
            "sae_out": output.sae_out.detach(),
            **{f"loss {n}": torch.as_tensor(v).detach() for n, v in output.losses.items()},
            **{f"gradient of {n}": p.grad for n, p in sae.named_parameters() if p.grad is not None},
            # of torch's sparse tensors too, which an SAE may be set to make
            "firing": firing.sum(0).to_dense(),
            "l0": firing.sum(-1).to_dense(),
        }

    return made, step


def _inputs(x: torch.Tensor, dead: torch.Tensor, coefficients: dict[str, float]) -> Any:
    from sae_lens.saes.sae import TrainStepInput

    given = {
        "sae_in": x,
        "dead_neuron_mask": dead,
        "coefficients": coefficients,
        "n_training_steps": 0,
        "is_logging_step": False,
    }
    known = {field.name for field in dataclasses.fields(TrainStepInput)}
    return TrainStepInput(**{n: v for n, v in given.items() if n in known})
