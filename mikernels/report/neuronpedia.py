# SPDX-License-Identifier: Apache-2.0
"""Features as Neuronpedia imports them.

A source of Neuronpedia is a folder `<model>/<layer>-<set>` (its database's tables, as JSON lines):

    release.jsonl  model.jsonl  sourceset.jsonl  source.jsonl       a line each
    features/batch-<n>.jsonl.gz       a line a feature: table Neuron
    activations/batch-<n>.jsonl.gz    a line an example: table Activation

Names and types of columns are those of `apps/webapp/prisma/schema.prisma` in
hijohnnylin/neuronpedia (August 2026); columns that nothing is known of are left out, and are then
the database's defaults.
All lines of a file have the same names, since the import takes the columns from the first.
Activations that are samples come as intervals of a quarter of the range each. Times are left to the
database, and an activation's id is a hash of what it is: the same features make the same files, and
importing them twice adds nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mikernels.files import explained, partial_of, write_atomic
from mikernels.report.views import BINS, Example, Features, FeatureView

NAME = "neuronpedia.export"
QUARTERS = 4
# what an address of their site and a name of a file can be made of; "__" parts a source's name
_ID = re.compile(r"(?!.*__)[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Source:
    """What Neuronpedia is told of a source.

    Attributes:
        model: their id of the model, such as "gemma-2-2b". layer: its number. set: the name of the
            source set, such as "res-16k": the source is `<layer>-<set>`.
        creator_id: of a user of the database that it is imported into. creator: a name to show.
        release, title: id and title of what it is released as. description: of the set.
        urls: of the release. layers: of the model.
        dataset, n_prompts, n_tokens_in_prompt: what the features were looked at on.
        hf_repo, hf_folder: where the weights are.

    Raises:
        ValueError: an id that cannot be part of an address, or an empty text.
    """

    model: str
    layer: int
    set: str
    creator_id: str
    creator: str
    release: str
    title: str
    description: str
    urls: tuple[str, ...] = ()
    layers: int = 0
    dataset: str | None = None
    n_prompts: int | None = None
    n_tokens_in_prompt: int | None = None
    hf_repo: str | None = None
    hf_folder: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "set", "release"):
            if not isinstance(got := getattr(self, name), str) or not _ID.fullmatch(got):
                raise ValueError(
                    f"neuronpedia.Source: {name} must be letters, digits, '.', '-' and single '_', "
                    f"got {got!r}"
                )
        for name in ("creator_id", "creator", "title", "description"):
            if not isinstance(got := getattr(self, name), str) or not got.strip():
                raise ValueError(f"neuronpedia.Source: {name} must be a text, got {got!r}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"neuronpedia.Source: layer must be 0 or more, got {self.layer!r}")

    @property
    def id(self) -> str:
        return f"{self.layer}-{self.set}"


def export(features: Features, folder: str | Path, source: Source, *, batch: int = 1024) -> Path:
    """Write `folder / <model> / <layer>-<set>`, and return it.

    Args:
        folder: made if missing. batch: features of a file.

    Raises:
        FileExistsError: the source's folder is there already.
        OSError: a file cannot be written. Then, and when it is interrupted, nothing is left.

    Example:
        >>> from mikernels.report import collect_features, neuronpedia
        >>> rows = ModelSource(model, tokenizer, 1, ["The war lasted from 1732 to 17"] * 9).read()
        >>> features = collect_features(sae, rows, tokenizer, model=model)
        >>> who = dict(creator_id="id", creator="A. Uthor", release="saes", title="SAEs")
        >>> where = neuronpedia.Source("a-model", 1, "res-96", description="96 features", **who)
        >>> neuronpedia.export(features, "exports", where).as_posix()
        'exports/a-model/1-res-96'
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"{NAME}: batch must be at least 1, got {batch!r}")
    out = Path(folder) / source.model / source.id
    partial = partial_of(out)
    for path in (out, partial):
        if path.exists() or path.is_symlink():
            raise FileExistsError(
                f"{NAME}: folder must hold no {source.model}/{source.id} yet, got {path}; remove "
                f"it or choose another folder"
            )
    with explained(NAME, "features", out, "free space or choose another folder"):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        try:
            _write_all(features, partial, source, batch)
            partial.rename(out)
        except BaseException:
            # made here, and of no use to anybody
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return out


