# SPDX-License-Identifier: Apache-2.0
"""The training loop: batches in, metrics and checkpoints out, one of three steps in the middle."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mikernels._autocast import in_own_dtype
from mikernels.activations.streams import as_source
from mikernels.files import explained
from mikernels.nn import SAE
from mikernels.nn.batch_topk_sae import THRESHOLD_RATE
from mikernels.nn.sae import DEAD_AFTER
from mikernels.owning import owned
from mikernels.training.batches import BatchSource, power_of_two_scale, take_batches
from mikernels.training.config import TrainConfig
from mikernels.training.loggers.protocol import (
    Loggers,
    MetricsLogger,
    RunInfo,
    checked,
    loggers,
)
from mikernels.training.loop import drive
from mikernels.training.optimizer import set_rate
from mikernels.training.preflight import (
    check_fit,
    check_optimizer,
    check_state,
    prepare_out_dir,
)
from mikernels.training.progress import Board, Reporter
from mikernels.training.state.checkpoint import checkpoints, runs_within, save_checkpoint
from mikernels.training.state.metrics import Clock, History, JsonLines, Means, Pace
from mikernels.training.state.snapshot import OPEN, Read, put_back, read_run, take_snapshot
from mikernels.training.steps.autograd import AutogradStep, dense_forward, sparse_forward
from mikernels.training.steps.fused import FusedStep
from mikernels.training.steps.graph import GraphedStep
from mikernels.values.batch import Batch

METRICS = "metrics.jsonl"
HOW_TO_RESUME = "make the same Trainer and call resume() before run()"


def _once(source: Any) -> TrainConfig:
    """The settings of a run over every row once."""
    rows = getattr(source, "n_rows", None)
    if rows is None:
        raise ValueError(
            f"Trainer: config must be given for a {type(source).__name__}, which does not say how "
            f"many rows it has, got none; pass TrainConfig(total_tokens=...)"
        )
    size = getattr(source, "batch_size", None)
    return TrainConfig(rows) if size is None else TrainConfig(rows, size)


class Trainer:
    """Trains a sparse autoencoder on activations.

    Args:
        sae: trained in place, on its device.
        source: gives batches; or activations `[n, d]` in memory, the path of shards, or any stream
            of tensors, such as a DataLoader (`mikernels.activations.IterableSource`).
        config: the run's settings; None: the defaults, for every row of the source once.
        step: replaces `config.step`: "fused", "autograd" or "dense".
        optimizer: of the SAE's parameters; None is the step's own Adam. Its lr is set each step.
        out_dir: for `metrics.jsonl` and `checkpoint-<step>/`; None writes nothing.
        log_to: where rows of metrics go beside `metrics.jsonl`: a TensorBoardLogger, a
            WandbLogger, or any MetricsLogger. One that fails is left out with a warning, and the
            run goes on.
        quiet: no progress on the console.

    Attributes:
        step, tokens: done so far. history: what was measured.
        config: the settings, with the learning rate that was left to the Trainer.

    Raises:
        TypeError, ValueError: for settings, SAE, source and optimiser that do not fit together.
    """

    def __init__(
        self,
        sae: SAE,
        source: BatchSource | torch.Tensor | str | Path | Iterable[Any],
        config: TrainConfig | None = None,
        *,
        step: str | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        out_dir: str | Path | None = None,
        log_to: Sequence[MetricsLogger] = (),
        quiet: bool = False,
    ):
        batches: BatchSource = as_source(source, 0 if config is None else config.seed)
        if config is None:
            config = _once(batches)
        if step is not None:
            config = TrainConfig.from_dict({**config.to_dict(), "step": step})
        check_fit(sae, batches, config)
        if hasattr(batches, "expect"):
            batches.expect(config.total_steps * config.tokens_per_step)
        if optimizer is not None:
            check_optimizer(sae, optimizer, config)
        # what was left open here, a resumed run takes from its checkpoint
        self.open = {"lr": config.lr is None}
        self.open |= {name: getattr(sae.config, name, 0) is None for name in OPEN}
        config = replace(config, lr=config.peak_lr(sae.config.n_features))
        self.sae, self.source, self.config, self.quiet = sae, batches, config, quiet
        self.log_to = checked(log_to)
        # where it is now: the process may go to another folder before it writes
        self.out_dir = None if out_dir is None else Path(out_dir).absolute()
        self._update: FusedStep | GraphedStep | AutogradStep
        if config.step == "fused":
            fused = FusedStep(sae, config, optimizer)
            self._update = GraphedStep(fused) if config.cuda_graph else fused
        else:
            forward = dense_forward if config.step == "dense" else sparse_forward
            self._update = AutogradStep(sae, config, optimizer, forward)
        self.optimizer: torch.optim.Optimizer = self._update.optimizer
        # the SAE changes only once nothing is refused any more
        sae.to(config.weights_dtype(sae.w_dec.dtype))
        if self.open["dead_after"]:
            after = max(1, min(DEAD_AFTER, config.total_tokens // 6))
            sae.config = replace(sae.config, dead_after=after)
        if self.open["threshold_rate"]:
            rate = min(1.0, max(THRESHOLD_RATE, 20 / config.total_steps))
            sae.config = replace(sae.config, threshold_rate=rate)
        self.history = History()
        self.step = self.tokens = 0
        self.means = Means()
        self._clock = Clock(self.history.parts)
        self._pace = Pace(sae.w_enc.device)
        self._saved = -1
        self._state_checked = False

    def resume(self, folder: str | Path | None = None) -> int:
        """Continue a former run: the next steps compute what an uninterrupted run would have.

        With another `total_tokens` than the former run's, its rest has the schedule of that length
        from where it is, which a message says: a run that was longer from the start computes other
        steps.

        Args:
            folder: a checkpoint; None is the newest in out_dir.

        Returns:
            The step that was reached.

        Raises:
            FileNotFoundError, ValueError: there is no checkpoint, or it is truncated, foreign or of
                another run, or has come to the end of this one; the message names the file. Nothing
                has been changed then.
            BlockingIOError: another process writes to out_dir.
        """
        read, own = self.read_checkpoint(folder)
        if read.step == self.config.total_steps:
            raise ended(self.config, read)
        self.continue_from(read, own)
        return self.step

    def read_checkpoint(self, folder: str | Path | None = None) -> tuple[Read, bool]:
        """The checkpoint that `resume` would continue, and whether it is of out_dir; see there."""
        mine = [] if self.out_dir is None else checkpoints(self.out_dir)
        if folder is None and not mine:
            names = [] if self.out_dir is None else runs_within(self.out_dir)
            within = ""
            if names:
                within = (
                    f" but with the runs {', '.join(names)} in it (resume them as they were begun, "
                    f"together, or one by its own folder)"
                )
            raise FileNotFoundError(
                f"resume: out_dir (--out) must hold a checkpoint-<step> folder, got {self.out_dir} "
                f"without one{within}; leave resume out to start a new run"
            )
        folder = mine[-1] if folder is None else Path(folder)
        if mine and mine[-1].resolve() != folder.resolve():
            raise ValueError(
                f"resume: folder must be the newest checkpoint of out_dir, {mine[-1]}, got "
                f"{folder}; remove the newer ones or choose another out_dir"
            )
        # nobody deletes it meanwhile, and no run that still goes on is resumed
        with owned(self.out_dir, "resume") if self.out_dir and mine else nullcontext():
            return read_run(self, folder), bool(mine)

    def continue_from(self, read: Read, own: bool) -> None:
        """What `read_checkpoint` gave becomes the state of this fresh Trainer."""
        put_back(self, read)
        self._saved = self.step if own else -1
        was, now = read.former, self.config
        if was.total_tokens != now.total_tokens and self.step < now.total_steps:
            with Board() as board:
                board.note(
                    f"resume: total_tokens was {was.total_tokens:,} and is {now.total_tokens:,}: "
                    f"from step {self.step:,} on the schedule is that of {now.total_steps:,} steps "
                    f"(lr {now.lr_at(self.step):.1e}, "
                    + (
                        f"where it would have been {was.lr_at(self.step):.1e})"
                        if self.step < was.total_steps
                        else f"after {was.lr_at(was.total_steps - 1):.1e} at the former end)"
                    )
                )

    def run(self, how_to_resume: str = HOW_TO_RESUME) -> History:
        """Train to `config.total_tokens`, or until the source ends, and return what was measured.

        Micro-batches left over for less than a step at the end of a source are not trained on.
        Ctrl-C and SIGTERM finish the step, write a checkpoint and then raise KeyboardInterrupt or
        SystemExit.

        Args:
            how_to_resume: what the message of an interrupt says is to be done to continue.

        Raises:
            FileExistsError: out_dir holds checkpoints and `resume` was not called.
            TypeError, ValueError: a batch of another shape, not finite, or none at all.
            FloatingPointError: the loss or the weights are not finite any more; nothing is saved.
            BlockingIOError: another process writes to out_dir.
            OSError: out_dir cannot be written, or was deleted meanwhile.
        """
        drive({self.config.step: self}, lambda failed: self._how_to_resume(how_to_resume))
        return self.history

    @property
    def planned(self) -> int:
        """Tokens that the steps so far were to take: several trainers take turns by it."""
        return self.step * self.config.tokens_per_step

    def steps(self, report: Reporter, name: str) -> Generator[None, bool, None]:
        """The run, as a generator that waits before each step; sent True, it saves and ends.

        What can be refused is refused before it waits for the first time.
        """
        total = self.config.total_steps
        with self._open() as lines, loggers(self.log_to, self._about(name)) as log:
            if self.step == 0:
                torch.manual_seed(self.config.seed)
            # the counter of a loaded SAE may be anywhere; reading it each step would stall a GPU
            self._oldest = int(self.sae.tokens_since_fired.max()) - self.tokens
            with self._scaled(), self._telling(report):
                stopped = yield
                self._mark()
                while self.step < total and not stopped:
                    if not self._train_step():
                        report.note(
                            f"Trainer: the source ended after {self.tokens:,} of "
                            f"{self.config.total_tokens:,} tokens"
                        )
                        break
                    report.step(self.step)
                    if self.step % self.config.log_every == 0 or self.step == total:
                        self._log(report, lines, log)
                    if lines is not None and not self._state_checked:
                        # an optimiser's state is there from the first step on
                        check_state(self.sae, self.optimizer, *take_snapshot(self))
                        self._state_checked = True
                    if self.step % self.config.checkpoint_every == 0:
                        self._save(lines)
                    with self._pace.away():
                        stopped = yield
                if self.means.tokens and not stopped:
                    self._log(report, lines, log)
                self._save(lines)

    def _about(self, name: str) -> RunInfo:
        sae = {"architecture": self.sae.architecture, **asdict(self.sae.config)}
        return RunInfo(
            name=name if self.out_dir is None else self.out_dir.name,
            out_dir=self.out_dir,
            step=self.step,
            settings={"sae": sae, "config": self.config.to_dict()},
        )

    def _train_step(self) -> bool:
        count = self.config.accumulation
        with self._pace.waiting():
            batches = take_batches(
                self.source, count, self.step * count + 1, self.sae, self.config.batch_size
            )
        if batches is None:
            return False
        with self._pace.training():
            self._step_on(batches)
        self.step += 1
        self.tokens += sum(map(len, batches))
        return True

    @in_own_dtype
    @torch.inference_mode(False)
    @torch.enable_grad()
    def _step_on(self, batches: list[Batch]) -> None:
        """The same step in whatever mode `run` is called; a source is called in the caller's."""
        sae, config = self.sae, self.config
        # autograd cannot keep a tensor of inference mode
        batches = [b.map(lambda t: t.clone() if t.is_inference() else t) for b in batches]
        if self.step == 0:
            if config.scale_activations:
                scale = power_of_two_scale(batches)
                sae.rescale_(scale / self.history.scale)
                self.history.scale = scale
            if any(p.requires_grad for p in sae.constrained()):
                sae.normalize_decoder_()
        if self.history.scale != 1:
            batches = [batch.scaled(self.history.scale) for batch in batches]
        if self.step == 0:
            sae.prepare_(batches[0], config.init_b_dec)
        batches = [sae.in_units(batch) for batch in batches]
        sae.sparsity_share = config.sparsity_at(self.step)
        with self._clock.step():
            set_rate(self.optimizer, config.lr_at(self.step))
            k = config.k_at(self.step, sae.k)
            self._update(batches, k, self._dead(), self.means, self._clock)

    @contextmanager
    def _scaled(self) -> Iterator[None]:
        """The SAE is one of the scaled activations within, and of the source's outside."""
        self.sae.rescale_(self.history.scale)
        try:
            yield
        finally:
            self.sae.rescale_(1 / self.history.scale)

    @contextmanager
    def _unscaled(self) -> Iterator[None]:
        self.sae.rescale_(1 / self.history.scale)
        try:
            yield
        finally:
            self.sae.rescale_(self.history.scale)

    def _dead(self) -> torch.Tensor:
        """Indices for AuxK; a GPU is synchronised only from the first step that can have any."""
        sae = self.sae
        after = sae.config.dead_after
        assert after is not None  # __init__ has seen to it
        if not sae.config.aux_coefficient or self._oldest + self.tokens < after:
            return torch.empty(0, dtype=torch.int64, device=sae.w_enc.device)
        return sae.dead().nonzero().squeeze(-1)

    @contextmanager
    def _open(self) -> Iterator[JsonLines | None]:
        """Own out_dir, and find out now what would otherwise fail at the first save."""
        if self.out_dir is None:
            yield None
            return
        check_state(self.sae, self.optimizer, *take_snapshot(self))
        with explained("Trainer", "metrics and checkpoints", self.out_dir, "choose another"):
            self.out_dir.mkdir(parents=True, exist_ok=True)
        with owned(self.out_dir, "Trainer") as folder:
            reached = self._saved if self._saved >= 0 else None
            prepare_out_dir(self.out_dir, self.sae, self.config, reached)
            with JsonLines(self.out_dir / METRICS, self.step) as lines:
                self.history.rows = lines.kept
                yield lines
                folder.check()
                lines.check()

    @contextmanager
    def _telling(self, report: Reporter) -> Iterator[None]:
        """A source that reads a model says how far it is, unless it tells somebody already."""
        source: Any = self.source
        if getattr(source, "on_progress", self) is not None:
            yield
            return
        source.on_progress = report.collecting
        try:
            yield
        finally:
            source.on_progress = None

    def _mark(self) -> None:
        self._pace.mark()
        self._since = (self._clock.total(), self.step, self.tokens)

    def _log(self, report: Reporter, lines: JsonLines | None, log: Loggers) -> None:
        busy, step, tokens = self._since
        means = self._finite_means()
        training, waiting = self._pace.read()
        row = {
            "step": self.step,
            "tokens": self.tokens,
            **means,
            "dead_fraction": self.sae.dead().double().mean().item(),
            "lr": self.config.lr_at(self.step - 1),
            "k": self.config.k_at(self.step - 1, self.sae.k),
            "tokens_per_second": (self.tokens - tokens) / training,
            "waiting_seconds": waiting,
            "step_ms": 1e3 * (self._clock.total() - busy) / max(1, self.step - step),
        }
        self.history.rows.append(row)
        report.log(row)
        if lines is not None:
            lines.write(row)
        log.write(row)
        self.means = Means()
        self._mark()

    def _finite_means(self) -> dict[str, float]:
        means = self.means.means()
        if not math.isfinite(means["loss"]):
            raise self._diverged(f"the loss must be finite, got {means['loss']}")
        return means

    def _diverged(self, what: str) -> FloatingPointError:
        former = [] if self.out_dir is None else checkpoints(self.out_dir)
        kept = f"; {former[-1]} is from before" if former else ""
        rows = self.history.rows
        first = min(rows[-1]["step"] + 1 if rows else 1, self.step)
        return FloatingPointError(
            f"Trainer: {what} in steps {first} to {self.step}; lower lr (now "
            f"{self.config.lr_at(self.step - 1):g}), set clip_norm, or look for outliers in the "
            f"activations{kept}"
        )

    def _save(self, lines: JsonLines | None) -> None:
        if self.out_dir is None or lines is None or self._saved == self.step:
            return
        if self.means.tokens:
            self._finite_means()
        for name, p in self.sae.named_parameters():
            if not bool(p.isfinite().all()):
                raise self._diverged(f"{name} must be finite, got NaN or inf")
        lines.sync()
        tensors, state = take_snapshot(self)
        with self._unscaled():
            save_checkpoint(
                self.out_dir,
                self.step,
                self.sae.state_dict(),
                tensors,
                state,
                self.config.keep_checkpoints,
            )
        self._saved = self.step

    def _how_to_resume(self, how: str) -> str:
        if self.step == self.config.total_steps:
            return f"Trainer: interrupted after step {self.step:,}, the last one; nothing is left"
        if self.out_dir is None:
            return (
                f"Trainer: interrupted after step {self.step:,}; nothing is saved without out_dir"
            )
        return (
            f"Trainer: interrupted after step {self.step:,}, saved "
            f"{checkpoints(self.out_dir)[-1]}; {how} to continue"
        )


def ended(config: TrainConfig, read: Read) -> ValueError:
    """There is nothing left to resume."""
    return ValueError(
        f"resume: total_tokens (--tokens) must be above {config.tokens_per_step * read.step:,}, "
        f"where {read.path.parent} has come to, to train on, got {config.total_tokens:,}; raise "
        f"it, or read the trained SAE with load_sae"
    )
