# SPDX-License-Identifier: Apache-2.0
"""What an operator's arguments have to be, for the kernels that would not notice.

The C++ kernels check their own; launchers of Triton kernels and references are called behind this.
`{"values": "T[N,k]", "indices": "i64[N,k]", "w": "T[F,d]", "k": "1..F"}` reads:

    T, U      a floating dtype, the same wherever the letter stands
    acc       the accumulation dtype of T (fp32, or fp64)
    float     any floating dtype; number: int64 too
    i64       int64; bool: bool
    N, F+1, N*k, R|1   a size, the same wherever the letter stands; `...` is any shape
    1..F      an int, 0.. without a limit, 0..N*F up to a product
    n==m      a flag that goes with equal sizes only

Tensors that the schema calls optional may be None. An operand whose shape depends on whether
another one is given has two rules, `"T[N,k] or T[S] with row_offsets"`. Some 2 us for each tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TENSOR = re.compile(r"(T|U|acc|float|number|i64|bool)\[(.*)\]")
_EITHER = re.compile(r"(.*) or (.*) with (\w+)")
_EQUAL = re.compile(r"(\w+)==(\w+)")
_RANGE = re.compile(r"(\d+)\.\.([\w*]*)")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for the low precisions, the dtype itself otherwise."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


class Operands:
    """The rules of one operator, in the order of its arguments."""

    def __init__(
        self,
        op: str,
        names: Sequence[str],
        rules: Mapping[str, str],
        optional: Collection[str] = (),
    ):
        unknown = set(rules) - set(names)
        if unknown:
            raise ValueError(f"{op}: operands must name its arguments, got {sorted(unknown)}")
        self.op = op
        either = {name: found for name in rules if (found := _EITHER.fullmatch(rules[name]))}
        # where a deciding operand stands, and the rules that hold when it is given; those of this
        # object hold when none of them is
        self.otherwise: list[tuple[int, Operands]] = []
        for decider in dict.fromkeys(found[3] for found in either.values()):
            chosen = {name: found for name, found in either.items() if found[3] == decider}
            given = {**rules, **{name: found[2] for name, found in chosen.items()}}
            self.otherwise.append((names.index(decider), Operands(op, names, given, optional)))
            rules = {**rules, **{name: found[1] for name, found in chosen.items()}}
        self.optional = optional
        self.tensors: list[tuple[int, str, str, str, tuple[str, ...]]] = []
        self.ints: list[tuple[int, str, int, str]] = []
        self.flags: list[tuple[int, str, str, str]] = []
        for place, name in enumerate(names):
            rule = rules.get(name, "")
            if tensor := _TENSOR.fullmatch(rule):
                sizes = tuple(tensor[2].split(",")) if tensor[2] else ()
                self.tensors.append((place, name, rule, tensor[1], sizes))
            elif number := _RANGE.fullmatch(rule):
                self.ints.append((place, name, int(number[1]), number[2]))
            elif equal := _EQUAL.fullmatch(rule):
                self.flags.append((place, name, equal[1], equal[2]))
            elif rule:
                raise ValueError(f"{op}: {name} must follow the rules' form, got {rule!r}")

    def check(self, args: Sequence[Any]) -> None:
        """Raises TypeError or ValueError for arguments against the rules."""
        for decider, otherwise in self.otherwise:
            if args[decider] is not None:
                return otherwise.check(args)
        given = []
        for place, *rest in self.tensors:
            if args[place] is not None:
                given.append((*rest, args[place]))
            elif rest[0] not in self.optional:
                raise TypeError(f"{self.op}: {rest[0]} must be a tensor, got None")
        sizes: dict[str, int] = {}
        dtypes: dict[str, torch.dtype] = {}
        # a size or dtype is what the first tensor with its letter has
        for name, rule, kind, shape, t in given:
            if not isinstance(t, torch.Tensor):
                raise TypeError(f"{self.op}: {name} must be a tensor, got {type(t).__name__}")
            if shape != ("...",) and t.dim() != len(shape):
                self._refuse(name, rule, t)
            dtypes.setdefault(kind, t.dtype)
            for letter, size in zip(shape, t.shape, strict=False):
                if letter.isalpha():
                    sizes.setdefault(letter, size)
                elif letter.endswith("+1"):
                    sizes.setdefault(letter[:-2], size - 1)
        device = given[0][-1].device
        for name, rule, kind, shape, t in given:
            if not self._is(kind, t.dtype, dtypes) or (
                shape != ("...",)
                and not all(_fits(s, n, sizes) for s, n in zip(shape, t.shape, strict=True))
            ):
                self._refuse(name, rule, t)
            if t.device != device:
                raise ValueError(f"{self.op}: {name} must be on {device}, got {t.device}; move it")
        for place, name, least, most in self.ints:
            number = args[place]
            limit = math.prod(sizes[letter] for letter in most.split("*")) if most else ""
            if number < least or (most and number > limit):
                raise ValueError(f"{self.op}: {name} must be in {least}..{limit}, got {number}")

        for place, name, one, other in self.flags:
            if args[place] and sizes[one] != sizes[other]:
                raise ValueError(
                    f"{self.op}: {name} must be False for {sizes[one]} by {sizes[other]}, got True"
                )

    def _is(self, kind: str, dtype: torch.dtype, dtypes: Mapping[str, torch.dtype]) -> bool:
        if kind in ("i64", "bool"):
            return dtype == (torch.int64 if kind == "i64" else torch.bool)
        if kind == "acc":
            return dtype == accumulate_dtype(dtypes["T"])
        if kind == "number" and dtype == torch.int64:
            return True
        return dtype in FLOATS and (kind in ("float", "number") or dtype == dtypes[kind])

    def _refuse(self, name: str, rule: str, t: torch.Tensor) -> None:
        raise ValueError(
            f"{self.op}: {name} must be {rule} beside the other arguments (see "
            f"mikernels/_operands.py), got {t.dtype} {list(t.shape)}"
        )


def _fits(rule: str, size: int, sizes: Mapping[str, int]) -> bool:
    if rule.isalpha():
        return size == sizes[rule]
    if rule.endswith("+1"):
        return size == sizes[rule[:-2]] + 1
    if rule.endswith("|1"):
        return size == 1 or size == sizes[rule[:-2]]
    left, _, right = rule.partition("*")
    return size == sizes[left] * sizes[right]
