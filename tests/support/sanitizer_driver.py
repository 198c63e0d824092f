# SPDX-License-Identifier: Apache-2.0
"""Runs every operator of an extension built with sanitizers: `sanitizer_driver.py PATH_OF_C`.

Prints what it is about to do, so that the last line before a sanitizer's report names the culprit.
"""

import importlib.util
import sys
from contextlib import suppress
from pathlib import Path

import torch

# takes the place of the installed extension before mikernels imports it
spec = importlib.util.spec_from_file_location("mikernels._C", sys.argv[1])
extension = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)
sys.modules["mikernels._C"] = extension
sys.path.append(str(Path(__file__).parent))

from encode_cases import ADVERSARIAL, NON_FINITE  # noqa: E402
from groupmax_cases import group_counts  # noqa: E402
from op_samples import HOSTILE, LAYOUTS, SAMPLES, copies, mangled  # noqa: E402
from oracle import DTYPES, randint, randn  # noqa: E402
from pairwise_cases import POWERS, SPECIAL, near_ties  # noqa: E402
from threshold_cases import at_scores  # noqa: E402

import mikernels  # noqa: E402
from mikernels import (  # noqa: E402
    SparseCodes,
    groupmax_encode,
    row_topk,
    sparse_decode,
    topk_encode,
)
from mikernels._dispatch import OPS  # noqa: E402
from mikernels.ops.sae.threshold_encode import slots_above  # noqa: E402


def samples() -> None:
    for name, make in SAMPLES.items():
        for dtype in DTYPES:
            for layout, tensor in LAYOUTS.items():
                for n in (0, 1, 5, 17, 33):
                    print(name, dtype, layout, n)
                    for arguments in make(tensor, n, dtype):
                        OPS[name].default(*arguments)


def sizes() -> None:
    for n, d, n_features, k in (
        (1, 1, 1, 1),
        (3, 2, 70001, 64),
        (9, 1, 97, 97),
        (33, 31, 193, 7),
        (40, 65, 1000, 300),
        # several panels of weights
        (9, 768, 24577, 8),
    ):
        print("sizes", n, d, n_features, k)
        x, w = randn(n, d), randn(n_features, d, seed=1)
        row_topk(randint(n, n_features), k)
        for weights in (w, w.T.contiguous().T):
            codes = topk_encode(x, weights, k=k)
            sparse_decode(codes, weights)
            # unoptimised, each exact score of a wide row takes microseconds
            for floor in (0.0, float("-inf")) if d < 768 else (60.0,):
                slots_above(x, weights, None, None, floor)
            for groups in group_counts(n_features)[:2]:
                groupmax_encode(x, weights, k=groups)


def cases() -> None:
    for name, case in ADVERSARIAL.items():
        print("encode", name)
        arguments = case()
        arguments.pop("fp32_sums_overflow", None)
        topk_encode(**arguments)
        for groups in group_counts(len(arguments["w_enc"])):
            groupmax_encode(**{**arguments, "k": groups})
        floors = at_scores(name)
        operands = (floors.get(o) for o in ("x", "w_enc", "b_enc", "b_dec", "floor"))
        OPS["threshold_encode"].default(*operands)
    for name, poison in NON_FINITE.items():
        print("encode", name)
        operands = randint(9, 12), randint(301, 12, seed=1), randint(301, seed=2), randint(12)
        poison(*operands)
        codes = topk_encode(*operands[:3], k=33, b_dec=operands[3])
        groupmax_encode(*operands[:3], k=43, b_dec=operands[3])
        row_topk(codes.values, 5)
        sparse_decode(codes, operands[1])


