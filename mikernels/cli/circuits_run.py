# SPDX-License-Identifier: Apache-2.0
"""What `mikernels circuits` does with a model in memory: find, print, write the page."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from mikernels.circuits import Circuit, Curve, Probe
    from mikernels.circuits.ranking import Ranked

# heads whose attention is shown, and prompts whose tokens are
HEADS, SHOWN = 6, 8
# edges that are printed
PRINTED = 10
# methods without a counterfactual -> the rules of their gradients
ALONE = {"gim": "gim", "eap": "plain"}


@dataclass(frozen=True)
class Question:
    """What the model is asked.

    Attributes:
        prompts, counterfactuals: as text, to be shown.
        clean, corrupted: the same in a form of `mikernels.circuits.prompts`; corrupted None without
            counterfactuals.
        target: of `mikernels.circuits.targets`, one for each prompt; None: what is predicted.
    """

    prompts: list[str]
    counterfactuals: list[str]
    clean: Any
    corrupted: Any
    target: Any

    def first(self, n: int) -> Question:
        """Some of it."""

        def cut(given: Any) -> Any:
            if isinstance(given, dict):
                return {name: value[:n] for name, value in given.items()}
            return given[:n] if isinstance(given, list) else given

        return Question(
            self.prompts[:n],
            self.counterfactuals[:n],
            cut(self.clean),
            cut(self.corrupted),
            cut(self.target),
        )


def _command() -> str:
    return shlex.join(["mikernels", *sys.argv[1:]])


@dataclass(frozen=True)
class Run:
    """One call of the command, with a model in memory."""

    model: torch.nn.Module
    tokenizer: Any
    asked: Question
    k: int
    console: Console
    title: str

    def alone(
        self, method: str, batch_size: int | None, out: Path, known: dict[str, str]
    ) -> dict[str, Any]:
        """Heads and MLPs by activation times gradient: without a counterfactual no edges."""
        from mikernels.circuits import gim_probe

        with self.console.status(f"{method}: one forward and backward pass a prompt"):
            probe = gim_probe(
                self.model,
                self.asked.clean,
                self.asked.target,
                self.k,
                tokenizer=self.tokenizer,
                rules=ALONE[method],
                batch_size=batch_size or 16,
            )
        self.console.print(probe)
        self.console.print(
            "scores are activation times gradient; edges, and faithfulness, need --counterfactual",
            style="dim",
        )
        names = [c.name for c in probe.components if c.head is not None]
        probe.to_html(
            out,
            title=self.title,
            tokens=self.tokens(ALONE[method]),
            patterns=self.patterns(names),
            known=known | {"scores": "activation times gradient; edges need --counterfactual"},
            command=_command(),
        )
        return _probe_json(probe)

    def compared(
        self,
        methods: list[str],
        level: str | None,
        edges: int,
        curve: bool,
        batch_size: int | None,
        seed: int,
        out: Path,
        known: dict[str, str],
    ) -> dict[str, Any]:
        """The circuit, by each method."""
        from mikernels.circuits import find_circuit, write_report
        from mikernels.circuits.report.graph import components

        found = []
        for name in methods:
            with self.console.status(f"{name}: {len(self.asked.prompts)} prompts"):
                found.append(
                    find_circuit(
                        self.model,
                        self.asked.clean,
                        self.asked.corrupted,
                        self.asked.target,
                        name,
                        level=level,
                        tokenizer=self.tokenizer,
                        batch=batch_size,
                        seed=seed,
                    )
                )
        first = found[0]
        _print(self.console, first, self.k)
        by_score, by_size = self.curves(found, seed) if curve else ([], [])
        if by_score:
            _print_curves(self.console, by_score, by_size)
        names = [name for name, _, _ in components(first, self.k) if ".h" in name]
        write_report(
            found,
            out,
            title=self.title,
            k=self.k,
            edges=edges,
            tokens=self.tokens("gim" if first.method == "gim" else None),
            patterns=self.patterns(names),
            curves=by_score,
            curves_by_size=by_size,
            known=known,
            command=_command(),
        )
        return {
            "circuits": [_circuit_json(c, self.k, edges) for c in found],
            "curves": [c.to_dict() for c in by_score],
            "curves_by_size": [c.to_dict() for c in by_size],
        }

    def curves(self, found: list[Circuit], seed: int) -> tuple[list[Curve], list[Curve]]:
        """By score and by size of score, of each circuit and of one drawn at random."""
        from mikernels.circuits import faithfulness_curve, random_circuit

        def run(some: list[Circuit], absolute: bool) -> list[Curve]:
            return faithfulness_curve(
                self.model,
                self.asked.clean,
                self.asked.corrupted,
                self.asked.target,
                some,
                tokenizer=self.tokenizer,
                absolute=absolute,
            )

        chance = random_circuit(found[0].graph, found[0].level, seed)
        with self.console.status(f"faithfulness of {len(found) + 1} circuits at ten sizes"):
            by_score = run([*found, chance], False)
            by_size = run(found, True)
        # what is drawn is as random by size
        by_size.append(by_score[-1])
        return by_score, by_size

    def tokens(self, rules: str | None) -> Any:
        """What the first prompts' tokens add, over a space where the tokeniser has it as one."""
        from mikernels.circuits import attribute

        some = self.asked.first(SHOWN)
        space = self.tokenizer(" ", add_special_tokens=False)["input_ids"]
        return attribute(
            self.model,
            some.clean,
            some.target,
            tokenizer=self.tokenizer,
            baseline=None if len(space) == 1 else "zero",
            rules=rules,
        )

    def patterns(self, names: list[str]) -> Any:
        """Of the strongest heads, on the first prompt."""
        from mikernels.circuits import attention_patterns

        if not names:
            return None
        first = self.asked.first(1).clean
        return attention_patterns(self.model, first, names[:HEADS], tokenizer=self.tokenizer)


