# SPDX-License-Identifier: Apache-2.0
"""Who is compared: libraries with settings, each trained by its own loop on what a Feed gives.

A contender is written `library:setting=value,...`. Settings are those of the library's own
configuration by their names there, and three of ours that mean the same to all:

    share=0.5      of the run's steps; schedules are as long as the run
    recipe=ours    the peak learning rate, warm-up and linear decay of our Trainer's default
    norm=1         SAELens alone: activations scaled to a mean norm of sqrt(d), as its
                   "expected_average_only_in" does, from the first batch

Everything else is the library's default. Seeds: torch's generator gives every SAE its weights, from
`INITIAL + seed`, far from the seeds that made the data.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from mikernels.evaluate.synthetic import DenseView
from mikernels.nn import ARCHITECTURES
from mikernels.training import TrainConfig, Trainer

from ..harness import peers
from .feed import Feed, orders

INITIAL = 1000
# rows that are encoded at a time when an SAE is looked at
ROWS = 2048


@dataclass(frozen=True)
class Sizes:
    """An SAE and its run: F features, k active, batch rows a step, steps."""

    d: int
    f: int
    k: int
    batch: int
    steps: int


@dataclass(frozen=True)
class Contender:
    """A library with settings, as `parse` reads them."""

    text: str
    library: str
    settings: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0

    def steps(self, sizes: Sizes) -> int:
        return max(1, round(self.share * sizes.steps))


@dataclass(frozen=True)
class Trained:
    """What came of a run: an SAE as SAELens' evaluations call it, and what was set in the end."""

    view: Any
    settings: dict[str, Any]


def parse(text: str) -> Contender:
    """Reads `library:setting=value,...`.

    Raises:
        ValueError: for another library, or what is not `setting=value`.
    """
    library, _, rest = text.partition(":")
    if library not in LIBRARIES:
        raise ValueError(
            f"bench quality: a contender must begin with one of {', '.join(LIBRARIES)}, got "
            f"{text!r}"
        )
    settings: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise ValueError(
                f"bench quality: settings of {text!r} must be name=value, got {part!r}"
            )
        settings[name] = _value(value)
    share = settings.pop("share", 1.0)
    if isinstance(share, str) or not 0 < share <= 64:
        raise ValueError(f"bench quality: share of {text!r} must be in (0, 64], got {share!r}")
    return Contender(text, library, settings, float(share))


def _value(text: str) -> Any:
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def train(contender: Contender, sizes: Sizes, feed: Feed, held: torch.Tensor) -> Trained:
    """Train to the end of the feed, with the curve measured on the rows `held`."""
    torch.manual_seed(INITIAL + feed.seed)
    with _silent():
        trained = LIBRARIES[contender.library](dict(contender.settings), sizes, feed, held)
    # the run's own scale is folded back by now
    feed.measure = lambda: unexplained(trained.view, held)
    feed.finish()
    return trained


@torch.no_grad()
def unexplained(view: Any, x: torch.Tensor) -> float:
    """Share of x's variance that reconstructions leave; `view` has `encode` and `decode`."""
    mean = x.mean(0, dtype=torch.float64)
    left = spread = 0.0
    for part in x.split(ROWS):
        left += float((view.decode(view.encode(part)).double() - part).square().sum())
        spread += float((part - mean).square().sum())
    return left / spread


def _mikernels(settings: dict[str, Any], sizes: Sizes, feed: Feed, held: torch.Tensor) -> Trained:
    kind = ARCHITECTURES[settings.pop("architecture", "topk")]
    names = {f.name for f in fields(TrainConfig)}
    run = {name: settings.pop(name) for name in list(settings) if name in names}
    sae = kind(sizes.d, sizes.f, sizes.k, **settings)
    total = feed.steps * sizes.batch
    config = TrainConfig(**{"total_tokens": total, "batch_size": sizes.batch, **run})
    trainer = Trainer(sae, feed, config, quiet=True)
    view = DenseView(sae)
    # within the run the SAE is one of the scaled activations
    feed.measure = lambda: unexplained(view, held * trainer.history.scale)
    trainer.run()
    return Trained(view, {**sae.config.to_dict(), **trainer.config.to_dict()})


