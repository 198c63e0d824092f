# SPDX-License-Identifier: Apache-2.0
"""Places in a decoder at which activations are recorded, any number of them in one forward pass.

| place | of a block |
|---|---|
| residual | what it returns: the residual stream after it |
| mlp_in | what its MLP reads: what the norm before it returns, where there is one |
| attn_out | what its attention adds to the residual stream |
| mlp_out | what its MLP adds to it |

A part adds what it returns, or, where a norm of the block reads that (Gemma 2, OLMo 2), what the
norm returns: `mikernels.models.watch` tells. That it is added as it is, in sequence or in parallel,
is arithmetic: what the block returns is what it got plus attn_out plus mlp_out, within rounding.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch

from mikernels.models.claims import Claims
from mikernels.models.decoder import decoder_layers, find_decoder
from mikernels.models.hooks import NEVER, check_fires, eager
from mikernels.models.parts import Decoder, Tap
from mikernels.models.watch import Watch

PLACES = ("residual", "mlp_in", "mlp_out", "attn_out")
_NAME = re.compile(rf"([0-9]+)\.({'|'.join(PLACES)})")
_BY_NAME = "pass the module's name as layer"


@dataclass(frozen=True)
class Site:
    """A place of one block: `Site(14, "mlp_out")`, as text "14.mlp_out".

    Attributes:
        layer: the block's number, from 0.
        place: "residual", "mlp_in", "mlp_out" or "attn_out".

    Raises:
        ValueError: for another place.
    """

    layer: int
    place: str = "residual"

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise ValueError(f"Site: place must be one of {PLACES}, got {self.place!r}")

    def __str__(self) -> str:
        return f"{self.layer}.{self.place}"


AnySite = int | str | Site
"""A block's number, for the residual stream after it; a Site or its text; a submodule's name."""


def read_sites(where: str, name: str, given: AnySite | Sequence[AnySite]) -> tuple[Site | str, ...]:
    """One site or several, each a Site or a submodule's name.

    Args:
        where, name: of the messages: the public function, its argument.

    Raises:
        TypeError, ValueError: for something else, for none, and for one twice.
    """
    several = isinstance(given, Sequence) and not isinstance(given, str)
    found: list[Site | str] = []
    for one in given if several else (given,):  # type: ignore[union-attr]
        if isinstance(one, Integral):
            found.append(Site(int(one)))
        elif isinstance(one, str):
            match = _NAME.fullmatch(one)
            found.append(Site(int(match[1]), match[2]) if match else one)
        elif isinstance(one, Site):
            found.append(one)
        else:
            raise TypeError(
                f"{where}: {name} must be a layer's number, a Site or its text such as "
                f"'14.mlp_out', a submodule's name, or a list of these, got {one!r}"
            )
    names = list(map(str, found))
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{where}: {name} must name at least one site, and each once, got {names}")
    return tuple(found)


class _Reached(Exception):
    """Ends the forward pass: all has been recorded, so what is behind never runs."""


class Recorder:
    """Records sites in one forward pass, which ends as soon as all of them have been reached.

    Args:
        model: a Hugging Face model; run on one token here, to its end unless there is but one site
            and that a residual stream or a submodule.
        sites: of read_sites.
        where: of the messages: the public function that asks.

    Attributes:
        widths: of each site.

    Raises:
        AttributeError, IndexError, ValueError: no such submodule or layer; a site that a pass does
            not reach, reaches twice, or that is not `[windows, tokens, d]`; a model of which
            nothing is known of MLPs and attention, or that adds other things to the residual
            stream than attn_out and mlp_out, where these are asked for.
    """

    def __init__(self, model: torch.nn.Module, sites: Sequence[Site | str], where: str):
        self._model, self._where = model, where
        self._decoder: Decoder | None = None
        self._placed = {str(site) for site in sites if isinstance(site, Site)}
        self._written = sorted(
            {s.layer for s in sites if isinstance(s, Site) and s.place in ("mlp_out", "attn_out")}
        )
        taps = {str(site): self._find(site) for site in sites}
        check_fires(where, model, [tap.module for tap in taps.values() if tap is not None])
        writers = self._writers() if self._written else {}
        self._taps = {name: tap or writers[name] for name, tap in taps.items()}
        # what the claims about written blocks need
        self._claimed = dict(writers)
        for layer in self._written:
            block = self._known().blocks[layer].module
            self._claimed |= {f"{layer}.input": Tap(block, True), f"{layer}.residual": Tap(block)}
        probe = torch.zeros(1, 1, dtype=torch.int64)
        first = sites[0]
        if len(sites) > 1 or (isinstance(first, Site) and first.place != "residual"):
            self._pass(probe, self._taps, whole=True)
        self.widths: dict[str, int] = {}
        self.widths = {name: x.shape[-1] for name, x in self.record(probe).items()}
        self.check(probe)

    def _known(self) -> Decoder:
        if self._decoder is None:
            self._decoder = find_decoder(self._model, self._where, _BY_NAME)
        return self._decoder

    def _find(self, site: Site | str) -> Tap | None:
        """Where to record a site; None where only a forward pass tells."""
        if isinstance(site, str):
            try:
                return Tap(self._model.get_submodule(site))
            except AttributeError as error:
                raise AttributeError(
                    f"{self._where}: layer must be a layer's number, NUMBER.PLACE with one of "
                    f"{PLACES}, or a submodule's name, got {site!r}: {error}"
                ) from error
        layers = decoder_layers(self._model, self._where, _BY_NAME)
        if not 0 <= site.layer < len(layers):
            raise IndexError(
                f"{self._where}: layer must be in 0..{len(layers) - 1} "
                f"({len(layers)} decoder layers), got {site.layer}"
            )
        if site.place == "residual":
            return Tap(layers[site.layer])
        if site.place == "mlp_in":
            reader = self._known().blocks[site.layer].mlp_reader
            if reader is None:
                raise self._known().refusal(f"block {site.layer} has no MLP")
            return Tap(reader, before=True)
        return None

    def _run(self, tokens: torch.Tensor) -> None:
        device = next(self._model.parameters()).device
        with eager(), torch.no_grad():
            self._model(input_ids=tokens.to(device), use_cache=False)

    def _writers(self) -> dict[str, Tap]:
        """What adds to the stream in the blocks that are asked for, seen in a pass of one token."""
        # inside of inference mode nothing says what is changed in place
        with ExitStack() as stack, torch.inference_mode(False):
            watch = Watch(self._known(), None, [], stack)
            self._run(torch.zeros(1, 1, dtype=torch.int64))
        found = {}
        for layer in self._written:
            flow = watch.flows[layer]
            found[f"{layer}.attn_out"] = Tap(flow.attention_writer)
            if flow.mlp_writer is None:
                raise self._known().refusal(f"block {layer} has no MLP")
            found[f"{layer}.mlp_out"] = Tap(flow.mlp_writer)
        return found

    def _pass(
        self, tokens: torch.Tensor, taps: Mapping[str, Tap], whole: bool = False
    ) -> dict[str, torch.Tensor]:
        """What is seen at each tap; runs the model to its end if `whole`."""
        found: dict[str, torch.Tensor] = {}

        def keep(name: str, value: Any) -> None:
            if name in found:
                raise ValueError(
                    f"{self._where}: layer must be sites that a forward pass reaches once, got "
                    f"{name!r}, which it reaches again; choose another site"
                )
            if not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"{self._where}: layer must be sites with a tensor, got {name!r} with "
                    f"{type(value).__name__}; choose another site"
                )
            if not whole and len(found) == len(taps) - 1:
                found[name] = value
                raise _Reached
            # the model may change it in place when it goes on
            found[name] = value.clone()

        with ExitStack() as stack:
            for name, tap in taps.items():
                stack.callback(tap.hook(partial(keep, name)))
            try:
                self._run(tokens)
            except _Reached:
                return found
        if missing := taps.keys() - found.keys():
            raise ValueError(
                f"{self._where}: layer must be one that a forward pass calls, got "
                f"{min(missing)!r}, whose hooks never fire; {NEVER}"
            )
        return found

    def record(
        self, tokens: torch.Tensor, names: Collection[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Token ids `[w, t]` -> site: activations `[w, t, d]`, of all sites or of those named.

        Raises:
            ValueError: a site of another shape.
        """
        taps = {n: tap for n, tap in self._taps.items() if names is None or n in names}
        found = self._pass(tokens, taps)
        recorded = {}
        for name in taps:
            x = found[name]
            if name in self._placed and x.dim() == 2 and len(x) == tokens.numel():
                x = x.view(*tokens.shape, -1)  # OPT computes so, with all windows in one
            width = self.widths.get(name, x.shape[-1] if x.dim() else 0)
            if x.shape != (*tokens.shape, width):
                raise ValueError(
                    f"{self._where}: layer {name!r} must give {[*tokens.shape, width]} "
                    f"(windows, tokens, d), got {list(x.shape)}; choose another module"
                )
            recorded[name] = x
        return recorded

    def check(self, tokens: torch.Tensor) -> None:
        """Whether attn_out and mlp_out add up to what their blocks return, in a pass of its own
        over token ids `[w, t]`, where some are asked for.

        Raises:
            ValueError: they do not, with place and numbers.
        """
        if not self._written:
            return
        found = self._pass(tokens, self._claimed)
        names = ("input", "attn_out", "mlp_out", "residual")
        seen = {
            layer: [found[f"{layer}.{name}"].reshape(*tokens.shape, -1) for name in names]
            for layer in self._written
        }
        # tokens that are not finite are counted where they are dropped
        kept = torch.ones(tokens.shape, dtype=torch.bool)
        for tensors in seen.values():
            for x in tensors:
                kept &= x.isfinite().all(-1).cpu()
        claims = Claims(kept)
        for layer, (*parts, output) in seen.items():
            claims.sums(f"block {layer} must return input + attention + mlp", output, parts)
        claims.check(lambda reason: self._known().refusal(reason, "remove what changes it, or "))
