# SPDX-License-Identifier: Apache-2.0
"""Where backward rules act in a HookedTransformer: at its hook points.

    norm        scale = hook_scale(scale) is detached
    query, key  what the scores are made of: hook_rot_q, else q_norm, else hook_q; and so for k
    value       hook_v
    softmax     hook_pattern(P), with the gradient `P' (dP - sum_j P' dP)`, P' = softmax(S / t), of
                the scores S that hook_attn_scores returned; or detached
    gate, up    hook_pre and hook_pre_linear; of experts hook_gate and hook_pre
    activation  hook_post (hook_mid where a norm follows), of what hook_pre returned

The model forms the pattern in any case, so a temperature costs a softmax of its size more.

The library's own hooks stay, and stay right. Rules hook a point anew at each call of the module
around it: after all that others put there where a value is read (the scores that enter the softmax
are those that a knockout left), before them where one is replaced (an edited pattern is an edit of
the rule's pattern). Others' backward hooks see the gradients under the rules.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.models.claims import some_rows
from mikernels.models.parts import Block, first_tensor, is_hook_point
from mikernels.models.rules.gradients import Measure, beyond, once, scaled, secant
from mikernels.models.rules.preset import FROZEN, GRADIENT
from mikernels.models.rules.scope import Place, Scope, Uncopied

NORM_POINTS = ("hook_scale", "hook_normalized")
MLP_POINTS = ("hook_pre", "hook_pre_linear")

# (what the point was given, what is there after the hooks so far) -> in its place; None for that
See = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]


class Point(NamedTuple):
    """A hook for one call. first: before others' hooks, else after them."""

    module: torch.nn.Module
    see: See
    first: bool = False


def _points(module: torch.nn.Module, *names: str) -> list[torch.nn.Module] | None:
    """Its hook points of these names; None unless it has all of them."""
    found = [module._modules.get(name) for name in names]
    points = [point for point in found if point is not None and is_hook_point(point)]
    return points if len(points) == len(names) else None


def _at_each_call(
    module: torch.nn.Module, start: Callable[[torch.Tensor], Iterable[Point]]
) -> Iterator[Callable[[], None]]:
    """Hooks a module's points while it runs, for the thread that runs it; yields what ends that."""
    running: dict[int, list[Callable[[], None]]] = {}

    def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        owner = threading.get_ident()

        def guarded(see: See) -> Callable[..., torch.Tensor | None]:
            def hook(point: torch.nn.Module, args: Any, output: Any) -> torch.Tensor | None:
                return see(args[0], output) if threading.get_ident() == owner else None

            return hook

        x = first_tensor(args, kwargs)
        for point, see, first in start(x) if isinstance(x, torch.Tensor) else ():
            handle = point.register_forward_hook(guarded(see), prepend=first)
            running.setdefault(owner, []).append(handle.remove)

    def leave(*call: Any) -> None:
        for remove in running.pop(threading.get_ident(), ()):
            remove()

    def end() -> None:
        # what an interrupt left
        for handles in list(running.values()):
            for remove in handles:
                remove()
        running.clear()

    yield Uncopied.hook(module.register_forward_pre_hook, enter, with_kwargs=True)
    yield Uncopied.hook(module.register_forward_hook, leave, always_call=True)
    yield end