def schedule(sizes: Sizes, steps: int) -> tuple[float, int, int]:
    """Peak learning rate, steps of warm-up and of decay of our Trainer's default."""
    config = TrainConfig(total_tokens=steps * sizes.batch, batch_size=sizes.batch)
    return config.peak_lr(sizes.f), config.warmup, config.decay_length


def _saelens(settings: dict[str, Any], sizes: Sizes, feed: Feed, held: torch.Tensor) -> Trained:
    run: dict[str, Any] = {"lr": 3e-4, "device": "cpu"}
    if _recipe(settings):
        lr, warm, decay = schedule(sizes, feed.steps)
        run |= {"lr": lr, "lr_warm_up_steps": warm, "lr_decay_steps": decay}
    own = ("lr", "adam_beta1", "adam_beta2", "dead_feature_window")
    run |= {name: settings.pop(name) for name in own if name in settings}
    architecture, norm = settings.pop("architecture", "topk"), settings.pop("norm", False)
    sae = {"d_in": sizes.d, "d_sae": sizes.f, "k": sizes.k, "device": "cpu", **settings}
    run |= {
        "lr_end": run["lr"],
        "total_training_samples": feed.steps * sizes.batch,
        "train_batch_size_samples": sizes.batch,
    }
    trainer = peers.saelens_run(architecture, feed, sae, run)
    scale = 1.0
    if norm:
        first = feed.x[next(orders(feed.x.shape[0], feed.batch, feed.seed))]
        scale = float(sizes.d**0.5 / first.norm(dim=-1).mean())
        trainer.activation_scaler.scaling_factor = scale

    feed.measure = lambda: unexplained(trainer.sae, held * scale)
    trainer.fit()
    return Trained(trainer.sae.eval(), {**sae, **run, "architecture": architecture, "scale": scale})


class _View:
    """dictionary_learning's SAE as SAELens' evaluations call one."""

    def __init__(self, sae: Any):
        self.encode, self.decode = sae.encode, sae.decode
        self.W_dec = sae.decoder.weight.detach().T
        self.eval = sae.eval


def _dictionary_learning(
    settings: dict[str, Any], sizes: Sizes, feed: Feed, held: torch.Tensor
) -> Trained:
    # a warm-up of 1,000 steps, its default, must end within the run
    run: dict[str, Any] = {"warmup_steps": min(1000, feed.steps // 20)}
    if _recipe(settings):
        lr, warm, decay = schedule(sizes, feed.steps)
        run = {"lr": lr, "warmup_steps": warm, "decay_start": feed.steps - decay}
    run |= settings
    run |= {"activation_dim": sizes.d, "dict_size": sizes.f, "k": sizes.k, "steps": feed.steps}
    # its seed argument sets the generator of CUDA as well
    trainer = peers.dictionary_learning_run(run)
    feed.measure = lambda: unexplained(trainer.ae, held)
    for step, x in enumerate(feed):
        trainer.update(step, x)
    trainer.ae.eval()
    return Trained(_View(trainer.ae), {**run, "lr": trainer.lr})


def _recipe(settings: dict[str, Any]) -> bool:
    recipe = settings.pop("recipe", None)
    if recipe not in (None, "ours"):
        raise ValueError(f"bench quality: recipe must be ours, got {recipe!r}; leave it out")
    return recipe == "ours"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without progress bars and warnings of the libraries."""
    with (
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


Run = Callable[[dict[str, Any], Sizes, Feed, torch.Tensor], Trained]
LIBRARIES: dict[str, Run] = {
    "mikernels": _mikernels,
    "saelens": _saelens,
    "dictionary_learning": _dictionary_learning,
}
