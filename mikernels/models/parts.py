# SPDX-License-Identifier: Apache-2.0
"""The parts of a decoder: what every kind of model has, whatever it calls them.

A kind of model is a subclass of `Decoder`, one a file (`hugging_face`, `lens`). It finds the parts
by structure and says what only it can know: how the weight that heads are projected by is stored,
and how the model is run. All that follows from the parts stands once, here and in
`mikernels.models.watch`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

from mikernels.models.hooks import check_eval, check_fires, in_place_of, returned

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
PROJECTION = ("o_proj", "c_proj", "out_proj", "dense")


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module reads, of all that it is given; None without any."""
    given = (*args, kwargs.get("hidden_states"), *kwargs.values())
    return next((x for x in given if isinstance(x, torch.Tensor)), None)


class Tap(NamedTuple):
    """A module and which side of it: what it returns, or the first tensor that it is given."""

    module: torch.nn.Module
    before: bool = False

    def hook(self, see: Callable[[Any], None]) -> Callable[[], None]:
        """Calls `see` with each tensor that passes; what is returned ends that."""
        if self.before:
            pre = self.module.register_forward_pre_hook(
                lambda module, args, kwargs: see(first_tensor(args, kwargs)), with_kwargs=True
            )
            return pre.remove
        hook = self.module.register_forward_hook(lambda module, args, out: see(returned(out)))
        return hook.remove

    def edit(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        """Puts what `change` makes of each tensor that passes in its place; what is returned ends
        that."""

        def enter(module: torch.nn.Module, args: Any, kwargs: Any = None) -> Any:
            # without keywords it is called by threads that were there when the hook came
            if kwargs is None or (x := first_tensor(args, kwargs)) is None:
                return None
            y = change(x)
            replace = {id(x): y}
            return (
                tuple(replace.get(id(a), a) for a in args),
                {name: replace.get(id(a), a) for name, a in kwargs.items()},
            )

        def leave(module: torch.nn.Module, args: Any, output: Any) -> Any:
            x = returned(output)
            return in_place_of(output, change(x)) if isinstance(x, torch.Tensor) else None

        if self.before:
            return self.module.register_forward_pre_hook(enter, with_kwargs=True).remove
        return self.module.register_forward_hook(leave).remove


class Heads(NamedTuple):
    """Of one attention.

    Attributes:
        query: their number. key_value: of the key and value heads, which groups of query heads
            share. size: of a head's z, what the projection reads of it.
    """

    query: int
    key_value: int
    size: int


class Projection(NamedTuple):
    """What makes the q, k or v of a block's heads, or groups of heads.

    Attributes:
        part: "q", "k" or "v".
        module: whose output holds it.
        weight: `[n, d, dh]`, a view of the model's. bias: `[n, dh]`, None without.
        columns: `[n, dh]` int64, where in the output; None: all of it, in order.
    """

    part: str
    module: torch.nn.Module
    weight: torch.Tensor
    bias: torch.Tensor | None
    columns: torch.Tensor | None

    def of(self, output: torch.Tensor, rows: torch.Size) -> torch.Tensor:
        """`[B, P, n, dh]` of the output or its gradient, rows being `[B, P]`; a view if it can."""
        flat = output.reshape(*rows, -1)
        n, _, size = self.weight.shape
        return flat.unflatten(-1, (n, size)) if self.columns is None else flat[..., self.columns]

    def put(self, output: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The output with these values `[B, P, n, dh]`, in memory of its own."""
        if self.columns is None:
            return values.reshape(output.shape)
        flat = output.reshape(*values.shape[:2], -1).clone()
        flat[..., self.columns] = values
        return flat.view(output.shape)


@dataclass(frozen=True, eq=False)
class Block:
    """One layer.

    Attributes:
        index: 0..n-1.
        module: the block. attention: that in it.
        z: where the heads' results before the projection are seen, `[B, P, H dh]`, `[B P, H dh]` or
            `[B, P, H, dh]`. projection: the module that returns `z W_O + b`: the attention's last
            layer, or the attention itself where that holds W_O.
        mlp: the module that returns the MLP's or the experts' output, None for a block without.
            mlp_reader: the module that gets its input, the same one unless the block holds the
            MLP's layers itself.
        norms: name -> module; `Watch.flows` tells what each of them is for.
        parallel: whether the MLP reads the block's input without what attention wrote, as the model
            says; None where it says nothing, and the tensors tell.
    """

    index: int
    module: torch.nn.Module
    attention: torch.nn.Module
    z: Tap
    projection: torch.nn.Module
    mlp: torch.nn.Module | None
    mlp_reader: torch.nn.Module | None
    norms: dict[str, torch.nn.Module]
    parallel: bool | None = None

    @property
    def writes(self) -> tuple[str, ...]:
        """What is in it: "attn", and "mlp" if it has one."""
        return ("attn",) if self.mlp is None else ("attn", "mlp")


class Product(NamedTuple):
    """`x weight + bias`: where x is seen, `[n, d]`, and `[d]` or None."""

    tap: Tap
    weight: torch.Tensor
    bias: torch.Tensor | None


Kind = TypeVar("Kind", bound="Decoder")


@dataclass(frozen=True, eq=False)
class Decoder(ABC):
    """A recognised model.

    Attributes:
        model: as given. where, fix: the public function that asked, and what its users may do about
            a model that is another, for messages.
        d: width of the residual stream.
        blocks: in order. beside: modules beside the list of blocks, in the order of definition.
        embedding, unembedding: the modules, None for models that name none.
        final_norm: after the last block, None without.
        counts_positions: whether the model counts positions from the attention mask by itself.
    """

    model: torch.nn.Module
    where: str
    fix: str
    d: int
    blocks: tuple[Block, ...]
    beside: tuple[torch.nn.Module, ...]
    embedding: torch.nn.Module | None
    unembedding: torch.nn.Module | None
    final_norm: torch.nn.Module | None

    counts_positions: ClassVar[bool] = False

    @classmethod
    def of(
        cls: type[Kind],
        model: torch.nn.Module,
        where: str,
        fix: str,
        d: int,
        layers: torch.nn.ModuleList,
        blocks: Sequence[Block],
        ends: tuple[torch.nn.Module | None, torch.nn.Module | None],
    ) -> Kind:
        """The model with these blocks, embedding and unembedding, and what is beside them.

        Raises:
            ValueError: blocks that share modules, or that lie in a scripted module.
        """
        modules = [m for b in blocks for m in (b.module, b.attention, b.mlp) if m is not None]
        modules += [b.projection for b in blocks if b.projection is not b.attention]
        if len(set(modules)) < len(modules):
            reason = "blocks share modules, which hooks cannot tell apart"
            raise refusal(model, where, reason, fix)
        check_fires(where, model, modules)
        parent = next(m for m in model.modules() if any(child is layers for child in m.children()))
        beside = [m for m in parent.children() if m is not layers]
        names = list(parent._modules.values())
        # defined after the blocks, or (OPT) last of those before
        after = [m for m in names[names.index(layers) + 1 :] if m is not None and is_norm(m, d)]
        norms = after[:1] or [m for m in beside if is_norm(m, d)][-1:]
        final = norms[0] if norms else None
        return cls(model, where, fix, d, tuple(blocks), tuple(beside), *ends, final)

    def refusal(self, reason: str, fix: str = "") -> ValueError:
        """The error of a model that turns out to be another than it looks like.

        Args:
            reason: what it is. fix: what to try before `self.fix`, ending in "or ".
        """
        return refusal(self.model, self.where, reason, fix + self.fix)

    def check_eval(self) -> None:
        """Refuses a model that drops numbers at random.

        Raises:
            ValueError: in training mode, the whole or a part with dropout.
        """
        check_eval(self.where, self.model)

    @abstractmethod
    def w_o(self, block: Block) -> torch.Tensor:
        """The projection's weight by heads, `[H, dh, d]`; a view.

        Raises:
            ValueError: for a projection without such a weight, or of another size.
        """

    @abstractmethod
    def b_o(self, block: Block) -> torch.Tensor | None:
        """The projection's bias `[d]`, None without."""

    @abstractmethod
    def last_products(self, block: Block) -> list[Product]:
        """What may be the last product of its MLP; `mikernels.models.neurons` tells which is."""

    def rounds_products(self, block: Block) -> bool:
        """Whether the model rounds each `z_i W_ij` to its dtype before it adds them up."""
        return False

    def heads(self, block: Block) -> Heads:
        """From the shapes of the projection and of what makes the values.

        Raises:
            ValueError: as `w_o`; or when the query heads are no multiple of the others.
        """
        query, size, _ = self.w_o(block).shape
        key_value = self.value_heads(block, query, size)
        if key_value < 1 or query % key_value:
            raise self.refusal(
                f"attention of block {block.index} has {query} query heads for {key_value:g} key "
                f"and value heads"
            )
        return Heads(query, int(key_value), size)

    @abstractmethod
    def value_heads(self, block: Block, query: int, size: int) -> float:
        """How many heads of this size what makes the values has, beside so many query heads."""

    @abstractmethod
    def projections(self, block: Block) -> tuple[Projection, Projection, Projection]:
        """What makes q, k and v of a block's heads, by names: `mikernels.models.readers` checks.

        Raises:
            ValueError: for modules without such weights.
        """

    def whole(self) -> AbstractContextManager[None]:
        """While it is entered, heads are computed together where the model can also do so one by
        one."""
        return nullcontext()

    @abstractmethod
    def logits(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Runs the model on what a tokeniser returned: `[B, P, V]`.

        Raises:
            ValueError: for a model that returns something else.
        """


def refusal(model: object, where: str, reason: str, fix: str) -> ValueError:
    """The error of a model that is not recognised, or turns out to be another."""
    return ValueError(
        f"{where}: model must be a Hugging Face decoder (Llama, GPT-2, ...) of blocks with "
        f"attention ({', '.join(ATTENTION)}) that ends in a projection ({', '.join(PROJECTION)}) "
        f"and an mlp, or a HookedTransformer, whose parts are added to the residual stream as they "
        f"are or normed, got {type(model).__name__}: {reason}; {fix}"
    )


def child_named(module: torch.nn.Module, names: tuple[str, ...]) -> torch.nn.Module | None:
    """The first child with one of these names."""
    found = (getattr(module, name, None) for name in names)
    return next((child for child in found if isinstance(child, torch.nn.Module)), None)


def is_hook_point(module: torch.nn.Module | None) -> bool:
    """Whether it computes nothing and carries hooks (of TransformerLens)."""
    lists = (getattr(module, name, None) for name in ("fwd_hooks", "bwd_hooks"))
    return all(isinstance(hooks, list) for hooks in lists)


def is_norm(module: torch.nn.Module, d: int) -> bool:
    """Without parts, and with nothing but vectors [d]; or without parameters, by its name."""
    if not all(is_hook_point(part) for part in module.children()):
        return False
    shapes = [tuple(p.shape) for p in module.parameters()]
    return set(shapes) == {(d,)} or (not shapes and "norm" in type(module).__name__.lower())


def norms_in(module: torch.nn.Module, d: int) -> dict[str, torch.nn.Module]:
    """The norms among a block's children, by name."""
    return {name: part for name, part in module.named_children() if is_norm(part, d)}