def _write_all(features: Features, out: Path, source: Source, batch: int) -> None:
    for part in ("features", "activations"):
        (out / part).mkdir()
    for number, start in enumerate(range(0, features.n_features, batch)):
        views = list(features.views(start, start + batch))
        name = f"batch-{number}.jsonl.gz"
        _write(out / "features" / name, (_neuron(view, source) for view in views))
        rows = [activation for view in views for activation in _activations(view, source)]
        # an empty file stops the import
        if rows:
            _write(out / "activations" / name, rows)
    for name, row in _tables(source).items():
        _write(out / f"{name}.jsonl", [row])


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    data = "".join(lines).encode("utf-8")
    # without the time, so that equal features make equal files
    write_atomic(path, gzip.compress(data, 5, mtime=0) if path.suffix == ".gz" else data)


def _tables(source: Source) -> dict[str, dict[str, Any]]:
    """The row of each table that a source needs to be there."""
    creator = {"creatorId": source.creator_id}
    named = {**creator, "creatorName": source.creator}
    release = {
        "name": source.release,
        "visibility": "PUBLIC",
        "description": source.title,
        "descriptionShort": source.title,
        "urls": list(source.urls),
        "creatorNameShort": source.creator,
        **named,
    }
    model = {
        "id": source.model,
        "displayNameShort": source.model,
        "displayName": source.model,
        "visibility": "PUBLIC",
        "layers": source.layers,
        "neuronsPerLayer": 0,
        "owner": source.creator,
        **creator,
    }
    sourceset = {
        "modelId": source.model,
        "name": source.set,
        "visibility": "PUBLIC",
        "description": source.description,
        "urls": list(source.urls),
        "releaseName": source.release,
        **named,
    }
    own = {
        "id": source.id,
        "modelId": source.model,
        "setName": source.set,
        "visibility": "PUBLIC",
        "num_prompts": source.n_prompts,
        "num_tokens_in_prompt": source.n_tokens_in_prompt,
        "dataset": source.dataset,
        "hfRepoId": source.hf_repo,
        "hfFolderId": source.hf_folder,
        **creator,
    }
    own = {name: value for name, value in own.items() if value is not None}
    return {"release": release, "model": model, "sourceset": sourceset, "source": own}


def _short(values: Iterable[float]) -> list[float]:
    """With six digits, which a page shows no more of."""
    return [float(f"{value:.6g}") for value in values]


def _names(view: FeatureView, source: Source) -> dict[str, Any]:
    return {
        "modelId": source.model,
        "layer": source.id,
        "index": str(view.number),
        "creatorId": source.creator_id,
    }


def _neuron(view: FeatureView, source: Source) -> dict[str, Any]:
    centres = ((i + 0.5) * view.maximum / BINS for i in range(BINS))
    return {
        **_names(view, source),
        "sourceSetName": source.set,
        "maxActApprox": _short([view.maximum])[0],
        "frac_nonzero": view.density,
        "freq_hist_data_bar_heights": view.histogram if view.count else [],
        "freq_hist_data_bar_values": _short(centres) if view.count else [],
        "pos_str": [text for text, _ in view.promoted],
        "pos_values": _short(score for _, score in view.promoted),
        "neg_str": [text for text, _ in view.suppressed],
        "neg_values": _short(score for _, score in view.suppressed),
        "topkCosSimIndices": [number for number, _ in view.similar],
        "topkCosSimValues": _short(cosine for _, cosine in view.similar),
    }


def _activations(view: FeatureView, source: Source) -> Iterable[dict[str, Any]]:
    """The examples, and the samples with their interval and the share of rows that lie in it."""
    per_quarter = BINS // QUARTERS
    for example in view.examples:
        yield _activation(view, example, source, (-1.0, view.maximum, -1.0))
    for example in view.samples:
        quarter = max(1, math.ceil(QUARTERS * example.value / view.maximum))
        low, high = (view.maximum * q / QUARTERS for q in (quarter - 1, quarter))
        held = sum(view.histogram[(quarter - 1) * per_quarter : quarter * per_quarter])
        yield _activation(view, example, source, (low, high, held / view.n_rows))


def _activation(
    view: FeatureView, example: Example, source: Source, interval: tuple[float, float, float]
) -> dict[str, Any]:
    names = _names(view, source)
    # unique in the whole database
    parts = [*names.values(), example.row, example.value]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    low, high, held = interval
    values = _short(example.scores)
    return {
        "id": f"c{digest[:24]}",
        **names,
        "tokens": example.tokens,
        "values": values,
        "maxValue": values[example.peak],
        "maxValueTokenIndex": example.peak,
        "minValue": min(values),
        "qualifyingTokenIndex": example.peak,
        "binMin": _short([low])[0],
        "binMax": _short([high])[0],
        "binContains": held,
    }
