# SPDX-License-Identifier: Apache-2.0
"""Activations of a Hugging Face model at one site or several, in one forward pass over text.

Text is tokenised as it is read, cut into windows of `context` tokens (documents are joined by the
end-of-text token), and the model is run up to the last site and no further. Windows come in reading
order; a block of them is one shuffled buffer, so a saved position is reached again by tokenising
up to it and running the model on one block only. What a site is: `mikernels.models.sites`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, repeat
from typing import Any

import torch

from mikernels.activations.dropped import REASONS, dropped
from mikernels.activations.passes import Passes, Place
from mikernels.activations.sources import Rows, Source, SourceExhausted
from mikernels.activations.windows import begins_with_bos, token_windows
from mikernels.models.sites import AnySite, Recorder, Site, read_sites
from mikernels.values.batch import Batch


def _join(recorded: dict[str, torch.Tensor], sites: tuple[str, ...]) -> torch.Tensor:
    """Of several sites `[n, d]` one `[n, L * d]`, on the first one's device."""
    first, *others = (recorded[site] for site in sites)
    return torch.cat([first, *(x.to(first.device) for x in others)], -1) if others else first


def _width(name: str, sites: tuple[str, ...], recorder: Recorder) -> int:
    """Of sites together."""
    widths = {site: recorder.widths[site] for site in sites}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"ModelSource: {name} must be sites of one width, which are joined, got {widths}; "
            f"leave out those of another"
        )
    return sum(widths.values())


