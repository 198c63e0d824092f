# SPDX-License-Identifier: Apache-2.0
"""`mikernels rate`: what people make of features and components, and how far they agree."""

from __future__ import annotations

import getpass
import importlib.util
import webbrowser
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mikernels.cli.figures import Json, check_json, write_figures
from mikernels.cli.inputs import (
    Activations,
    Context,
    Field,
    GGUFFile,
    Inputs,
    Layer,
    Model,
    OwnPlace,
    Skip,
    SkipFirst,
    Texts,
    Tokens,
    activations_of,
    read_inputs,
)
from mikernels.cli.judged import load_any
from mikernels.cli.options import ACTIVATIONS, device_of, option

if TYPE_CHECKING:
    from rich.console import Console

    from mikernels.nn import SAE
    from mikernels.rate.items import Plan
    from mikernels.rate.report import Report
    from mikernels.schema import RatedItems

ITEMS, SESSION = "Items (made once; the same for all raters)", "Session"


def rate(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a training run, a checkpoint or an SAE of SAELens; or a JSON file of "
            "mikernels.rate.save_evidence."
        ),
    ],
    rater: Annotated[
        str | None, option("Who rates; the name of the results.", SESSION, show_default="your user")
    ] = None,
    report: Annotated[
        bool, option("Print what all raters found, and write report.json.", SESSION, "--report")
    ] = False,
    port: Annotated[int, option("Of the page.", SESSION, show_default="any free one")] = 0,
    open_page: Annotated[
        bool, option("Open the page in your browser.", SESSION, "--open/--no-open")
    ] = True,
    activations: Activations = None,
    model: Model = None,
    gguf_file: GGUFFile = None,
    layer: Layer = None,
    site: OwnPlace = None,
    text: Texts = None,
    field: Field = "text",
    context: Context = 256,
    skip_first: SkipFirst = 1,
    skip: Skip = 0,
    tokens: Tokens = None,
    k: Annotated[
        float | None,
        option("Of a BatchTopK SAE from SAELens, which does not keep it.", ACTIVATIONS),
    ] = None,
    device: Annotated[
        str | None,
        option("cpu, cuda or cuda:N.", ACTIVATIONS, show_default="cuda where there is one"),
    ] = None,
    features: Annotated[int, option("Features or components that are rated.", ITEMS)] = 12,
    controls: Annotated[int, option("Items whose evidence is wrong.", ITEMS)] = 4,
    repeats: Annotated[int, option("Of the features, how many come twice.", ITEMS)] = 2,
    game: Annotated[
        str | None,
        option(
            "detection (where is it active?) or fuzzing (are the right tokens shaded?).",
            ITEMS,
            show_default="detection; fuzzing of components",
        ),
    ] = None,
    examples: Annotated[int, option("Texts of evidence.", ITEMS)] = 6,
    questions: Annotated[int, option("Texts to judge; half of them are right.", ITEMS)] = 10,
    seed: Annotated[int, option("Of all that is drawn.", ITEMS)] = 0,
    json_file: Json = None,
) -> None:
    """Rate features or components by hand: see evidence, guess where they are active, judge them.

    --layer and --site are those that the run was trained on, where it says so. Serves a page on
    this machine alone. Some items are controls, whose evidence is wrong, and some
    come twice; nothing says which. Every answer is saved in RUN/rate/RATER.json, and an interrupted
    session goes on where it was. Other raters get the same items in another order.

    Examples:

        mikernels rate out/sae --model ~/models/gpt2 --text unseen.txt

        mikernels rate out/sae --rater ada --no-open

        mikernels rate out/demo/smollm2/fused

        mikernels rate probe.json --features 6 --controls 2

        mikernels rate out/sae --report
    """
    from rich.console import Console

    from mikernels.rate import items as rated

    console = Console()
    if not run.exists():
        raise FileNotFoundError(f"rate: RUN must be a folder or a JSON file, got {run}")
    folder = run / rated.FOLDER if run.is_dir() else run.with_name(f"{run.stem}-{rated.FOLDER}")
    if json_file is not None and not report:
        raise ValueError("rate: --json must go with --report, got it alone; add --report")
    check_json("rate", json_file)
    if report:
        write_figures("rate", json_file, _report(folder, console))
        return
    if importlib.util.find_spec("flask") is None:
        raise ModuleNotFoundError("rate: flask must be installed; `pip install 'mikernels[rate]'`")
    from mikernels.files import explained
    from mikernels.owning import owned
    from mikernels.rate.session import ratings_path

    name = rater or getpass.getuser()
    ratings_path(folder, name)  # what is no name is refused before the model runs
    games = ("detection", "fuzzing") if run.is_dir() else ("fuzzing",)
    if (game := game or games[0]) not in games:
        kind = "features" if run.is_dir() else "components"
        raise ValueError(f"rate: --game must be {' or '.join(games)} for {kind}, got {game!r}")
    plan = rated.Plan(features, controls, repeats, examples, questions, seed)
    with explained("rate", "ratings", folder, "choose a RUN that can be written"):
        folder.mkdir(exist_ok=True)
    path = folder / rated.ITEMS
    if path.exists() and (model or text or activations):
        raise ValueError(
            f"rate: {path} must be absent to make items, got --model, --text or --activations "
            f"beside it; leave them out to rate those items, or delete {folder} with all ratings"
        )
    if not path.exists():
        with owned(folder, "rate"):
            if run.is_dir():
                sae = load_any(run, k, "rate").to(device_of("rate", device)).eval()
                if not activations and model is None:
                    activations = activations_of(run)
                inputs = read_inputs(
                    "rate",
                    activations=activations,
                    model=model,
                    gguf_file=gguf_file,
                    layers=None if layer is None else [layer],
                    run=run,
                    site=site,
                    text=text,
                    field=field,
                    context=context,
                    skip_first=skip_first,
                    skip=skip,
                    tokens=tokens,
                )
                made = _feature_items(run, sae, inputs, plan, game)
            else:
                made = _component_items(run, plan, game)
            rated.save_items(folder, made)
        console.print(f"items: {path}", highlight=False)
    with owned(folder, "rate", f".{name}.lock"):
        _serve(folder, name, port, open_page, console)


