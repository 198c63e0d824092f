# SPDX-License-Identifier: Apache-2.0
"""Attention under rules, whatever computes it.

Hugging Face models hand q, k, v and a mask to a function of their configuration (sdpa, eager, a
flash kernel), and use what it returns. Rules stand at that call, in this model's modules alone:

- factors go onto the gradients of q, k and v; a frozen pattern detaches q and k;
- a temperature leaves the function's own output, and replaces its backward. "fused" is
  `attention_gradients`, which needs q, k, v and what the arguments mean (mask, scale, soft-cap,
  window). It recomputes the output as well, and where that is not what the function returned,
  within rounding, it raises: an attention with sinks, position biases or a mask of its own is never
  taken for another. "two-pass" runs the function itself twice,

      o1 = f(q, k, v, scale)    o2 = f(q, k, v, scale / t), soft-cap / t, bias / t

  and takes dV from o1, dQ and dK from t o2: the gradients of `P' = softmax(S / t)` without the
  factor 1 / t, from any implementation whose scores are made of nothing else.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.models.claims import FACTORS as PRODUCT_FACTORS
from mikernels.models.rules.gradients import Measure, once, scaled
from mikernels.models.rules.preset import FROZEN
from mikernels.models.rules.scope import Scope, Uncopied
from mikernels.ops.attention.attention_gradients import attention_gradients, attention_gradients_op
from mikernels.rebind import rebound, within

RULES = ("softmax", "query", "key", "value")
# what a model's attention names in its own file, and calls
REGISTRY, EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"
# where accelerate's hooks put a module's forward
OLD = "_old_forward"
# arguments of attention functions that change what is computed, and that attention_gradients
# does not know; None is without
UNKNOWN = ("s_aux", "position_bias", "alibi", "head_mask", "relative_position_bias")
# of those, what does not enter the softmax
AFTER = ("head_mask",)

Attend = Callable[..., tuple[torch.Tensor, Any]]


class Call(NamedTuple):
    """One call of an attention function.

    Attributes:
        place: the module's name. function: what computes it. module: as handed to it. mask,
            options: its other arguments. causal: whether it masks later keys by itself.
        claims: where its backward puts what has to be checked. heed: places whose function was seen
            to heed `scaling`.
    """

    place: str
    function: Attend
    module: torch.nn.Module
    mask: torch.Tensor | None
    options: dict[str, Any]
    causal: bool
    claims: list[_Claim]
    heed: set[str]

    def run(self, *qkv: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """What the model would have of q, k and v."""
        return self.function(self.module, *qkv, self.mask, **self.options)

    def scale(self, q: torch.Tensor) -> float:
        """Of the products q k."""
        scale = self.options.get("scaling")
        return 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)

    def tempered(self, q: torch.Tensor, temperature: float) -> Call:
        """The call whose scores are these over the temperature."""
        options = {**self.options, "scaling": self.scale(q) / temperature}
        if options.get("softcap"):
            options["softcap"] = options["softcap"] / temperature
        mask = self.mask
        if isinstance(mask, torch.Tensor) and mask.is_floating_point():
            mask = mask / temperature
        return self._replace(mask=mask, options=options)

    @torch.no_grad()
    def check_heeds(self, temperature: float, *qkv: torch.Tensor) -> None:
        """Whether the function computes something else at another scale, of q, k and v that are not
        alike."""
        other = [
            torch.arange(t.numel(), device=t.device, dtype=torch.float64).square().cos()
            .reshape(t.shape).to(qkv[0].dtype)
            for t in qkv
        ]  # fmt: skip
        # a mask may leave nothing of the scores
        call = self._replace(mask=None)
        if torch.equal(call.run(*other)[0], call.tempered(other[0], temperature).run(*other)[0]):
            raise ValueError(
                f"rules: softmax must act on attention that heeds the argument scaling, got "
                f"{self.place}, whose function computes the same at another; leave the rule out, "
                f"or say attention='fused'"
            )


def masks_itself(
    name: str,
    module: torch.nn.Module,
    q: torch.Tensor,
    mask: Any,
    options: dict[str, Any],
) -> bool:
    """Whether a call of an implementation of this name leaves out later keys by itself."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    # eager attention has no mask but the one it is given
    alone = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2)
    return bool(causal) and alone and name != "eager" and q.shape[2] > 1