class ModelSource(Source):
    """Shuffled activations `[batch_size, d]` of a language model, streamed over text.

        x = concat_l site_l(token)    [L * d], of the sites in `layer`
        y = concat_l site_l(token)    of the sites in `target`, from the same forward pass

    An SAE has one site and no target, a transcoder "14.mlp_in" with target "14.mlp_out", a
    crosscoder several sites, a cross-layer transcoder several of both.

    Args:
        model: a Hugging Face model (Llama, GPT-2, GPT-NeoX, Gemma, ... style).
        tokenizer: its tokeniser.
        layer: a site: 0.. of the decoder layers, the residual stream after it
            (`hidden_states[layer + 1]`; after the last one, what the final norm reads); or
            `Site(14, "mlp_out")`, or its text "14.mlp_out": of residual, mlp_in (what the MLP
            reads), mlp_out and attn_out (what MLP and attention add to the residual stream); or a
            submodule's name. A list of them: their activations joined, in that order.
        texts: documents. A list, or any object that can be iterated again, is repeated for ever; an
            iterator is read once.
        batch_size: rows of a batch; None is the trainer's.
        seed: decides the orders.
        target: a site or a list of them: batches are a Batch with target `[batch_size, d_out]`.
        context: tokens of a window.
        windows_per_forward: windows run at once, fewer where lengths differ.
        buffer_rows: rows that mix with each other and are in memory; fewer where fewer are trained
            on.
        max_tokens: tokens read in an epoch; None is all of the text.
        skip_first: positions dropped at the start of each window: the first token of a context has
            a norm some 100 times the others' whatever it is (an attention sink).
        drop_special: drop the activations of beginning-, end-of-text and padding tokens.
        outlier_norm: drop activations whose norm exceeds this many times the median of their
            window (of its finite ones); None keeps all. Attention sinks past the first position
            are such (4 tokens of 65,000 in SmolLM2-135M, at 160 times the median) and would
            dominate the loss.
        bos: begin each window with the beginning-of-text token; None: if the tokeniser does.
        max_nonfinite: the share of tokens (of those not skipped or special) whose activations may
            be NaN or inf. They are dropped, one by one, with a warning at the first; above this
            share the model is at fault, and reading ends in a ValueError: at the end of a block of
            buffer_rows or of the text, and before it once they are too many for a whole block.

    A token is dropped at all sites, targets included, where one of them says so.

    Attributes:
        sites: names of the sites in `layer`, e.g. ("0.residual", "1.residual"). n_layers: how many.
        target_sites: of those in `target`; () without.
        d: width of the input, of all sites together. d_out: of the target, or d without.
        dropped: tokens dropped since the source was made, by the first reason that applies:
            "skipped" (skip_first), "special", "nonfinite", "outlier".
        on_progress: called with the tokens read of a block, from 0, and all of them, while one is
            read; None by default.
        read_tokens: tokens that the model has read since then, dropped ones included. A block that
            is read again (resuming, another epoch) counts again.

    Raises:
        TypeError, ValueError, IndexError, AttributeError: no tokeniser, layer out of range, sizes
            below 1; a layer inside of a scripted module (what torch.compile made runs uncompiled,
            so that the layer is seen); sites that a forward pass reaches not once, or of different
            widths in one list; a model in which mlp_out or attn_out is not what is added to the
            residual stream, which is checked here on one token, and later on the first window.
            Later, from `next_batch`: ValueError without any text, or with too many activations that
            are not finite; SourceExhausted when an iterator of texts has ended.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        layer: AnySite | Sequence[AnySite],
        texts: Iterable[str],
        batch_size: int | None = None,
        seed: int = 0,
        *,
        target: AnySite | Sequence[AnySite] | None = None,
        context: int = 256,
        windows_per_forward: int = 8,
        buffer_rows: int = 65_536,
        max_tokens: int | None = None,
        skip_first: int = 1,
        drop_special: bool = True,
        outlier_norm: float | None = 10.0,
        bos: bool | None = None,
        max_nonfinite: float = 0.01,
    ):
        super().__init__(batch_size, seed)
        if tokenizer is None:
            raise ValueError(
                "ModelSource: tokenizer must be the model's tokeniser, got None; load it with "
                "AutoTokenizer.from_pretrained"
            )
        if isinstance(texts, str):
            raise TypeError("ModelSource: texts must be documents, got one str; pass [text]")
        if not 0 <= skip_first < context:
            raise ValueError(
                f"ModelSource: skip_first must be in 0..{context - 1} (context), got {skip_first}"
            )
        for name, size in (("windows_per_forward", windows_per_forward), ("context", context)):
            if size < 1:
                raise ValueError(f"ModelSource: {name} must be at least 1, got {size}")
        if not 0 <= max_nonfinite <= 1:
            raise ValueError(f"ModelSource: max_nonfinite must be in 0..1, got {max_nonfinite}")
        if outlier_norm is not None and not outlier_norm > 0:
            raise ValueError(
                f"ModelSource: outlier_norm must be above 0, got {outlier_norm}; None keeps all"
            )
        self.model, self.tokenizer, self.texts = model.eval(), tokenizer, texts
        self._inputs = read_sites("ModelSource", "layer", layer)
        self._targets = () if target is None else read_sites("ModelSource", "target", target)
        self.sites = tuple(map(str, self._inputs))
        self.target_sites = tuple(map(str, self._targets))
        self.n_layers = len(self.sites)
        self.dropped = dict.fromkeys(REASONS, 0)
        self._nonfinite: str | None = None
        self.read_tokens = 0
        self._max_nonfinite = max_nonfinite
        self.layer, self.target = layer, target
        self.context, self.max_tokens = context, max_tokens
        self._per_forward, self._skip_first = windows_per_forward, skip_first
        self._outlier_norm = outlier_norm
        self._windows_per_block = self._most_windows = max(1, buffer_rows // context)
        self.on_progress: Callable[[int, int], None] | None = None
        special = tokenizer.all_special_ids if drop_special else []
        self._special = torch.tensor(sorted(special), dtype=torch.int64)
        self._bos = begins_with_bos(tokenizer) if bos is None else bos
        if self._bos and tokenizer.bos_token_id is None:
            raise ValueError("ModelSource: bos=True needs a tokeniser with one, got bos_token None")
        wanted = {str(site): site for site in self._inputs + self._targets}
        recorder = Recorder(self.model, tuple(wanted.values()), "ModelSource")
        self.d = _width("layer", self.sites, recorder)
        self._d_target = _width("target", self.target_sites, recorder) if self._targets else None
        # whether blocks have been asked for, and the texts been begun
        self._begun = self._started = False
        self._passes = self._passes_of([self], recorder)

    @classmethod
    def each(
        cls,
        model: torch.nn.Module,
        tokenizer: Any,
        layers: Sequence[AnySite | Sequence[AnySite]],
        texts: Iterable[str],
        batch_size: int | None = None,
        seed: int = 0,
        *,
        targets: Sequence[AnySite | Sequence[AnySite]] | None = None,
        **options: Any,
    ) -> list[ModelSource]:
        """A source for each of several sites, from one forward pass for all of them.

        Each gives bit for bit the batches that it would give alone, with its own dropped tokens and
        its own position: it may be saved, resumed and read without the others. A block of text is
        run when the first source comes to it, and what it gives the others is kept until they come
        there, so read them in turn, as a TrainerGroup does. One that falls more than a block and
        32 batches behind has its passes made again.

        Args:
            model, tokenizer, texts, batch_size, seed, options: as for a ModelSource.
            layers: of each source its `layer`. targets: of each its `target`; None without.

        Raises:
            TypeError, ValueError, ...: as for a ModelSource; no layer, or not a target for each.

        Example:
            >>> places = [0, 2, "2.mlp_out"]
            >>> [source.d for source in ModelSource.each(model, tokenizer, places, ["a text"])]
            [24, 24, 24]
        """
        layers = list(layers)
        if not layers or (targets is not None and len(targets) != len(layers)):
            raise ValueError(
                f"ModelSource.each: layers must be at least one, and targets as many or None, got "
                f"{len(layers)} and {None if targets is None else len(targets)}"
            )
        sources = [
            cls(model, tokenizer, layer, texts, batch_size, seed, target=target, **options)
            for layer, target in zip(layers, targets or repeat(None), strict=targets is not None)
        ]
        sites = {str(site): site for s in sources for site in s._inputs + s._targets}
        recorder = Recorder(sources[0].model, tuple(sites.values()), "ModelSource")
        passes = sources[0]._passes_of(sources, recorder)
        for source in sources:
            source._passes = passes
        return sources

    def _passes_of(self, sources: list[ModelSource], recorder: Recorder) -> Passes:
        return Passes(sources, recorder, self._start, self._per_forward)

    def expect(self, rows: int) -> None:
        """So many rows will be asked for in all: a block need not hold more. Of no effect once
        something has been read.

        A sixteenth more is read for the tokens that are dropped.
        """
        if not self._begun:
            windows = -(-rows * 17 // (16 * (self.context - self._skip_first)))
            self._windows_per_block = max(1, min(self._most_windows, windows))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of a Source; blocks go on with the size that they had, if buffer_rows allows it."""
        identity = state.get("identity") if isinstance(state, dict) else None
        size = identity.get("windows_per_block") if isinstance(identity, dict) else None
        before = self._windows_per_block
        if not self._begun and type(size) is int and 1 <= size <= self._most_windows:
            self._windows_per_block = size
        try:
            super().load_state_dict(state)
        except BaseException:
            self._windows_per_block = before
            raise

    def token_windows(self) -> Iterator[torch.Tensor]:
        """Windows of `context` token ids in reading order; the last one may be shorter."""
        return token_windows(
            self.tokenizer,
            self.texts,
            self.context,
            max_tokens=self.max_tokens,
            bos=self._bos,
            skip_first=self._skip_first,
        )

    def _keep(
        self, tokens: torch.Tensor, recorded: dict[str, torch.Tensor], number: int
    ) -> torch.Tensor:
        """Which tokens `[w, t]` of windows, the first the `number`-th, to keep at all sites; counts
        the rest."""
        drop = {name: torch.zeros(tokens.shape, dtype=torch.bool) for name in REASONS}
        for activations in recorded.values():
            found = dropped(
                tokens, activations, self._skip_first, self._special, self._outlier_norm
            )
            for reason, where in found.items():
                drop[reason] |= where
        keep = torch.ones(tokens.shape, dtype=torch.bool)
        for reason in REASONS:
            drop[reason] &= keep
            self.dropped[reason] += int(drop[reason].sum())
            keep &= ~drop[reason]
        self.read_tokens += tokens.numel()
        if drop["nonfinite"].any():
            first = self._nonfinite is None
            if first:
                window, position = drop["nonfinite"].nonzero()[0].tolist()
                self._nonfinite = (
                    f"window {number + window}, position {position}, "
                    f"token {int(tokens[window, position])}"
                )
                if len(recorded) > 1:
                    bad = (
                        name
                        for name, x in recorded.items()
                        if not x[window, position].isfinite().all()
                    )
                    self._nonfinite += f", at {next(bad)}"
            # a share of so few tokens says little: 1 in the first window may be 1 of all
            self.judge(self._windows_per_block * self.context)
            if first:
                warnings.warn(
                    f"ModelSource: {self._found()}, dropped; source.dropped counts them",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return keep

    def _found(self) -> str:
        single = self.n_layers == 1 and not self.target_sites
        where = f"layer {self._named()!r}" if single else "a site"
        return (
            f"NaN or inf at {where} in {self.dropped['nonfinite']} of "
            f"{self._judged()} tokens (first in {self._nonfinite})"
        )

    def _judged(self) -> int:
        return self.read_tokens - self.dropped["skipped"] - self.dropped["special"]

    def judge(self, least: int = 0) -> None:
        """Raises when too large a share was not finite, of all tokens or of `least` if fewer."""
        if self.dropped["nonfinite"] > self._max_nonfinite * max(self._judged(), least):
            raise ValueError(
                f"ModelSource: activations must be finite in all but {self._max_nonfinite:.3%} of "
                f"tokens (max_nonfinite), got {self._found()}; load the model in a wider dtype, or "
                f"raise it"
            )

    def names(self) -> tuple[str, ...]:
        """Of all sites, each once."""
        return tuple(dict.fromkeys(self.sites + self.target_sites))

    def select(self, tokens: torch.Tensor, recorded: Rows, number: int) -> Rows:
        """Rows of windows `[w, t]`, the first of which is the epoch's `number`-th, but for what is
        dropped, from what the sites gave."""
        keep = self._keep(tokens, recorded, number)
        window, position = keep.nonzero(as_tuple=True)
        kept = {name: x[window, position] for name, x in recorded.items()}
        part: Rows = {
            "activations": _join(kept, self.sites),
            "token_ids": tokens[window, position],
            "windows": window + number,
            "positions": position,
        }
        if self.target_sites:
            part["targets"] = _join(kept, self.target_sites)
        return part

    def next_batch(self, n: int | None = None) -> torch.Tensor | Batch:
        """The next `[n, d]` float32 activations of one site; a Batch where there are several sites
        or a target."""
        batch = super().next_batch(n)
        return Batch(batch) if isinstance(batch, torch.Tensor) and self.n_layers > 1 else batch

    def read(self) -> Iterator[Rows]:
        """One epoch in reading order, a few windows at a time, for caching with `write_shards`."""
        return self.read_windows(self.token_windows())

    def read_windows(self, windows: Iterable[torch.Tensor]) -> Iterator[Rows]:
        """The same of any windows `[t]` of token ids."""
        left, number = iter(windows), 0
        while held := list(islice(left, self._per_forward)):
            rows = self._passes.rows(self, held, number)
            number += len(held)
            if len(held) < self._per_forward:
                self.judge()  # before the last ones are given away
            yield rows
        self.judge()

    def _start(self) -> Iterator[torch.Tensor]:
        """Windows of an epoch from its start."""
        if self._started and iter(self.texts) is self.texts:
            raise SourceExhausted("ModelSource: texts is an iterator and has ended")
        self._started = True
        return self.token_windows()

    def _load(self, epoch: int, block: int) -> Rows | None:
        self._begun = True
        return self._passes.load(self, self._place(epoch, block), self.on_progress)

    def _place(self, epoch: int, block: int) -> Place:
        return epoch, block * self._windows_per_block, self._windows_per_block

    def next_place(self) -> Place:
        """The block that is loaded next."""
        return self._place(self._epoch, self._block + (self._rows is not None))

    def untouched(self) -> bool:
        """Whether no block has been asked for."""
        return not self._begun

    def _named(self) -> int | str | list[str]:
        """The sites of the input: the residual stream after a layer is that layer's number."""
        if self.n_layers > 1:
            return list(self.sites)
        (site,) = self._inputs
        if isinstance(site, Site) and site.place == "residual":
            return site.layer
        return str(site)

    def _identity(self) -> dict[str, Any]:
        target = {"d_out": self.d_out, "target": list(self.target_sites)} if self._targets else {}
        return {
            **target,
            "d": self.d,
            "layer": self._named(),
            "context": self.context,
            "windows_per_block": self._windows_per_block,
            "max_tokens": self.max_tokens,
        }
