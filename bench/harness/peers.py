# SPDX-License-Identifier: Apache-2.0
"""The public libraries that we are compared with: their own classes, loaded with our weights.

Only public classes are called. `make bench-peers` installs the pinned versions; where one is not
importable the provider is reported as absent with the reason.

dictionary_learning names nnsight's LanguageModel in signatures. Importing nnsight 0.3 replaces
torch's FakeTensor, after which nothing in the process can be compiled, so peers are imported with a
stand-in of which nothing can be used.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mikernels.rebind import rebound

from .spec import Unavailable
from .synthetic import Weights

# settings that keep libraries from talking to a network; a user's own settings win
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
}


class _NotUsed(type):
    def __call__(cls, *args: object, **kwargs: object) -> object:
        raise RuntimeError(f"{cls.__name__} is a stand-in: peers must run without it")


class _StandIn(types.ModuleType):
    """A module any name of which is a class without instances."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _NotUsed(f"{self.__name__}.{name}", (), {})


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """While it is entered, importing `name` gives a stand-in, unless it has been imported."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = _StandIn(name)
    try:
        yield
    finally:
        del sys.modules[name]


def _module(name: str, package: str) -> Any:
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if torch.get_default_device().type == "cpu":
        # decided at its import: no Triton kernels for CPU tensors
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    try:
        # they print and warn while being imported
        with (
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
            _without("nnsight"),
        ):
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(
            f"{package} is not importable ({error}); run `make bench-peers`"
        ) from error


def sparsify_sae(weights: Weights, k: int) -> Any:
    """eai-sparsify's SparseCoder with these weights (copied), eager decoder."""
    sparsify = _module("sparsify", "eai-sparsify")
    f, d = weights.w_enc.shape
    config = sparsify.SaeConfig(num_latents=f, k=k)
    sae = sparsify.SparseCoder(d, config).to(weights.w_enc.device, weights.w_enc.dtype)
    with torch.no_grad():
        sae.encoder.weight.copy_(weights.w_enc)
        sae.encoder.bias.copy_(weights.b_enc)
        sae.W_dec.copy_(weights.w_dec)
        sae.b_dec.copy_(weights.b_dec)
    return sae


def openai_decode() -> Any:
    """openai/sparse_autoencoder's Triton product: (indices, values, w `[F, d]`) -> `[N, d]`."""
    kernels = _module("sparse_autoencoder.kernels", "openai's sparse_autoencoder")
    return kernels.triton_sparse_dense_matmul


def dictionary_learning_trainer(weights: Weights, k: int, lr: float) -> Any:
    """dictionary_learning's TopKTrainer with these weights (copied), constant learning rate."""
    top_k = _module("dictionary_learning.trainers.top_k", "dictionary-learning")
    f, d = weights.w_enc.shape
    trainer = top_k.TopKTrainer(
        steps=1_000_000,
        activation_dim=d,
        dict_size=f,
        k=k,
        layer=0,
        lm_name="none",
        lr=lr,
        warmup_steps=0,
        device=str(weights.w_enc.device),
    )
    trainer.ae.to(weights.w_enc.dtype)
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(weights.w_enc)
        trainer.ae.encoder.bias.copy_(weights.b_enc)
        trainer.ae.decoder.weight.copy_(weights.w_dec.T)
        trainer.ae.b_dec.copy_(weights.b_dec)
    return trainer


# architecture -> the classes of SAELens' training SAE and its configuration
SAELENS = {
    "topk": ("TopKTrainingSAE", "TopKTrainingSAEConfig"),
    "batchtopk": ("BatchTopKTrainingSAE", "BatchTopKTrainingSAEConfig"),
    "jumprelu": ("JumpReLUTrainingSAE", "JumpReLUTrainingSAEConfig"),
    "matryoshka_batchtopk": (
        "MatryoshkaBatchTopKTrainingSAE",
        "MatryoshkaBatchTopKTrainingSAEConfig",
    ),
}