def meaning(call: Call, q: torch.Tensor, k: torch.Tensor) -> dict[str, Any]:
    """The arguments of attention_gradients that say what the call computes."""
    keep = bias = None
    mask = call.mask
    if mask is not None:
        # of flash attention: one row of keys for each text
        mask = mask[:, None, None] if mask.dim() == 2 else mask
        mask = mask[..., : k.shape[2]]
        keep, bias = (None, mask) if mask.is_floating_point() else (mask.bool(), None)
    return {
        "keep": keep,
        "bias": bias,
        "scale": call.scale(q),
        "softcap": float(call.options.get("softcap") or 0.0),
        "causal": call.causal,
        # where a mask was made, the window is in it
        "window": int(call.options.get("sliding_window") or 0) if call.causal else 0,
    }


def _queries(call: Call, q: torch.Tensor) -> torch.Tensor | None:
    """`[B, 1, T, 1]`, which queries are computed at all; None for all. Flash attention leaves out
    those of padding."""
    if call.mask is None or call.mask.dim() != 2:
        return None
    return call.mask[:, None, -q.shape[2] :, None].bool()


class _Claim(NamedTuple):
    """What the output of a call was off by, and what rounding explains, `[B, H, T]` each."""

    place: str
    error: torch.Tensor
    limit: torch.Tensor


