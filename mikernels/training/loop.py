# SPDX-License-Identifier: Apache-2.0
"""The loop of one trainer, or of several that take turns step by step.

Who has taken the fewest tokens goes next, so several stay together, and one that a resumed set has
left behind catches up first. Ctrl-C and SIGTERM wait until those whose turn it was have taken their
step; then all are saved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Protocol

import torch

from mikernels.training.config import TrainConfig
from mikernels.training.interrupts import Interrupts
from mikernels.training.progress import Board, Reporter


class Driven(Protocol):
    """A Trainer, as the loop sees it."""

    config: TrainConfig
    step: int
    quiet: bool

    @property
    def planned(self) -> int: ...

    def steps(self, report: Reporter, name: str) -> Generator[None, bool, None]: ...


class Generators:
    """torch's global generator as each trainer of a group has it, where it runs alone.

    Args:
        names: of the trainers; they begin with the generator as it is.
    """

    def __init__(self, names: Mapping[str, object]):
        self.states = dict.fromkeys(names, torch.get_rng_state())

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        former = torch.get_rng_state()
        torch.set_rng_state(self.states[name])
        try:
            yield
        finally:
            self.states[name] = torch.get_rng_state()
            torch.set_rng_state(former)


def drive(
    trainers: Mapping[str, Driven],
    advice: Callable[[Collection[str]], str],
    generators: Generators | None = None,
    ended: Callable[[str], None] = lambda name: None,
) -> dict[str, Exception]:
    """Run trainers to their ends.

    Args:
        advice: what to say once all are saved after an interrupt, but for those that failed.
        generators: those of a group. Of a group, an error ends the trainer that it comes from, not
            the others. None: of one trainer, whose errors are raised.
        ended: called with the name of each trainer that takes no more steps.

    Returns:
        The errors that ended trainers of a group, by name.

    Raises:
        Exception: what a trainer refuses before the first step of any; then none has begun.
    """
    errors: dict[str, Exception] = {}
    running: dict[str, Generator[None, bool, None]] = {}
    with Board() as board:
        reports = {
            name: board.reporter(
                t.config.total_steps, t.step, name, quiet=t.quiet, named=generators is not None
            )
            for name, t in trainers.items()
        }

        def go(name: str, stop: bool) -> None:
            with nullcontext() if generators is None else generators.of(name):
                try:
                    running[name].send(stop)
                    return
                except StopIteration:
                    pass
                except Exception as error:
                    if generators is None:
                        raise
                    errors[name] = error
                    reports[name].note(f"TrainerGroup: {name} ends here: {error}")
                del running[name]
                ended(name)

        with ExitStack() as opened:
            for name, trainer in trainers.items():
                with nullcontext() if generators is None else generators.of(name):
                    running[name] = trainer.steps(reports[name], name)
                    # what has not ended by then lets go of its folder; of no effect else
                    opened.callback(running[name].close)
                    next(running[name])
            with Interrupts() as interrupts:
                while running:
                    least = min(trainers[name].planned for name in running)
                    for name in [name for name in running if trainers[name].planned == least]:
                        go(name, False)
                    if interrupts.pending is not None:
                        break
                if interrupts.pending is not None:
                    for name in list(running):
                        go(name, True)
                    board.note(advice(errors))
                    interrupts.stop()
    return errors