def saelens_trainer(
    weights: Weights,
    k: int,
    lr: float,
    batch: int,
    architecture: str = "topk",
    settings: dict[str, Any] | None = None,
) -> Any:
    """SAELens' SAETrainer over a training SAE with these weights (copied).

    Args:
        architecture: one of SAELENS. settings: of its configuration, beside d_in, d_sae and k.
    """
    sae_lens = _module("sae_lens", "sae-lens")
    config = _module("sae_lens.config", "sae-lens")
    trainer = _module("sae_lens.training.sae_trainer", "sae-lens")
    f, d = weights.w_enc.shape
    where = str(weights.w_enc.device)
    kind, form = (getattr(sae_lens, name) for name in SAELENS[architecture])
    given = {} if architecture == "jumprelu" else {"k": k}
    sae = kind(form(d_in=d, d_sae=f, device=where, **given, **(settings or {})))
    with torch.no_grad():
        sae.W_enc.copy_(weights.w_enc.T)
        sae.b_enc.copy_(weights.b_enc)
        sae.W_dec.copy_(weights.w_dec)
        sae.b_dec.copy_(weights.b_dec)
    schedule = config.SAETrainerConfig(
        total_training_samples=1_000_000 * batch,
        train_batch_size_samples=batch,
        lr=lr,
        lr_end=lr,
        device=where,
    )
    return trainer.SAETrainer(schedule, sae, iter(()))


def saelens_run(
    architecture: str, batches: Iterator[torch.Tensor], sae: dict[str, Any], run: dict[str, Any]
) -> Any:
    """SAELens' SAETrainer of a new SAE, its weights from torch's global generator; `.fit()` trains.

    Args:
        architecture: "topk" or "batchtopk".
        sae: settings of its configuration (d_in, d_sae, k, ...). run: those of SAETrainerConfig.
    """
    sae_lens = _module("sae_lens", "sae-lens")
    config = _module("sae_lens.config", "sae-lens")
    trainer = _module("sae_lens.training.sae_trainer", "sae-lens")
    name = {"topk": "TopKTrainingSAE", "batchtopk": "BatchTopKTrainingSAE"}[architecture]
    new = getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(**sae))
    return trainer.SAETrainer(config.SAETrainerConfig(**run), new, batches)


def dictionary_learning_run(settings: dict[str, Any]) -> Any:
    """dictionary_learning's TopKTrainer of a new SAE; `.update(step, x)` trains on a batch."""
    top_k = _module("dictionary_learning.trainers.top_k", "dictionary-learning")
    return top_k.TopKTrainer(layer=0, lm_name="none", device="cpu", **settings)


@functools.cache
def eap_ig() -> tuple[types.ModuleType, types.ModuleType]:
    """EAP-IG's `eap.attribute` and `eap.graph`, on the CPU, for prompts that are token ids.

    It tokenises texts, and makes its scores on "cuda", whatever the model is on.
    """
    try:
        graph = importlib.import_module("eap.graph")
        attribute = importlib.import_module("eap.attribute")
    except ImportError as error:
        raise Unavailable(f"a checkout of EAP-IG is not importable ({error})") from error
    source = inspect.getsource(attribute)
    on_cpu = types.ModuleType("eap.attribute")
    exec(compile(source.replace("'cuda'", "'cpu'"), str(attribute.__file__), "exec"), vars(on_cpu))
    vars(on_cpu)["tokenize_plus"] = _tokenize
    return on_cpu, graph


def _tokenize(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, Any, torch.Tensor, int]:
    """Of prompts that are token ids, what EAP-IG's `tokenize_plus` returns of texts."""
    return ids, torch.ones_like(ids), torch.full((len(ids),), ids.shape[1]), ids.shape[1]


@functools.cache
def mib_evaluator() -> tuple[Callable[..., Any], types.ModuleType]:
    """MIB's `evaluate_area_under_curve` and EAP-IG's `eap.graph`, for prompts that are token ids.

    MIB's own copy of EAP-IG takes the path of an optimal ablation, EAP-IG's 2.0.0 does not.
    """
    try:
        graph = importlib.import_module("eap.graph")
        evaluate = importlib.import_module("eap.evaluate")
        mib = importlib.import_module("MIB_circuit_track.evaluation")
    except ImportError as error:
        raise Unavailable(f"checkouts of EAP-IG and MIB are not importable ({error})") from error
    whole, part = (
        rebound(function, tokenize_plus=_tokenize, tqdm=lambda batches: batches)
        for function in (evaluate.evaluate_baseline, evaluate.evaluate_graph)
    )

    def without(*args: Any, optimal_ablation_path: None = None, **options: Any) -> Any:
        return part(*args, **options)

    names = {"evaluate_baseline": whole, "evaluate_graph": without}
    return rebound(mib.evaluate_area_under_curve, **names, print=lambda *text: None), graph