def limits(call: Call, q: torch.Tensor, k: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """How far each query's output may be from that of these arguments, `[B, H, T]`, in units of the
    largest |v| of a column.

    A score S is rounded in the dtype of the model (and its product as `claims` has it), which
    changes the output by at most `exp(2 dS) - 1` times the largest |v|; rounding the pattern, by
    eps times that.

    Args:
        size: the largest |S| of each query.
    """
    acc = accumulate_dtype(q.dtype)
    # eager attention takes the softmax in fp32 also where all else is in fp64
    eps = max(torch.finfo(q.dtype).eps, torch.finfo(torch.float32).eps)
    coarse = PRODUCT_FACTORS[torch.get_float32_matmul_precision()] if acc == torch.float32 else 0.0
    sums = 8 * math.sqrt(q.shape[-1] / 3) * torch.finfo(acc).eps + coarse
    reach = q.to(acc).norm(dim=-1) * k.to(acc).norm(dim=-1).amax(-1).repeat_interleave(
        q.shape[1] // k.shape[1], 1
    )[..., None]  # fmt: skip
    rounded = 4 * eps * size + sums * abs(call.scale(q)) * reach
    keys = 8 * math.sqrt(k.shape[2] / 3) * torch.finfo(acc).eps
    return torch.expm1(2 * rounded) + 4 * eps + 2 * keys + coarse


def _claim(call: Call, q: torch.Tensor, k: torch.Tensor, checks: torch.Tensor) -> _Claim:
    """That the output was that of these arguments, within rounding."""
    error, limit = checks[..., 0], limits(call, q, k, checks[..., 1])
    if (queries := _queries(call, q)) is not None:
        error = error.where(queries[..., 0], 0)
    return _Claim(call.place, error, limit)


def _check(claims: list[_Claim]) -> None:
    """Raises where one does not hold; reads the device once where all do."""
    found = []
    # another thread may add to them
    while claims:
        found.append(claims.pop(0))
    if not found:
        return
    # a NaN of the model is not a disagreement; blocks may lie on several devices
    worst = [(c.error - c.limit).nan_to_num(nan=0.0).amax() for c in found]
    excess = torch.stack([one.to(worst[0].device) for one in worst]).tolist()
    for claim, over in zip(found, excess, strict=True):
        if over > 0:
            _refuse(claim)


def _refuse(claim: _Claim) -> None:
    wrong = (claim.error > claim.limit).nonzero()
    b, h, i = wrong[0].tolist()
    raise ValueError(
        f"rules: softmax must act on attention that computes softmax(q k^T) v from its arguments, "
        f"got {claim.place}, whose output for query {i} of head {h} in row {b} is "
        f"{float(claim.error[b, h, i]):.3g} of its largest value away from that, with rounding "
        f"{float(claim.limit[b, h, i]):.2g} ({len(wrong)} of {claim.error.numel()} queries); leave "
        f"the rule out, or say attention='two-pass'"
    )


def _leaves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_()


def _constant(ctx: Any, weights: Any) -> Any:
    """What a function returns beside its output, of which there are no gradients."""
    if isinstance(weights, torch.Tensor):
        weights = weights.detach()
        ctx.mark_non_differentiable(weights)
    return weights


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: Call,
        temperature: float,
        measure: Measure,
    ) -> Any:
        # with gradients, because that is what a function may choose its kernel by
        with torch.enable_grad():
            out, weights = call.run(*_leaves(q, k, v))
        out = out.detach()
        ctx.call, ctx.temperature, ctx.measure = call, temperature, measure
        ctx.save_for_backward(q, k, v, out)
        return out, _constant(ctx, weights)

    @staticmethod
    @once
    def backward(ctx: Any, saved: Any, grad: torch.Tensor, *rest: Any) -> Any:
        call, out = ctx.call, saved[-1]
        # autocast: what the function made of them
        q, k, v = (t.to(out.dtype) for t in saved[:-1])
        dq, dk, dv, checks = attention_gradients(
            grad.transpose(1, 2), q, k, v, out.transpose(1, 2),
            **meaning(call, q, k), temperature=ctx.temperature,
        )  # fmt: skip
        if checks.numel():
            call.claims.append(_claim(call, q, k, checks))
            # at the end of this backward pass, all layers at once
            torch.autograd.Variable._execution_engine.queue_callback(partial(_check, call.claims))
        ctx.measure(checks[..., 2].sum(), checks[..., 3].sum())
        found = (t.to(like.dtype) for t, like in zip((dq, dk, dv), saved[:-1], strict=True))
        return *found, None, None, None


class _TwoPass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: Call,
        temperature: float,
        measure: Measure,
    ) -> Any:
        with torch.enable_grad():
            first, second = _leaves(q, k, v), _leaves(q, k, v)
            out, weights = call.run(*first)
            tempered, _ = call.tempered(q, temperature).run(*second[:2], v.detach())
        # for `once`
        ctx.save_for_backward(q, k, v)
        ctx.graphs = (out, first), (tempered, second[:2])
        ctx.temperature, ctx.measure, ctx.call = temperature, measure, call
        return out.detach(), _constant(ctx, weights)

    @staticmethod
    @once
    def backward(ctx: Any, saved: Any, grad: torch.Tensor, *rest: Any) -> Any:
        if ctx.graphs is None:
            raise RuntimeError(
                "rules: attention='two-pass' must be differentiated once, got a second backward; "
                "run the model again"
            )
        (out, first), (tempered, second) = ctx.graphs
        ctx.graphs = None
        true_q, true_k, dv = torch.autograd.grad(out, first, grad)
        call = ctx.call
        if call.place not in call.heed:
            same = torch.equal(out, tempered)
            if same and bool(true_q.any()):
                call.check_heeds(ctx.temperature, *first)
            if not same:
                call.heed.add(call.place)
        dq, dk = (g * ctx.temperature for g in torch.autograd.grad(tempered, second, grad))
        pairs = ((dq, true_q), (dk, true_k))
        ctx.measure(
            sum((a.float() - b.float()).square().sum() for a, b in pairs),
            sum(b.float().square().sum() for _, b in pairs),
        )
        return dq, dk, dv, None, None, None


