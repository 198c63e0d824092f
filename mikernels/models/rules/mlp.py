# SPDX-License-Identifier: Apache-2.0
"""Gated products and activations of MLPs and experts.

A gated MLP computes `h = f(gate(x)) up(x)`, and `down(h)` is its output. The factors of its two
sides go onto what `gate` and `up` return. Experts whose weights are one tensor have no such
modules: what f receives is a half of their product, and the factors go onto the gradient that
leaves the node of autograd that made the halves.

That h is this product is checked on the first batch, number by number; of experts, on its first
token, from their weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.models.claims import FACTORS as PRODUCT_FACTORS
from mikernels.models.claims import some_rows
from mikernels.models.parts import first_tensor
from mikernels.models.rules.gradients import beyond, scaled, secant
from mikernels.models.rules.scope import Place, Scope, Uncopied

GATES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
FUSED = ("gate_up_proj", "down_proj")
ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")

# nodes of autograd that take a tensor apart
HALVES = ("SplitBackward0", "SplitWithSizesBackward0")

Hook = Callable[..., Any]


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(
        f"rules: gate and up must act on an MLP that computes f(gate) up, got {name}, {reason}; "
        f"leave them out"
    )


def looks_gated(module: torch.nn.Module) -> bool:
    """Whether its layers are, by their sizes, those of a product of two sides: what reads it makes
    twice the numbers that what writes needs."""
    sizes = [tuple(p.shape) for part in module.children() for p in part.parameters(recurse=False)]
    matrices = [size for size in sizes if len(size) == 2]
    # transformers' Conv1D, of GPT-2, is the other way round; so is nothing else
    turned = any(type(part).__name__ == "Conv1D" for part in module.children())
    ends = [(b, a) if turned else (a, b) for a, b in matrices]
    return any(
        sum(out for out, read in ends if read == d) == 2 * sum(r for out, r in ends if out == d) > 0
        for d in {read for _, read in ends}
    )


def child(module: torch.nn.Module, names: Iterable[str]) -> torch.nn.Module | None:
    """The first of these parts that is a module."""
    found = (module._modules.get(name) for name in names)
    return next((part for part in found if part is not None), None)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN to NaN too."""
    return torch.equal(a, b) or (
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    )


def _check_product(name: str, a: torch.Tensor, up: torch.Tensor, h: torch.Tensor) -> None:
    """h = a up, within rounding."""
    expected = a.to(accumulate_dtype(a.dtype)) * up
    limit = expected.abs() * (2 * torch.finfo(h.dtype).eps) + torch.finfo(h.dtype).smallest_normal
    if (found := beyond(h, expected, limit)) is not None:
        raise _refusal(name, f"whose down is given {found[0]:.6g} where that is {found[1]:.6g}")


def _factor(place: Place, scope: Scope, rule: str, x: Any) -> float | None:
    """What to multiply a gradient by, None for nothing to do."""
    said = scope.value(place, rule)
    if said is None or not isinstance(x, torch.Tensor) or not x.requires_grad:
        return None
    scope.report.ran(rule, place.name)
    scope.report.acted(rule, place.name)
    return said


def _watch(place: Place, within: torch.nn.Module, scope: Scope) -> Callable[[], None]:
    """Has a place count as run where the module around it runs: that may not call its parts."""

    def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        x = first_tensor(args, kwargs)
        if x is None or not x.requires_grad or not x.numel():
            return
        for rule in place.rules:
            if scope.value(place, rule) is not None:
                scope.report.ran(rule, place.name)

    return Uncopied.hook(within.register_forward_pre_hook, enter, with_kwargs=True)


class UnknownPlace:
    """A gated product that rules cannot reach: refused, not left out."""

    def __init__(self, module: torch.nn.Module, name: str, layer: int | None, *more: str):
        self.key, self.name, self.layer = module, name, layer
        self.rules: tuple[str, ...] = ("gate", "up", *more)

    def install(self, scope: Scope) -> Iterable[Callable[[], None]]:
        if all(scope.said.get(rule) in (None, 1.0, "gradient") for rule in self.rules):
            return ()
        parts = [name for name, _ in self.key.named_children()]
        raise _refusal(
            self.name,
            f"a {type(self.key).__name__} of {parts}, whose activation or whose sides are no "
            f"modules of their own",
        )