class Form(NamedTuple):
    """What hook_normalized is given: centred, with a mean taken off; affine, with gain and bias
    (TransformerLens 2's LayerNorm), which come after it otherwise."""

    centred: bool
    affine: bool

    def normed(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """x over scale, without its mean if centred."""
        return (x - x.mean(-1, keepdim=True) if self.centred else x) / scale


class NormPlace:
    """A norm with hook points for its scale and for what it normed."""

    rules: tuple[str, ...] = ("norm",)

    def __init__(self, module: torch.nn.Module, name: str, layer: int | None):
        self.key, self.name, self.layer = module, name, layer

    def install(self, scope: Scope) -> Iterable[Callable[[], None]]:
        scale_at, normed_at = (self.key.get_submodule(name) for name in NORM_POINTS)
        form: Form | None = None

        def start(x: torch.Tensor) -> Iterable[Point]:
            said = scope.value(self, "norm")
            if said is None or not x.requires_grad:
                return
            scope.report.ran("norm", self.name)
            if said == GRADIENT:
                scope.report.acted("norm", self.name)
                return
            seen: list[torch.Tensor] = []

            def freeze(given: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
                return scale.detach()

            def keep(given: torch.Tensor, scale: torch.Tensor) -> None:
                seen.append(scale.detach())

            def normed(y: torch.Tensor, edited: torch.Tensor) -> None:
                nonlocal form
                scope.report.acted("norm", self.name)
                if form is None:
                    form = self._form(*some_rows(x, seen[-1], y))
                if y.requires_grad:
                    # what was normed is y, unless it has a gain
                    kept = x if form.affine else y
                    y.register_hook(self._measure(kept.detach(), seen[-1], form, scope))

            yield Point(scale_at, freeze, first=True)
            yield Point(scale_at, keep)
            yield Point(normed_at, normed, first=True)

        yield from _at_each_call(self.key, start)

    def _form(self, x: torch.Tensor, scale: torch.Tensor, y: torch.Tensor) -> Form:
        """What y is of x.

        Raises:
            ValueError: nothing that is known.
        """
        acc = accumulate_dtype(y.dtype)
        wide, got = x.to(acc), y.to(acc)
        weight: Any = getattr(self.key, "w", None)
        bias: Any = getattr(self.key, "b", None)
        # the mean is rounded at the size of x
        size = (wide.abs().amax(-1, keepdim=True) + wide.abs()) / scale
        first: tuple[float, float] | None = None
        for affine in (False, True) if weight is not None else (False,):
            gain = weight.detach().to(acc) if affine else got.new_ones(())
            moved = got.new_zeros(()) if not affine or bias is None else bias.detach().to(acc)
            limit = 4 * torch.finfo(y.dtype).eps * (size * gain.abs() + moved.abs())
            for form in (Form(True, affine), Form(False, affine)):
                expected = form.normed(wide, scale) * gain + moved
                if (found := beyond(got, expected, limit)) is None:
                    return form
                first = first or found
        assert first is not None
        raise ValueError(
            f"rules: norm must be (x - mean) / scale or x / scale of its hook_scale, got "
            f"{self.name}, whose hook_normalized is given {first[0]:.6g} for {first[1]:.6g}; leave "
            f"the rule out"
        )

    def _measure(
        self, kept: torch.Tensor, scale: torch.Tensor, form: Form, scope: Scope
    ) -> Callable[[torch.Tensor], None]:
        """The true gradient is `u - c`, `c = n mean(u n)`, of u the rule's and n what is normed."""

        weight: Any = getattr(self.key, "w", None)

        def measure(grad: torch.Tensor) -> None:
            acc = accumulate_dtype(grad.dtype)
            u, n = grad.to(acc) / scale, kept.to(acc)
            if form.affine:
                u, n = u * weight.detach(), form.normed(n, scale)
            u = u - u.mean(-1, keepdim=True) if form.centred else u
            c = n * (u * n).mean(-1, keepdim=True)
            scope.report.changed("norm", c.square().sum(), (u - c).square().sum())

        return measure


class _Tempered(torch.autograd.Function):
    @staticmethod
    def forward(
        scores: torch.Tensor, pattern: torch.Tensor, temperature: float, measure: Measure
    ) -> torch.Tensor:
        return pattern.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        scores, pattern, ctx.temperature, ctx.measure = inputs
        ctx.save_for_backward(scores, pattern)

    @staticmethod
    @once
    def backward(ctx: Any, saved: Any, grad: torch.Tensor) -> Any:
        scores, pattern = saved
        acc = accumulate_dtype(scores.dtype)
        wide, true = grad.to(acc), pattern.to(acc)
        # a query that sees no key has no pattern
        tempered = _softmax(scores.to(acc) / ctx.temperature)
        ds, ds_true = (p * (wide - (p * wide).sum(-1, keepdim=True)) for p in (tempered, true))
        ctx.measure((ds - ds_true).square().sum(), ds_true.square().sum())
        return ds.to(scores.dtype), None, None, None


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1).nan_to_num(nan=0.0)


class AttentionPlace:
    """The attention of a block."""

    rules: tuple[str, ...] = ("softmax", "query", "key", "value")

    def __init__(self, module: torch.nn.Module, name: str, layer: int | None):
        self.key, self.name, self.layer = module, name, layer

    def install(self, scope: Scope) -> Iterable[Callable[[], None]]:
        parts = self.key._modules
        last = {
            rule: next(p for p in (parts.get(name) for name in names) if p is not None)
            for rule, names in (
                ("query", ("hook_rot_q", "q_norm", "hook_q")),
                ("key", ("hook_rot_k", "k_norm", "hook_k")),
                ("value", ("hook_v",)),
            )
        }
        checked = False

        def factor(rule: str, said: float) -> Point:
            def see(given: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
                scope.report.acted(rule, self.name)
                return None if said == 1.0 else scaled(x, said)

            return Point(last[rule], see, first=True)

        def softmax(said: str | float) -> Iterable[Point]:
            scores: list[torch.Tensor] = []

            def keep(given: torch.Tensor, x: torch.Tensor) -> None:
                scores.append(x)

            def measure(change: torch.Tensor, plain: torch.Tensor) -> None:
                scope.report.changed("softmax", change, plain)

            def replace(pattern: torch.Tensor, edited: torch.Tensor) -> torch.Tensor | None:
                nonlocal checked
                scope.report.acted("softmax", self.name)
                if said == FROZEN:
                    return pattern.detach()
                if isinstance(said, str) or said == 1.0:
                    return None
                if not checked:
                    self._check(*some_rows(scores[-1], pattern))
                    checked = True
                return _Tempered.apply(scores[-1], pattern.detach(), float(said), measure)

            yield Point(parts["hook_attn_scores"], keep)  # type: ignore[arg-type]
            yield Point(parts["hook_pattern"], replace, first=True)  # type: ignore[arg-type]

        def start(x: torch.Tensor) -> Iterable[Point]:
            for rule in self.rules:
                if (said := scope.value(self, rule)) is None or not x.requires_grad:
                    continue
                scope.report.ran(rule, self.name)
                yield from softmax(said) if rule == "softmax" else (factor(rule, said),)

        yield from _at_each_call(self.key, start)

    def _check(self, scores: torch.Tensor, pattern: torch.Tensor) -> None:
        acc = accumulate_dtype(scores.dtype)
        expected = _softmax(scores.to(acc))
        limit = 16 * torch.finfo(pattern.dtype).eps * expected
        limit += torch.finfo(pattern.dtype).smallest_normal
        if (found := beyond(pattern.to(acc), expected, limit)) is not None:
            raise ValueError(
                f"rules: softmax must act on attention whose hook_pattern is given the softmax of "
                f"what hook_attn_scores returned, got {self.name}, where it is {found[0]:.6g} for "
                f"{found[1]:.6g}; leave the rule out"
            )


class _Valued(torch.autograd.Function):
    """The value of one with the gradient of the other."""

    @staticmethod
    def forward(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, grad


class MlpPlace:
    """An MLP or an expert: `f(pre)`, or `f(gate) up + b_in`.

    Args:
        gated: whether there is an up.
    """

    def __init__(self, module: torch.nn.Module, name: str, layer: int | None, gated: bool):
        self.key, self.name, self.layer = module, name, layer
        self._gated = gated
        self.rules: tuple[str, ...] = ("gate", "up", "activation") if gated else ("activation",)

    def install(self, scope: Scope) -> Iterable[Callable[[], None]]:
        # of experts hook_pre is up, of MLPs it is what f reads
        names = ("hook_gate", "hook_pre") if "hook_gate" in self.key._modules else MLP_POINTS
        parts = self.key._modules
        after = "hook_mid" if "hook_mid" in parts else "hook_post"
        points = {"gate": parts[names[0]], "up": parts.get(names[1]), "h": parts[after]}
        checked = False

        def start(x: torch.Tensor) -> Iterable[Point]:
            asked = {rule: scope.value(self, rule) for rule in self.rules}
            said = {rule: value for rule, value in asked.items() if value is not None}
            if not said or not x.requires_grad:
                return
            for rule in said:
                scope.report.ran(rule, self.name)
            seen: dict[str, torch.Tensor] = {}
            for side in ("gate", "up") if self._gated else ("gate",):
                point = points[side]
                if point is None:
                    continue
                if side in said:
                    yield Point(point, self._factor(scope, side, said[side]), first=True)
                yield Point(point, _kept(seen, side))

            def after(h: torch.Tensor, edited: torch.Tensor) -> torch.Tensor | None:
                nonlocal checked
                if not checked:
                    self._check(seen, h)
                    checked = True
                if "activation" not in said:
                    return None
                scope.report.acted("activation", self.name)
                if said["activation"] == GRADIENT:
                    return None
                return self._secant(seen, h, scope)

            yield Point(points["h"], after, first=True)  # type: ignore[arg-type]

        yield from _at_each_call(self.key, start)

    def _factor(self, scope: Scope, rule: str, said: float) -> See:
        def see(given: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
            scope.report.acted(rule, self.name)
            return None if said == 1.0 else scaled(x, said)

        return see

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(
            f"rules: {', '.join(self.rules)} must act on an MLP that computes an elementwise f(x), "
            f"or f(gate) up, got {self.name}, {reason}; leave them out"
        )

    def _f(self, x: torch.Tensor) -> torch.Tensor:
        f: Any = self.key.act_fn
        return f(x)

    def _check(self, seen: dict[str, torch.Tensor], h: torch.Tensor) -> None:
        """Whether h is the product, and f elementwise."""
        if not callable(getattr(self.key, "act_fn", None)):
            raise self._refusal("which names no act_fn")
        wanted = ("gate", "up") if self._gated else ("gate",)
        if seen.keys() < set(wanted):
            raise self._refusal(f"of which only {sorted(seen)} ran")
        x, *up, got = some_rows(*(seen[side] for side in wanted), h)
        with torch.no_grad():
            a = self._f(x)
            half = self._f(x[..., : x.shape[-1] // 2])
        unit = 8 * torch.finfo(h.dtype).eps
        whole = a[..., : x.shape[-1] // 2]
        if (found := beyond(half, whole, unit * whole.abs())) is not None:
            raise self._refusal(f"whose f of half a row is {found[0]:.6g} for {found[1]:.6g}")
        expected, size = a, a.abs()
        if self._gated:
            product, bias = a * up[0], self._bias(h).detach()
            expected, size = product + bias, product.abs() + bias.abs()
        limit = unit * size + torch.finfo(h.dtype).smallest_normal
        if (found := beyond(got, expected, limit)) is not None:
            one, other = found
            raise self._refusal(f"whose hook_post is given {one:.6g} where that is {other:.6g}")

    def _bias(self, h: torch.Tensor) -> torch.Tensor:
        # of experts W_in is a linear layer, with a bias of its own
        bias = getattr(self.key, "b_in", None)
        return bias.to(h.device) if isinstance(bias, torch.Tensor) else h.new_zeros(())

    def _secant(self, seen: dict[str, torch.Tensor], h: torch.Tensor, scope: Scope) -> torch.Tensor:
        def slope(x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(self._f(x).sum(), x)[0]

        def measure(change: torch.Tensor, plain: torch.Tensor) -> None:
            scope.report.changed("activation", change, plain)

        x = seen["gate"]
        if not self._gated:
            return secant(x, h, slope, measure)
        with torch.no_grad():
            a = self._f(x)
        return _Valued.apply(h, secant(x, a, slope, measure) * seen["up"] + self._bias(h))


def _kept(seen: dict[str, torch.Tensor], side: str) -> See:
    def see(given: torch.Tensor, x: torch.Tensor) -> None:
        seen[side] = x

    return see


def _mlp(module: torch.nn.Module, name: str, layer: int) -> MlpPlace | None:
    if _points(module, "hook_gate", "hook_pre", "hook_post"):
        return MlpPlace(module, name, layer, gated=True)
    if not _points(module, "hook_pre", "hook_post"):
        return None
    # where a norm follows the activation, nothing is gated
    gated = _points(module, *MLP_POINTS) and not _points(module, "hook_mid")
    return MlpPlace(module, name, layer, gated=bool(gated))


def places(model: torch.nn.Module, blocks: Iterable[Block]) -> list[Place]:
    """Norms (of blocks, of q and k, after embedding and activation, the final one), attention, MLPs
    and experts."""
    names = {module: name for name, module in model.named_modules()}
    layers = {part: b.index for b in blocks for part in b.module.modules()}
    found: list[Place] = [AttentionPlace(b.attention, names[b.attention], b.index) for b in blocks]
    for module, name in names.items():
        layer = layers.get(module)
        if _points(module, *NORM_POINTS):
            found.append(NormPlace(module, name, layer))
        elif layer is not None and (mlp := _mlp(module, name, layer)) is not None:
            found.append(mlp)
    return found