class _Registry:
    """A model's registry of attention functions, each of them under rules."""

    def __init__(self, registry: Any, under: Callable[[str, Attend], Attend]):
        self._registry, self._under = registry, under

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)

    def __contains__(self, name: str) -> bool:
        return name in self._registry

    def __getitem__(self, name: str) -> Attend:
        return self._under(name, self._registry[name])

    def get_interface(self, name: str, default: Attend) -> Attend:
        found = self._registry.get_interface(name, default)
        # the default is what the module's file names, and under rules already
        return found if found is default else self._under(name, found)


def intercept(
    where: str,
    module: torch.nn.Module,
    name: str,
    under: Callable[[str, Attend], Attend],
    fix: str,
) -> Callable[[], None]:
    """Gives an attention module a copy of its forward with other attention functions.

    Args:
        where, fix: of messages. name: of the module.
        under: of an implementation's name and its function: what is called in its place.

    Returns:
        What makes the module as it was.

    Raises:
        ValueError: for a module that does not call a function of transformers' registry.
    """
    attribute = OLD if OLD in vars(module) else "forward"
    method = vars(module).get(attribute) or getattr(module, attribute)
    forward: Any = getattr(method, "__func__", None)
    if forward is None or getattr(method, "__self__", None) is not module:
        raise ValueError(
            f"{where}: attention must run its class's forward, got {name} with {method!r}; remove "
            f"what replaced it"
        )

    def changed(function: Any) -> Any:
        there = function.__globals__
        if REGISTRY not in function.__code__.co_names:
            raise ValueError(
                f"{where}: attention must call a function of transformers' {REGISTRY}, got {name} "
                f"({type(module).__name__}), which does not; {fix}"
            )
        names: dict[str, object] = {REGISTRY: _Registry(there[REGISTRY], under)}
        # not every model has one of its own
        if EAGER in there:
            names[EAGER] = under("eager", there[EAGER])
        return rebound(function, **names)

    before = vars(module).get(attribute)
    ours = Uncopied(MethodType(within(forward, changed), module))
    setattr(module, attribute, ours)

    def undo() -> None:
        # others (accelerate's hooks) may have put it elsewhere, and theirs in its place
        there = [name for name in (attribute, OLD) if vars(module).get(name) is ours]
        for name in there:
            if before is None and name == "forward":
                delattr(module, name)
            else:
                setattr(module, name, before or MethodType(forward, module))

    return undo


# module -> (how many scopes it stands in, what it was before)
_INSTALLED: WeakKeyDictionary[torch.nn.Module, tuple[int, Callable[[], None]]] = WeakKeyDictionary()
_PLACES: WeakKeyDictionary[torch.nn.Module, list[tuple[AttentionPlace, Scope]]] = (
    WeakKeyDictionary()
)
_LOCK = threading.RLock()


def attends(module: torch.nn.Module) -> bool:
    """Whether it calls an attention function of transformers by itself."""
    forward = inspect.unwrap(type(module).forward)
    return REGISTRY in getattr(getattr(forward, "__code__", None), "co_names", ())