def _serve(folder: Path, rater: str, port: int, open_page: bool, console: Console) -> None:
    from mikernels.rate.server import serve
    from mikernels.rate.session import Session

    session = Session(folder, rater)
    say = f"`mikernels rate RUN --report` says what was found; ratings: {session.path}"
    if session.current is None:
        console.print(f"{rater} has rated all items; {say}", highlight=False)
        return

    def ready(address: str) -> None:
        left = sum(not turn.finished for turn in session.ratings.turns)
        console.print(f"{left} items to rate as {rater}: [link={address}]{address}[/]\nCtrl-C ends")
        if open_page:
            webbrowser.open(address)

    def ended() -> None:
        console.print("all items are rated; Ctrl-C ends")

    serve(session, port, ready, ended)
    done = sum(bool(turn.finished) for turn in session.ratings.turns)
    console.print(f"\n{done} of {len(session.ratings.turns)} items rated; {say}", highlight=False)


def _feature_items(run: Path, sae: SAE, inputs: Inputs, plan: Plan, game: str) -> RatedItems:
    from mikernels.evaluate.firing import encode_all
    from mikernels.rate.features import FeatureMaterials
    from mikernels.rate.items import compose

    rows, pieces, source = inputs.rows(sae)
    firing = encode_all(sae, rows["activations"].to(sae.w_enc.device).float())
    materials = FeatureMaterials(firing, rows, pieces, plan, game)
    found = list(islice(materials, plan.materials))
    source |= {"sae": str(run), "drawn": materials.drawn, "usable": len(found)}
    return compose("feature", game, found, plan, source)


def _component_items(path: Path, plan: Plan, game: str) -> RatedItems:
    from mikernels.rate.components import component_materials, load_evidence
    from mikernels.rate.items import compose

    evidence = load_evidence(path)
    source = {"evidence": str(path), "label": evidence.label}
    return compose("component", game, component_materials(evidence, plan), plan, source)


def _report(folder: Path, console: Console) -> dict[str, Any]:
    from mikernels.files import explained, finite, write_json
    from mikernels.rate.report import REPORT, read, report

    found = report(*read(folder))
    _print(console, found)
    path = folder / REPORT
    with explained("rate", "the report", path, "free space"):
        write_json(path, finite(found.to_dict()))
    print(f"wrote {path}")
    return found.to_dict()


def _print(console: Console, found: Report) -> None:
    from rich.markup import escape
    from rich.table import Table

    finished = ", ".join(f"{name} {n} of {all_}" for name, (n, all_) in found.finished.items())
    table = Table(
        title=f"The {found.game} game on {found.kind}s ({finished} turns)", header_style="bold"
    )
    for name in ("", "items", "right answers", "yes where yes", "no where no", "rating, 1 to 5"):
        table.add_column(name, justify="right" if name else "left")
    labels = {
        "rated": f"{found.kind}s",
        "controls": "controls",
        "mismatched": "  another one's evidence",
        "random": "  random evidence",
    }
    for name, label in labels.items():
        group = found.groups[name]
        if group.items:
            cells = (group.accuracy, group.recall, group.specificity, group.rating)
            table.add_row(label, str(group.items), *map(_interval, cells))
    table.add_row(
        f"{found.kind}s less controls", "", _interval(found.gain), "", "",
        _interval(found.rating_gain), style="bold",
    )  # fmt: skip
    console.print(table)
    strengths = [f"{quarter.value:.2f}" for quarter in found.quarters if quarter.value >= 0]
    if strengths:
        line = f"yes where yes, from the strongest quarter of activations: {', '.join(strengths)}"
        console.print(line, highlight=False)
    items = Table(title="Each item", header_style="bold")
    for name in ("", "right answers", "rating", "what it is, in the raters' words"):
        items.add_column(name, justify="right" if name in ("right answers", "rating") else "left")
    for item in found.items:
        words = "; ".join(f"{name}: {said}" for name, said in item.descriptions.items())
        name = item.name if item.control is None else f"{item.name} ({item.control} control)"
        items.add_row(
            escape(name), _interval(item.accuracy), f"{item.rating:.1f}", escape(words),
            style="" if item.control is None else "dim",
        )  # fmt: skip
    console.print(items)
    if found.agreement:
        kappas = Table(title="Agreement, Cohen's kappa", header_style="bold")
        for name in ("", "items", "answers", "ratings (quadratic weights)"):
            kappas.add_column(name, justify="right" if name else "left")
        for pair in found.agreement:
            one, other = pair.raters
            who = f"{one}, twice" if one == other else f"{one}, {other}"
            kappas.add_row(
                escape(who), str(pair.items), _interval(pair.answers), _interval(pair.ratings)
            )
        console.print(kappas)
    console.print(
        "luck is 0.5 right answers and a kappa of 0; 95 % intervals: Student's or Welch's over "
        "items, of each item Wilson's over answers, of kappa a bootstrap over items",
        highlight=False,
    )
    if found.groups["controls"].items and not found.gain.low > 0:
        console.print(f"{found.kind}s are not told apart from controls", style="yellow")


def _interval(found: Any) -> str:
    """A point where the bounds are not known, nothing where there is no number."""
    if found.value != found.value:
        return "-"
    if found.low != found.low:
        return f"{found.value:.2f}"
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
