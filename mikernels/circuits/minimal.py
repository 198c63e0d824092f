# SPDX-License-Identifier: Apache-2.0
"""The smallest circuit that keeps a part tau of a behaviour, and models in the order of it.

Of a ranking, with f the faithfulness of its k best edges (`mikernels.circuits.faithfulness`),

    k* = the least k with f(k) >= tau whose larger sizes that were looked at all have f >= tau too

f need not grow with k: an edge may work against the behaviour, or only beside another. So sizes all
over the range are looked at first, the last of them below tau is where the search begins, and it
ends with f(k* - 1) < tau. Then the widest gaps above k* are halved once more; a size there below
tau is where it begins again. That all sizes above k* reach tau would take a run for each: what was
looked at is in the result.

How few edges a behaviour needs is how simple the model's way to it is: of several models, that
with the smallest fraction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from mikernels.circuits.circuit import Circuit, Selection
from mikernels.circuits.faithfulness import (
    MIB,
    check_model,
    faithfulness,
    read_circuits,
    size_of,
)
from mikernels.circuits.find import find_circuit
from mikernels.circuits.patching import Patcher
from mikernels.circuits.prompts import Inputs
from mikernels.circuits.tables import Columns
from mikernels.circuits.targets import Target
from mikernels.circuits.tasks import Task
from mikernels.values.intervals import Interval, bootstrap

NAME = "minimal_circuit"
# sizes that one round looks at: more end the search in fewer rounds, but with more runs
AT_ONCE = 3


@dataclass(frozen=True, eq=False)
class Minimal:
    """The smallest circuit that keeps tau of a behaviour. Prints its size.

    Attributes:
        selection: the edges or nodes that are kept. size: k*. of: of so many.
        tau: as asked. faithfulness: f(k*), with its 95 % interval over prompts.
        method, label: of the circuit. clean, empty: `[B]`, the numbers of the prompts in the whole
            model, and with everything cut.
        curve: every size that was looked at, ascending, with its f.
    """

    selection: Selection
    size: int
    of: int
    tau: float
    faithfulness: Interval
    method: str
    label: str
    clean: torch.Tensor
    empty: torch.Tensor
    curve: tuple[tuple[int, float], ...]

    @property
    def fraction(self) -> float:
        return self.size / self.of

    @property
    def earlier(self) -> tuple[int, ...]:
        """Smaller sizes that reach tau as well, but not all between them and k*: the curve is not
        monotonic there."""
        return tuple(size for size, f in self.curve if f >= self.tau and size < self.size)

    def __str__(self) -> str:
        text = (
            f"{self.method}: {self.size:,} of {self.of:,} {self.selection.level}s "
            f"({self.fraction:.2%}) keep {self.faithfulness} of {self.label}, tau = {self.tau:g}"
        )
        if self.earlier:
            text += (
                f"; so do {', '.join(f'{size:,}' for size in self.earlier)}, but not all between"
            )
        return text


class _Search:
    """The sizes that were looked at."""

    def __init__(self, n: int, tau: float, look: Callable[[list[int]], None]):
        self.n, self.tau, self.look = n, tau, look
        self.seen: dict[int, float] = {0: 0.0, n: 1.0}

    def add(self, sizes: list[int]) -> None:
        if new := sorted(set(sizes) - self.seen.keys()):
            self.look(new)

    def _bracket(self) -> tuple[int, int]:
        """The largest size below tau, and the next one."""
        sizes = sorted(self.seen)
        low = max(size for size in sizes if self.seen[size] < self.tau)
        return low, min(size for size in sizes if size > low)

    def run(self, first: list[int]) -> int:
        self.add(first)
        while True:
            low, high = self._bracket()
            if high - low > 1:
                self.add(_between(low, high, AT_ONCE))
                continue
            before = len(self.seen)
            self.add(self._gaps(high))
            if len(self.seen) == before or self._bracket() == (low, high):
                return high

    def _gaps(self, start: int) -> list[int]:
        """In the middle of the widest gaps above."""
        sizes = [size for size in sorted(self.seen) if size >= start]
        gaps = sorted(zip(sizes, sizes[1:], strict=False), key=lambda gap: gap[0] / gap[1])
        return [size for low, high in gaps[:AT_ONCE] for size in _between(low, high, 1)]


def _between(low: int, high: int, n: int) -> list[int]:
    """At most n sizes inside, by equal factors where the ends are far apart, else equal steps."""
    spread = np.geomspace if high > 4 * max(low, 1) else np.linspace
    inside = {int(size) for size in spread(max(low, 1), high, n + 2)[1:-1].round()}
    return sorted(size for size in inside if low < size < high) or (
        [low + 1] if high - low > 1 else []
    )


def minimal_circuit(
    model: torch.nn.Module,
    clean: Inputs,
    corrupted: Inputs | None,
    metric: Target | None,
    circuit: Circuit,
    tau: float = 0.85,
    *,
    tokenizer: Any = None,
    how: str = "top",
    absolute: bool = True,
    ablation: str = "counterfactual",
    batch: int | None = None,
) -> Minimal:
    """The smallest circuit of a ranking that keeps a part of the behaviour (see above).

    Args:
        model, clean, corrupted, metric, tokenizer, how, ablation, batch: as for
            `faithfulness_curve`.
        circuit: whose scores rank the edges or nodes.
        tau: the part that it must keep, in (0, 1].
        absolute: by the sizes of scores: what works against the behaviour is in the model too.

    Returns:
        Minimal: prints its size.

    Raises:
        TypeError, ValueError: another tau; as `faithfulness_curve`.

    Example:
        >>> task = circuits.tasks.ioi(tokenizer, 4)
        >>> question = task.inputs, task.counterfactual_inputs, task.target
        >>> found = circuits.find_circuit(model, *question)
        >>> print(circuits.minimal_circuit(model, *question, found, tau=0.85))
        gim: ... of 190 edges (...) keep ... of logit difference of a pair per prompt, tau = 0.85...
    """
    (circuit,) = read_circuits(NAME, [circuit])
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 < tau <= 1:
        raise ValueError(
            f"{NAME}: tau must be above 0 and at most 1, the whole model's, got {tau!r}"
        )
    patcher = Patcher(
        NAME, model, clean, corrupted, metric, circuit.level,
        tokenizer=tokenizer, ablation=ablation, batch=batch,
    )  # fmt: skip
    check_model(NAME, circuit, patcher)
    n = size_of(circuit)
    values: dict[int, torch.Tensor] = {}
    ends: list[torch.Tensor] = []

    def select(size: int) -> Selection:
        return circuit.select(size, how=how, absolute=absolute)

    def units(size: int) -> np.ndarray:
        return torch.stack([*ends, values[size]], 1).numpy()

    def look(sizes: list[int]) -> None:
        found = patcher.measure([select(size).mask for size in sizes])
        ends[:] = [found.clean, found.empty]
        values.update(zip(sizes, found.values, strict=True))
        search.seen |= {size: float(faithfulness(units(size))[0]) for size in sizes}

    search = _Search(n, tau, look)
    size = search.run([int(x * n) for x in MIB] if n > 1 else [])
    if size not in values:
        look([size])
    interval = bootstrap(lambda u: faithfulness(u)[..., 0], units(size))
    return Minimal(
        select(size), size, n, tau, interval, circuit.method, patcher.label, ends[0],
        ends[1], tuple(sorted(search.seen.items())),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Ranking:
    """Models, the one with the smallest fraction of its edges first. Prints as a table.

    Attributes:
        label: of the task. rows: of each model its name and its circuit.
    """

    label: str
    rows: tuple[tuple[str, Minimal], ...]

    def _table(self) -> Columns:
        head = ("", "model", "kept", "of", "fraction", "faithfulness", "of the whole model's")
        cells = [
            (
                str(i), name, f"{found.size:,}", f"{found.of:,}", f"{found.fraction:.2%}",
                str(found.faithfulness), f"{found.clean.mean():.3f}",
            )
            for i, (name, found) in enumerate(self.rows, 1)
        ]  # fmt: skip
        return Columns(self.label, head, cells, (1,))

    def __str__(self) -> str:
        return str(self._table())

    def __rich__(self) -> Table:
        return self._table().__rich__()


def rank_models(
    models: Mapping[str, Any],
    task: Task | Callable[[Any], Task],
    tau: float = 0.85,
    *,
    method: str = "gim",
    level: str | None = None,
    how: str = "top",
    absolute: bool = True,
    ablation: str = "counterfactual",
    batch: int | None = None,
) -> Ranking:
    """Order models by how small a part of them a behaviour needs: `find_circuit` in each, and its
    `minimal_circuit`.

    Args:
        models: name -> model, or (model, tokenizer).
        task: prompts, their counterfactuals and answers, for all models; or what makes them of a
            model's tokenizer, such as `tasks.ioi`.
        tau: the part of the behaviour that each must keep.
        method, level: of `find_circuit`. how, absolute, ablation, batch: of `minimal_circuit`.

    Returns:
        Ranking: prints as a table.

    Raises:
        TypeError, ValueError: for other arguments, before any model runs; as the functions above.

    Example:
        >>> task = circuits.tasks.ioi(tokenizer, 4)
        >>> found = circuits.rank_models({"a": model}, task, method="eap")
        >>> len(found.rows)
        1
    """
    where = "rank_models"
    if not isinstance(models, Mapping) or not models:
        raise TypeError(
            f"{where}: models must be a dict of names and models, or of pairs (model, tokenizer), "
            f"got {type(models).__name__}"
        )
    pairs = {
        name: given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        for name, given in models.items()
    }
    prepared: dict[str, Task] = {}
    for name, (_, tokenizer) in pairs.items():
        if isinstance(task, Task):
            prepared[name] = task
        elif callable(task) and tokenizer is not None:
            prepared[name] = task(tokenizer)
        else:
            raise TypeError(
                f"{where}: task must be a Task, or make one of a tokenizer, got "
                f"{type(task).__name__} for {name!r}, which has "
                f"{'none' if tokenizer is None else 'one'}; give models as (model, tokenizer)"
            )
    found = []
    for name, (model, _) in pairs.items():
        one = prepared[name]
        given = model, one.inputs, one.counterfactual_inputs, one.target
        circuit = find_circuit(*given, method, level=level, replicates=0)
        least = minimal_circuit(
            *given, circuit, tau, how=how, absolute=absolute, ablation=ablation, batch=batch
        )
        found.append((name, least))
    title = (
        f"{next(iter(prepared.values())).name}: edges or nodes that keep {tau:g} of it, {method}"
    )
    return Ranking(title, tuple(sorted(found, key=lambda row: row[1].fraction)))