def _attend(
    name: str,
    function: Attend,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    """An attention function, under the rules of the scopes that the module stands in."""
    q, k, v, mask = query, key, value, attention_mask
    said: dict[str, Any] = {}
    in_charge: dict[str, tuple[AttentionPlace, Scope]] = {}
    for place, scope in tuple(_PLACES.get(module, ())):
        for rule in RULES:
            if (holds := scope.value(place, rule)) is not None:
                said[rule], in_charge[rule] = holds, (place, scope)
    if not said or not any(t.requires_grad for t in (q, k, v)):
        return function(module, q, k, v, mask, **options)
    if options.get("dropout"):
        raise ValueError(f"rules: attention must have no dropout, got {options['dropout']}")
    for rule, (place, scope) in in_charge.items():
        scope.report.ran(rule, place.name)
        scope.report.acted(rule, place.name)
    softmax = said.get("softmax", 1.0)
    learned = isinstance(mask, torch.Tensor) and mask.requires_grad
    if softmax == FROZEN:
        q, k = q.detach(), k.detach()
        mask = mask.detach() if isinstance(mask, torch.Tensor) else mask
    q, k, v = (
        x if said.get(rule, 1.0) == 1.0 else scaled(x, said[rule])
        for x, rule in ((q, "query"), (k, "key"), (v, "value"))
    )
    if isinstance(softmax, str) or softmax == 1.0:
        return function(module, q, k, v, mask, **options)
    place, scope = in_charge["softmax"]
    fused = place.fused(q.device)
    if other := [n for n in UNKNOWN if options.get(n) is not None and (fused or n not in AFTER)]:
        more = "say attention='two-pass', or " if other[0] in AFTER else ""
        raise ValueError(
            f"rules: softmax must act on attention without {other[0]}, got {place.name} with it; "
            f"{more}leave the rule out"
        )
    if learned:
        raise ValueError(
            f"rules: softmax must act on attention whose mask is a constant, got {place.name} with "
            f"one that requires gradients; leave the rule out"
        )
    if fused and mask is not None and not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"rules: softmax must act on attention whose mask is a tensor, got {place.name} with a "
            f"{type(mask).__name__}; say attention='two-pass', or leave the rule out"
        )
    if not fused and name == "eager" and mask is not None and not mask.is_floating_point():
        # it may be added as it is, which has to be divided, or not
        raise ValueError(
            f"rules: attention_mask must be of a floating dtype in eager attention, got "
            f"{mask.dtype} in {place.name}; say attention='fused', or leave the rule out"
        )
    causal = masks_itself(name, module, q, mask, options)
    call = Call(place.name, function, module, mask, options, causal, scope.claims, scope.heed)

    def measure(change: torch.Tensor, plain: torch.Tensor) -> None:
        scope.report.changed("softmax", change, plain)

    replaced: type[torch.autograd.Function] = _Fused if fused else _TwoPass
    return replaced.apply(q, k, v, call, float(softmax), measure)


class AttentionPlace:
    """An attention module of Hugging Face transformers.

    Args:
        attention: as in `rules`.
    """

    rules: tuple[str, ...] = RULES

    def __init__(
        self, module: torch.nn.Module, name: str, layer: int | None, attention: str | None
    ):
        self.key, self.name, self.layer = module, name, layer
        self.attention = attention

    def fused(self, device: torch.device) -> bool:
        """Whether softmax's temperature is computed by attention_gradients there."""
        if self.attention is not None:
            return self.attention == "fused"
        kernel = "cpp" if device.type == "cpu" else "triton"
        return attention_gradients_op.state(kernel) == "ready"

    def install(self, scope: Scope) -> Iterable[Callable[[], None]]:
        def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            for rule in RULES:
                if scope.value(self, rule) is None:
                    continue
                given = (*args, *kwargs.values())
                if any(isinstance(x, torch.Tensor) and x.requires_grad for x in given):
                    scope.report.ran(rule, self.name)

        entry = self, scope
        with _LOCK:
            if self.key not in _INSTALLED:
                undo = intercept(
                    "rules", self.key, self.name, lambda n, f: partial(_attend, n, f),
                    f"leave out {', '.join(RULES)}",
                )  # fmt: skip
                _INSTALLED[self.key] = 0, undo
            count, undo = _INSTALLED[self.key]
            _INSTALLED[self.key] = count + 1, undo
            _PLACES.setdefault(self.key, []).append(entry)
        yield partial(self._leave, entry)
        yield Uncopied.hook(self.key.register_forward_pre_hook, enter, with_kwargs=True)

    def _leave(self, entry: tuple[AttentionPlace, Scope]) -> None:
        with _LOCK:
            _PLACES[self.key].remove(entry)
            count, undo = _INSTALLED.pop(self.key)
            if count > 1:
                _INSTALLED[self.key] = count - 1, undo
            else:
                undo()