def pair_sizes() -> None:
    for examples, positions, n, m, d in (
        (1, 1, 1, 1, 1),
        (3, 2, 97, 33, 17),
        (2, 5, 4, 131, 65),
        (1, 1, 2, 3, 1031),
        (1, 3, 130, 7, 513),
        (2, 1, 3, 300, 4),
    ):
        print("pair sizes", examples, positions, n, m, d)
        for dtype in DTYPES:
            delta = randn(examples, positions, n, d, dtype=dtype)
            grad = randn(examples, positions, m, d, dtype=dtype, seed=1)
            prefix, weights = torch.arange(m) % (n + 2), torch.ones(2, examples)
            a, b, mask = delta[:, 0], grad[:, 0].mT.contiguous().mT, randn(n, m, dtype=dtype)
            mikernels.pairwise_products(a, b, weight=a[0, 0])
            mikernels.second_moment(a, mask=a[..., 0] > 0)
            for given in (None, weights, weights[:0]):
                mikernels.edge_scores(delta, grad, prefix=prefix, weights=given)
                w_o = randn(n, d, m, dtype=dtype, seed=2)
                heads = delta, w_o, grad[..., :1].expand(*grad.shape[:3], m)
                mikernels.edge_scores_heads(*heads, prefix=n // 2, weights=given)
            mikernels.edge_mix(grad[:, :, 0], delta, mask)
            mikernels.positional_dot(grad[:, :, 0], a[0], torch.arange(n) % positions)
            mikernels.edge_topk(delta, grad, k=n + m, prefix=prefix)
            samples = delta.movedim(2, 0)[:, 0], grad.movedim(2, 0)[:1, 0].expand(n, -1, -1)
            mikernels.grad_gram(*samples)
            mikernels.grad_gram(*samples, *(t[:2] for t in samples), k=3)
            mikernels.block_norms(a, b.mT[:, :, : n + 1])
            mikernels.mass_threshold(delta, 0.7, abs=True)


def pair_cases() -> None:
    for name, change in SPECIAL.items():
        print("pairs", name)
        a, b = randint(50, 6), randint(43, 6, seed=1)
        change(a, b)
        for k in (1, 30, 2150, 2**63 - 1):
            mikernels.pairwise_topk(a, b, k=k)
            mikernels.pairwise_topk(a, k=k, by="value", upper=True)
        mikernels.pairwise_products(a, b)
    for name, powers in POWERS.items():
        print("pairs", name)
        a, b = randn(60, 20) * powers(60)[:, None], randn(53, 20, seed=1) * powers(53)[:, None]
        mikernels.pairwise_topk(a, b, k=40)
    mikernels.pairwise_topk(*near_ties(1e-6), k=40)
    mikernels.pairwise_topk(randn(12, 20011), k=30)
    # fractions and entries that the public function refuses
    for x in (randn(40), torch.tensor([float("nan"), 1, -1, float("inf")])):
        for frac in (-1.0, 2.0, float("nan")):
            print("mass_threshold", frac)
            for absolute in (False, True):
                with suppress(RuntimeError):
                    OPS["mass_threshold"].default(x, frac, absolute)


def attention() -> None:
    for h, g, t, s, e, f, options in (
        (1, 1, 1, 1, 1, 1, {}),
        (4, 1, 70, 131, 17, 70, {"causal": True, "temperature": 2.0}),
        (2, 2, 65, 64, 141, 5, {"window": 3, "softcap": 2.0, "temperature": 3.0}),
        (2, 1, 66, 9, 16, 16, {"causal": True, "window": 2}),
    ):
        print("attention", h, g, t, s, e, f)
        for dtype in DTYPES:
            q, out = randn(2, h, t, e, dtype=dtype), randn(2, h, t, f, dtype=dtype)
            k, v = randn(2, g, s, e, dtype=dtype), randn(2, s, g, f, dtype=dtype).transpose(1, 2)
            bias = randn(1, h, 1, s, dtype=dtype)
            for masks in ({}, {"bias": bias, "keep": randn(2, 1, t, s) > 1}):
                mikernels.attention_gradients(out, q, k, v, out, **options, **masks)


def gradients() -> None:
    print("gradients")
    leaves = [randn(*s).requires_grad_() for s in ((33, 17), (203, 17), (203,), (203, 17), (17,))]
    x, w_enc, b_enc, w_dec, b_dec = leaves
    codes = topk_encode(x, w_enc, b_enc, k=5, b_dec=b_dec)
    sparse_decode(codes, w_dec, b_dec, prefixes=[9, 203]).square().sum().backward()
    row_topk(x, 3)[0].sum().backward()
    leaves = [randn(*s).requires_grad_() for s in ((2, 3, 5, 9), (2, 3, 7, 9), (5, 7), (9,))]
    delta, grad, mask, weight = leaves
    mixed = mikernels.edge_mix(grad, delta, mask)
    for weights in (None, torch.ones(2, 2)):
        mikernels.edge_scores(delta, mixed, prefix=3, weights=weights).sum().backward(
            retain_graph=True
        )
    mikernels.pairwise_products(delta[0], grad[0], weight=weight).square().sum().backward()


def hostile() -> None:
    for name, (op, arguments) in HOSTILE.items():
        print("hostile", name)
        try:
            OPS[op].default(*arguments)
        except (RuntimeError, TypeError, ValueError):
            continue
        sys.exit(f"{name}: accepted")
    for name, make in SAMPLES.items():
        print("mangled", name)
        for arguments in make(LAYOUTS["dense"], 5, torch.float32):
            for _, bad in mangled(arguments):
                with suppress(RuntimeError, TypeError, ValueError):
                    OPS[name].default(*copies(bad))
    for index in (6, -1, 2**40):
        print("hostile index", index)
        codes = SparseCodes(torch.ones(2, 2), torch.tensor([[0, 1], [2, 3]]), 6)
        codes.indices[1, 1] = index
        try:
            sparse_decode(codes, torch.ones(6, 3))
        except RuntimeError:
            continue
        sys.exit(f"index {index}: accepted")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    for level in mikernels.supported_levels():
        with mikernels.force_level(level):
            print("level", level)
            for part in (
                samples,
                sizes,
                cases,
                pair_sizes,
                pair_cases,
                attention,
                gradients,
                hostile,
            ):
                part()
    print("clean", *mikernels.supported_levels())
