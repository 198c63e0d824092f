# SPDX-License-Identifier: Apache-2.0
"""Several trainers in one run, from one reading of their activations."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping

from mikernels.activations.streams import IterableSource
from mikernels.tensor_files import overlap
from mikernels.training.loop import Generators, drive
from mikernels.training.preflight import check_space, space_needed
from mikernels.training.progress import Board
from mikernels.training.shared import Shared, View
from mikernels.training.state.checkpoint import checkpoints
from mikernels.training.state.metrics import History
from mikernels.training.trainer import HOW_TO_RESUME, Trainer, ended


class TrainingFailed(RuntimeError):
    """Some trainers of a group ended in an error; the others have trained to their ends.

    Attributes:
        errors: by name.
    """

    def __init__(self, errors: Mapping[str, Exception], count: int):
        self.errors = dict(errors)
        alike: dict[str, list[str]] = {}
        for name, error in errors.items():
            alike.setdefault(f"{type(error).__name__}: {error}", []).append(name)
        said = "; ".join(f"{', '.join(names)}: {what}" for what, names in alike.items())
        done = count - len(errors)
        others = f"the other {done} are trained" if done else "none is trained to its end"
        super().__init__(f"TrainerGroup: {len(errors)} of {count} runs failed, {others}: {said}")


class TrainerGroup:
    """Trains several SAEs together: sites of a model, or settings on the same activations.

    Trainers take turns step by step. Each computes bit for bit what it computes alone on the same
    batches, and its folder is that of an ordinary run: it can be read, evaluated and resumed alone.

    Trainers that were given the same source object share it: a batch is read once for all of them.
    For several sites of a model make their sources with `ModelSource.each`, whose forward passes
    are shared; settings and sites can be mixed.

    An error ends the trainer that it comes from (a loss that is not finite, a folder that cannot be
    written), and no other: those go on to their ends, and `run` raises at the end. A full disk ends
    each at its next checkpoint; the former ones are intact. Ctrl-C and SIGTERM save all.

    Args:
        trainers: new ones, by name. They belong to the group from now on.

    Attributes:
        trainers: by name.

    Raises:
        TypeError, ValueError: no trainer, one that has trained or resumed already, or two with
            one weight or out_dir, or with one source and several batch sizes.

    Example:
        >>> source = TensorSource(torch.randn(256, 8))
        >>> config = TrainConfig(total_tokens=256, batch_size=64)
        >>> trainers = {
        ...     f"k{k}": Trainer(TopKSAE(8, 32, k), source, config, out_dir=f"out/k{k}", quiet=True)
        ...     for k in (2, 4)
        ... }
        >>> histories = TrainerGroup(trainers).run()
        >>> [history.column("k") for history in histories.values()]
        [[2], [4]]
    """

    def __init__(self, trainers: Mapping[str, Trainer]):
        if not isinstance(trainers, Mapping) or not all(isinstance(n, str) for n in trainers):
            raise TypeError(
                f"TrainerGroup: trainers must be a dict of Trainers by name, got "
                f"{type(trainers).__name__}; pass e.g. {{'k16': Trainer(...), 'k32': ...}}"
            )
        self.trainers = dict(trainers)
        _check_apart(self.trainers)
        # the caller's, from which each begins as it would alone
        self._generators = Generators(self.trainers)
        times = Counter(id(t.source) for t in self.trainers.values())
        shared: dict[int, Shared] = {}
        for trainer in self.trainers.values():
            own = id(trainer.source)
            if times[own] > 1:
                if own not in shared:
                    shared[own] = Shared(trainer.source)
                trainer.source = shared[own].view()

    def resume(self) -> dict[str, int]:
        """Continue a former run of the group, or of any of its members; see `Trainer.resume`.

        Each goes on from the newest checkpoint of its own out_dir, one without any from the start.
        Where these are at different steps (a crash between two saves, a member that is new), those
        behind go first, until all are together.

        Returns:
            The steps that were reached, by name.

        Raises:
            FileNotFoundError, ValueError: no member has a checkpoint, all have come to their end,
                or one is truncated, foreign or of another run. Nothing has been changed then,
                unless a source refuses its position.
        """
        members = self.trainers
        found = {n: t for n, t in members.items() if t.out_dir and checkpoints(t.out_dir)}
        if not found:
            folders = ", ".join(str(t.out_dir) for t in members.values())
            raise FileNotFoundError(
                f"resume: an out_dir of the group must hold a checkpoint-<step> folder, got none "
                f"in {folders}; leave resume out to start new runs"
            )
        read = {name: trainer.read_checkpoint() for name, trainer in found.items()}
        if read.keys() == members.keys() and all(
            one.step == members[name].config.total_steps for name, (one, _) in read.items()
        ):
            raise ended(
                *max(
                    ((members[name].config, one) for name, (one, _) in read.items()),
                    key=lambda pair: pair[0].tokens_per_step * pair[1].step,
                )
            )
        for name, (one, own) in read.items():
            with self._generators.of(name):
                members[name].continue_from(one, own)
        steps = {name: trainer.step for name, trainer in members.items()}
        furthest = max(trainer.planned for trainer in members.values())
        # one at its end waits for nobody
        behind = [
            f"{name} (from step {t.step:,})"
            for name, t in members.items()
            if t.planned < min(furthest, t.config.total_tokens)
        ]
        if behind:
            with Board() as board:
                board.note(
                    f"TrainerGroup: {', '.join(behind)} must catch up and go first; the others are "
                    f"at step {max(steps.values()):,}"
                )
        return steps

    def run(self, how_to_resume: str = "") -> dict[str, History]:
        """Train all to their ends, and return what was measured, by name.

        Raises:
            TrainingFailed: some ended in an error, after the others have trained.
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM; all are saved.
            Exception: what a Trainer refuses before its first step; nothing has been trained then.
        """
        how = how_to_resume or HOW_TO_RESUME.replace("Trainer", "TrainerGroup")
        places = [
            (t.out_dir, space_needed(t.out_dir, t.sae, t.config))
            for t in self.trainers.values()
            if t.out_dir
        ]
        check_space(places)
        errors = drive(
            self.trainers,
            lambda failed: self._how_to_resume(how, failed),
            self._generators,
            self._ended,
        )
        if errors:
            first = next(iter(errors.values()))
            raise TrainingFailed(errors, len(self.trainers)) from first
        return {name: trainer.history for name, trainer in self.trainers.items()}

    def _ended(self, name: str) -> None:
        source = self.trainers[name].source
        if isinstance(source, View):
            source.leave()

    def _how_to_resume(self, how: str, failed: Collection[str]) -> str:
        saved = {name: t for name, t in self.trainers.items() if name not in failed}
        at = ", ".join(f"{name} at step {t.step:,}" for name, t in saved.items())
        if all(t.out_dir is None for t in self.trainers.values()):
            return f"TrainerGroup: interrupted, {at}; nothing is saved without out_dir"
        return f"TrainerGroup: interrupted and saved, {at}; {how} to continue"


def _check_apart(trainers: Mapping[str, Trainer]) -> None:
    """Trainers that can take turns, or a TypeError or ValueError."""
    if not trainers:
        raise ValueError("TrainerGroup: trainers must be at least one Trainer, got none")
    for name, trainer in trainers.items():
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"TrainerGroup: trainers must be Trainers, got {type(trainer).__name__} as {name!r}"
            )
        if trainer.step or trainer.history.rows or isinstance(trainer.source, View):
            raise ValueError(
                f"TrainerGroup: trainers must be new, got {name!r}, which has trained, was resumed "
                f"or is in another group; make it anew, and call resume() of the group to continue"
            )
    # Trainers that were given one generator have made a source each, which would share it out
    streams = Counter(
        id(source.stream)
        for source in {id(t.source): t.source for t in trainers.values()}.values()
        if isinstance(source, IterableSource) and iter(source.stream) is source.stream
    )
    if streams and streams.most_common(1)[0][1] > 1:
        raise ValueError(
            "TrainerGroup: trainers of one iterator must have one source, got a source each, which "
            "would take each other's batches; make source = IterableSource(iterator) once and give "
            "it to each"
        )
    sizes: dict[int, set[int]] = {}
    for trainer in trainers.values():
        sizes.setdefault(id(trainer.source), set()).add(trainer.config.batch_size)
    if several := next((found for found in sizes.values() if len(found) > 1), None):
        raise ValueError(
            f"TrainerGroup: trainers of one source must have one batch_size, got "
            f"{sorted(several)}; give each size a source of its own"
        )
    weights = {
        f"{name}: {own}": p
        for name, trainer in trainers.items()
        for own, p in trainer.sae.named_parameters()
    }
    if tied := overlap(weights):
        raise ValueError(
            f"TrainerGroup: trainers must have weights of their own, got {tied[0]} and {tied[1]} "
            f"in one memory; make an SAE for each"
        )
    folders = Counter(os.path.realpath(t.out_dir) for t in trainers.values() if t.out_dir)
    if folders and (most := folders.most_common(1)[0])[1] > 1:
        raise ValueError(
            f"TrainerGroup: trainers must have an out_dir each, got {most[0]} for {most[1]} of "
            f"them; give each its own"
        )