class GatePlace:
    """An MLP with modules for gate and up, or one for both.

    Args:
        parts: of the MLP: f, what returns gate and up (two, or one with both), what reads h.
    """

    rules: tuple[str, ...] = ("gate", "up")

    def __init__(
        self,
        module: torch.nn.Module,
        name: str,
        layer: int | None,
        parts: tuple[torch.nn.Module, tuple[torch.nn.Module, ...], torch.nn.Module],
    ):
        self.key, self.name, self.layer = module, name, layer
        self._f, self._sides, self._down = parts

    def install(self, scope: Scope) -> Iterable[Callable[[], None]]:
        checked = False
        seen: dict[str, torch.Tensor] = {}

        def watching() -> bool:
            return not checked and scope.entered()

        def side(rule: str) -> Hook:
            def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
                if not isinstance(output, torch.Tensor):
                    return None
                if watching():
                    seen[rule] = output.detach()
                factor = _factor(self, scope, rule, output)
                return None if factor in (None, 1.0) else scaled(output, factor)

            return hook

        def both(module: torch.nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, torch.Tensor):
                return None
            if watching():
                seen["gate"], seen["up"] = output.detach().chunk(2, -1)
            factors = [_factor(self, scope, rule, output) for rule in ("gate", "up")]
            gate, up = (1.0 if factor is None else factor for factor in factors)
            if gate == up:
                return None if gate == 1.0 else scaled(output, gate)
            halves = output.new_full((output.shape[-1],), gate)
            halves[output.shape[-1] // 2 :] = up
            return scaled(output, halves)

        def activated(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = first_tensor(args, kwargs)
            if watching() and all(isinstance(t, torch.Tensor) for t in (x, output)):
                seen["read"], seen["a"] = x.detach(), output.detach()

        def read(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal checked
            if not watching():
                return
            if seen.keys() < {"gate", "up", "read", "a"}:
                raise _refusal(self.name, f"of which only {sorted(seen)} ran as modules")
            if not _same(seen["read"], seen["gate"]):
                raise _refusal(self.name, "whose activation reads something else than gate")
            h = first_tensor(args, kwargs)
            _check_product(self.name, *some_rows(seen["a"], seen["up"], h))
            seen.clear()
            checked = True

        # before what others change, which they may
        if len(self._sides) == 1:
            yield Uncopied.hook(self._sides[0].register_forward_hook, both, prepend=True)
        else:
            for module, rule in zip(self._sides, ("gate", "up"), strict=True):
                yield Uncopied.hook(module.register_forward_hook, side(rule), prepend=True)
        options = {"with_kwargs": True, "prepend": True}
        yield Uncopied.hook(self._f.register_forward_hook, activated, **options)
        yield Uncopied.hook(self._down.register_forward_pre_hook, read, **options)
        yield _watch(self, self.key, scope)


class ExpertsPlace:
    """Experts whose weights are two tensors, of gate and up and of down.

    Args:
        f: their activation.
    """

    rules: tuple[str, ...] = ("gate", "up")

    def __init__(self, module: torch.nn.Module, name: str, layer: int | None, f: torch.nn.Module):
        self.key, self.name, self.layer = module, name, layer
        self._f = f

    def install(self, scope: Scope) -> Iterable[Callable[[], None]]:
        checked = False
        # threads in these experts: others may have the same f
        inside: set[int] = set()

        def enter(module: torch.nn.Module, args: Any) -> None:
            inside.add(threading.get_ident())

        def activate(module: torch.nn.Module, args: Any) -> None:
            if threading.get_ident() not in inside:
                return
            factors = [_factor(self, scope, rule, args[0]) for rule in ("gate", "up")]
            gate, up = (1.0 if factor is None else factor for factor in factors)
            if gate == up == 1.0:
                return
            node = args[0].grad_fn
            if type(node).__name__ not in HALVES:
                raise _refusal(self.name, f"whose activation reads the result of {node}")

            def scale(grads: Any, outputs: Any) -> Any:
                (grad,) = grads
                size = grad.shape[-1] // 2
                return (torch.cat([gate * grad[..., :size], up * grad[..., size:]], -1),)

            node.register_hook(scale)

        def leave(
            module: torch.nn.Module, args: Any, kwargs: Any, output: torch.Tensor | None
        ) -> None:
            nonlocal checked
            inside.discard(threading.get_ident())
            # None after an exception
            if checked or output is None or not scope.entered():
                return
            names = ("hidden_states", "top_k_index", "top_k_weights")
            given = dict(zip(names, args, strict=False)) | kwargs
            if not given.keys() >= set(names):
                raise _refusal(self.name, f"whose forward is given {sorted(given)}")
            x, experts, weights = (given[name].detach() for name in names)
            self._check(x, experts, weights, output.detach())
            checked = True

        yield Uncopied.hook(self.key.register_forward_pre_hook, enter)
        yield _watch(self, self.key, scope)
        # after what others change
        yield Uncopied.hook(self._f.register_forward_pre_hook, activate)
        yield Uncopied.hook(
            self.key.register_forward_hook, leave, with_kwargs=True, prepend=True, always_call=True
        )

    @torch.no_grad()
    def _check(
        self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, y: torch.Tensor
    ) -> None:
        """The first token's output, from the weights."""
        if not len(x := x.reshape(-1, x.shape[-1])):
            return
        tensors = [getattr(self.key, name) for name in FUSED]
        if any(not t.is_floating_point() or t.dim() != 3 for t in tensors):
            raise _refusal(self.name, "whose weights are quantised")
        first, out = x[0].double(), y.reshape(-1, y.shape[-1])[0].double()
        expected, limit = torch.zeros_like(out), torch.zeros_like(out)
        acc = accumulate_dtype(y.dtype)
        coarse = PRODUCT_FACTORS[torch.get_float32_matmul_precision()]
        kind = y.device.type
        if torch.is_autocast_enabled(kind):
            coarse = max(coarse, 2 * torch.finfo(torch.get_autocast_dtype(kind)).eps)
        unit = 2 * torch.finfo(y.dtype).eps + (coarse if acc == torch.float32 else 0)
        for expert, weight in zip(experts[0].tolist(), weights[0].tolist(), strict=True):
            if expert >= len(tensors[0]):
                continue  # a slot without an expert
            both, down = (t[expert].double() for t in tensors)
            if both.shape[-1] != len(first):
                both, down = both.T, down.T
            if both.shape[-1] != len(first) or down.shape[-1] * 2 != both.shape[0]:
                raise _refusal(self.name, f"whose weights are {[list(t.shape) for t in tensors]}")
            gate, up = (both @ first).chunk(2)
            off = both.norm(dim=-1) * first.norm() * (unit + 8 * torch.finfo(acc).eps)
            off_gate, off_up = off.chunk(2)
            a = self._f.forward(gate.to(acc)).double()
            h = a * up
            # no activation of a language model is steeper than 1.2
            off_h = 1.2 * off_gate * up.abs() + a.abs() * off_up + 2 * unit * h.abs()
            expected += weight * (down @ h)
            limit += abs(weight) * (down.abs() @ off_h + 4 * unit * (down.abs() @ h.abs()))
        if (found := beyond(out, expected, 2 * limit)) is not None:
            raise _refusal(
                self.name,
                f"whose first token is {found[0]:.6g} for {found[1]:.6g}, not within rounding of "
                f"sum_e weight down (f(gate) up)",
            )


class ActivationPlace:
    """The activation of an MLP or of experts.

    Args:
        within: the MLP or the experts.
    """

    rules: tuple[str, ...] = ("activation",)

    def __init__(
        self, module: torch.nn.Module, name: str, layer: int | None, within: torch.nn.Module
    ):
        self.key, self.name, self.layer = module, name, layer
        self._within = within

    def install(self, scope: Scope) -> Iterable[Callable[[], None]]:
        def slope(x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                # without hooks, so without this one
                return torch.autograd.grad(self.key.forward(x).sum(), x)[0]

        def measure(change: torch.Tensor, plain: torch.Tensor) -> None:
            scope.report.changed("activation", change, plain)

        checked = False

        def replace(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            nonlocal checked
            said = scope.value(self, "activation")
            if said is None or not isinstance(output, torch.Tensor) or not output.requires_grad:
                return None
            scope.report.ran("activation", self.name)
            scope.report.acted("activation", self.name)
            if said == "gradient":
                return None
            x = first_tensor(args, kwargs)
            if x is output:
                raise self._refusal("which overwrites what it reads (inplace=True)")
            if not checked:
                self._check(x, output.detach())
                checked = True
            return secant(x, output, slope, measure)

        yield Uncopied.hook(self.key.register_forward_hook, replace, with_kwargs=True, prepend=True)
        yield _watch(self, self._within, scope)

    @torch.no_grad()
    def _check(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """That it is elementwise: numbers stay where others become 0."""
        if x.shape == y.shape:
            x, y = some_rows(x, y)
            kept = torch.arange(x.shape[-1], device=x.device) % 2 == 0
            # kernels round a number by its place in a vector
            off = (self.key.forward(x * kept) - y)[..., kept].nan_to_num(nan=0.0)
            if bool((off.abs() <= 8 * torch.finfo(y.dtype).eps * y.abs()[..., kept]).all()):
                return
        raise self._refusal("of which a number depends on others")

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(
            f"rules: activation must act on an elementwise f(x), got {self.name} "
            f"({type(self.key).__name__}), {reason}; leave the rule out"
        )