def _print(console: Console, found: Circuit, k: int) -> None:
    from mikernels.circuits.report.graph import components, strongest
    from mikernels.circuits.tables import Columns

    clean, other = (x.double().mean() for x in (found.values, found.counterfactual_values))
    several = len(found.replicates) > 0
    of = f"mean of {len(found.values)} prompts" if several else "1 prompt"
    console.print(
        f"{found.label}: {clean:.3f} ({of}), {other:.3f} with the counterfactual", highlight=False
    )
    tables = {"components": components(found, k)}
    if found.level == "edge":
        tables["edges"] = strongest(found, PRINTED)
    for title, rows in tables.items():
        head: tuple[str, ...] = ("", "score")
        cells: list[tuple[str, ...]] = [(row.name, f"{row.score.value:+.4f}") for row in rows]
        if several:
            head += ("95 % interval", f"in top {len(rows)}")
            sure = (
                (f"[{row.score.low:+.4f}, {row.score.high:+.4f}]", f"{row.inclusion:.0%}")
                for row in rows
            )
            cells = [a + b for a, b in zip(cells, sure, strict=True)]
        console.print(Columns(f"Strongest {title}, by {found.method}", head, cells, (0,), 1))


def _print_curves(console: Console, by_score: list[Curve], by_size: list[Curve]) -> None:
    from mikernels.circuits.report.circuits import ENOUGH
    from mikernels.circuits.tables import Columns

    rows = []
    for one, other in zip(by_score, by_size, strict=True):
        least = one.smallest(ENOUGH)
        enough = "–" if least is None else f"{least:,}"
        rows.append((one.method, str(one.cpr), str(other.cmd), enough))
    head = ("", "CPR", "CMD", f"{by_score[0].level}s for {ENOUGH:.0%}")
    console.print(Columns("Faithfulness", head, rows))


def _rows_json(rows: list[Ranked]) -> list[dict[str, Any]]:
    return [
        {"name": name, "score": score.to_dict(), "in_top": share} for name, score, share in rows
    ]


def _circuit_json(found: Circuit, k: int, edges: int) -> dict[str, Any]:
    from mikernels.circuits.report.graph import components, strongest

    return {
        "method": found.method,
        "level": found.level,
        "label": found.label,
        "values": found.values.tolist(),
        "counterfactual_values": found.counterfactual_values.tolist(),
        "components": _rows_json(components(found, k)),
        "edges": _rows_json(strongest(found, edges)) if found.level == "edge" else None,
    }


def _probe_json(probe: Probe) -> dict[str, Any]:
    from mikernels.circuits.ranking import Ranked

    rows = [Ranked(c.name, c.score, c.stability) for c in probe.components]
    return {
        "label": probe.label,
        "values": probe.values.tolist(),
        "components": _rows_json(rows),
        "tokens": [[list(one) for one in row] for row in probe.positions],
    }
