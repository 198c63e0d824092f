# SPDX-License-Identifier: Apache-2.0
"""The names of components, and which of them a model has.

| name | component | its activation |
|---|---|---|
| `L3.h7` | a head | z `[dh]`, what the projection reads of it |
| `L3.attn`, `L3.mlp` | attention; an MLP, or experts | what it adds to the residual stream |
| `L3.mlp.n123` | a neuron | the number that the MLP's last product reads |
| `L3.expert5` | an expert of a mixture | what it adds to the MLP, 0 where it is not asked |
| `14.mlp_out.f123` | a feature of an SAE at a site | its code |
| `input` | what the first block is given | |

A pattern (`L3.*`, `L*.mlp`, `*`) stands for the heads and MLPs that it matches, which together are
all that blocks add but for the projections' biases; where it matches none of them, for attentions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mikernels.models.experts import experts_of
from mikernels.models.parts import Decoder
from mikernels.models.sites import PLACES, Site, read_sites
from mikernels.nn.sae import SAE

FORMS = "L3.h7, L3.attn, L3.mlp, L3.mlp.n123, L3.expert5, 14.mlp_out.f123 or input"
_NUMBER = "(0|[1-9][0-9]*)"
_KINDS = {
    "head": rf"L{_NUMBER}\.h{_NUMBER}",
    "attn": rf"L{_NUMBER}\.attn",
    "mlp": rf"L{_NUMBER}\.mlp",
    "neuron": rf"L{_NUMBER}\.mlp\.n{_NUMBER}",
    "expert": rf"L{_NUMBER}\.expert{_NUMBER}",
}
_FEATURE = re.compile(rf"{_NUMBER}\.({'|'.join(PLACES)})\.f{_NUMBER}")
Names = str | Iterable[str]


@dataclass(frozen=True)
class Part:
    """A component.

    Attributes:
        name: as above. layer: its block, 0 for the input.
        kind: "input", "head", "attn", "mlp", "neuron", "expert" or "feature".
        number: of the head, neuron, expert or feature. place: of a feature, of its site.
    """

    name: str
    layer: int
    kind: str
    number: int = 0
    place: str = ""


def _parsed(name: str) -> Part | None:
    if name == "input":
        return Part(name, 0, "input")
    if match := _FEATURE.fullmatch(name):
        return Part(name, int(match[1]), "feature", int(match[3]), match[2])
    for kind, form in _KINDS.items():
        if match := re.fullmatch(form, name):
            layer, *rest = map(int, match.groups())
            return Part(name, layer, kind, rest[0] if rest else 0)
    return None


def read_saes(where: str, decoder: Decoder, saes: Mapping[Any, SAE] | None) -> dict[str, SAE]:
    """Site as text -> SAE.

    Raises:
        TypeError, ValueError: for another site, or an SAE that does not say what it reads again.
    """
    given = {} if saes is None else saes
    if not isinstance(given, Mapping):
        raise TypeError(f"{where}: saes must be a mapping of sites to SAEs, got {type(given)}")
    found: dict[str, SAE] = {}
    for key, sae in given.items():
        (site,) = read_sites(where, "saes", key)
        if not isinstance(site, Site) or site.layer >= len(decoder.blocks):
            raise ValueError(
                f"{where}: saes must be at LAYER.PLACE with a layer in 0.."
                f"{len(decoder.blocks) - 1} and one of {PLACES}, got {str(site)!r}"
            )
        if not isinstance(sae, SAE) or sae.needs_target or type(sae).decode is not SAE.decode:
            raise TypeError(
                f"{where}: saes must be SAEs of mikernels.nn that reconstruct what they read, got "
                f"{type(sae).__name__} at {site}"
            )
        if sae.config.d != decoder.d:
            raise ValueError(
                f"{where}: saes must have the model's width {decoder.d}, got {sae.config.d} at "
                f"{site}"
            )
        found[str(site)] = sae
    return found


def _wrong(where: str, name: str, expected: str, fix: str) -> ValueError:
    return ValueError(f"{where}: names must be {expected}, got {name!r}; {fix}")


def _check(where: str, decoder: Decoder, part: Part, saes: Mapping[str, SAE]) -> None:
    n = len(decoder.blocks)
    if part.layer >= n:
        raise _wrong(where, part.name, f"of layers 0..{n - 1}", "count from 0")
    block = decoder.blocks[part.layer]
    if part.kind == "head":
        heads = decoder.heads(block).query
        if part.number >= heads:
            expected = f"of heads 0..{heads - 1} of block {part.layer}"
            raise _wrong(where, part.name, expected, "count from 0")
    elif block.mlp is None and ("mlp" in part.name or part.kind == "expert"):
        raise _wrong(where, part.name, "components of the model", f"L{part.layer} has no MLP")
    elif part.kind == "expert":
        experts = experts_of(block)
        if experts is None:
            raise _wrong(
                where, part.name, "components of the model",
                f"no module of L{part.layer}.mlp holds the weights of all its experts (as those of "
                f"transformers 5 do) and is given their weights: name L{part.layer}.mlp",
            )  # fmt: skip
        if part.number >= experts.n:
            expected = f"of experts 0..{experts.n - 1} of block {part.layer}"
            raise _wrong(where, part.name, expected, "count from 0")
    elif part.kind == "feature":
        site = f"{part.layer}.{part.place}"
        if site not in saes:
            raise _wrong(
                where, part.name, f"of sites with an SAE ({sorted(saes)})",
                f"give saes={{{site!r}: sae}}",
            )  # fmt: skip
        f = saes[site].config.n_features
        if part.number >= f:
            raise _wrong(where, part.name, f"of features 0..{f - 1} of {site}", "count from 0")


def _matching(where: str, decoder: Decoder, pattern: str) -> list[str]:
    heads_and_mlps, attentions = [], []
    for i, block in enumerate(decoder.blocks):
        heads_and_mlps += [f"L{i}.h{h}" for h in range(decoder.heads(block).query)]
        heads_and_mlps += [f"L{i}.mlp"] * (block.mlp is not None)
        attentions.append(f"L{i}.attn")
    for names in (heads_and_mlps, attentions):
        if found := [name for name in names if fnmatchcase(name, pattern)]:
            return found
    raise _wrong(
        where, pattern, "patterns of heads and MLPs, or of attentions, of the model",
        "it matches none",
    )  # fmt: skip


def read_names(
    where: str, decoder: Decoder, names: Names, saes: Mapping[str, SAE]
) -> tuple[Part, ...]:
    """The components that are named, patterns spelt out.

    Args:
        where: of messages: the public function.
        saes: of `read_saes`.

    Raises:
        TypeError, ValueError: for something else than names, none, one twice, or one that the model
            has not. Neurons are counted where the model runs (`places`).
    """
    given = [names] if isinstance(names, str) else list(names)
    if bad := [name for name in given if not isinstance(name, str)]:
        raise TypeError(f"{where}: names must be texts such as {FORMS}, got {bad[0]!r}")
    spelt: list[str] = []
    for name in given:
        spelt += _matching(where, decoder, name) if set(name) & set("*?[") else [name]
    if not spelt:
        raise ValueError(f"{where}: names must hold at least one component ({FORMS}), got none")
    parts: dict[str, Part] = {}
    for name in spelt:
        part = _parsed(name)
        if part is None:
            raise _wrong(where, name, f"components such as {FORMS}", "or patterns such as L3.*")
        if name in parts:
            raise _wrong(where, name, "components, each once", "it is named twice")
        _check(where, decoder, part, saes)
        parts[name] = part
    return tuple(parts.values())
