# SPDX-License-Identifier: Apache-2.0
"""Runs every operator of an extension built with sanitizers: `sanitizer_driver.py PATH_OF_C`.

Prints what it is about to do, so that the last line before a sanitizer's report names the culprit.
"""

import importlib.util
import sys
from pathlib import Path

import torch

# takes the place of the installed extension before mikernels imports it
spec = importlib.util.spec_from_file_location("mikernels._C", sys.argv[1])
extension = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)
sys.modules["mikernels._C"] = extension
sys.path.append(str(Path(__file__).parent))

from encode_cases import ADVERSARIAL, NON_FINITE  # noqa: E402
from op_samples import HOSTILE, LAYOUTS, SAMPLES  # noqa: E402
from oracle import DTYPES, randint, randn  # noqa: E402

import mikernels  # noqa: E402
from mikernels import SparseCodes, row_topk, sparse_decode, topk_encode  # noqa: E402
from mikernels._dispatch import OPS  # noqa: E402


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
        (12, 768, 24577, 8),
    ):
        print("sizes", n, d, n_features, k)
        x, w = randn(n, d), randn(n_features, d, seed=1)
        row_topk(randint(n, n_features), k)
        for weights in (w, w.T.contiguous().T):
            codes = topk_encode(x, weights, k=k)
            sparse_decode(codes, weights)


def cases() -> None:
    for name, case in ADVERSARIAL.items():
        print("encode", name)
        arguments = case()
        arguments.pop("fp32_sums_overflow", None)
        topk_encode(**arguments)
    for name, poison in NON_FINITE.items():
        print("encode", name)
        operands = randint(9, 12), randint(301, 12, seed=1), randint(301, seed=2), randint(12)
        poison(*operands)
        codes = topk_encode(*operands[:3], k=33, b_dec=operands[3])
        row_topk(codes.values, 5)
        sparse_decode(codes, operands[1])


def gradients() -> None:
    print("gradients")
    leaves = [randn(*s).requires_grad_() for s in ((33, 17), (203, 17), (203,), (203, 17), (17,))]
    x, w_enc, b_enc, w_dec, b_dec = leaves
    codes = topk_encode(x, w_enc, b_enc, k=5, b_dec=b_dec)
    sparse_decode(codes, w_dec, b_dec, prefixes=[9, 203]).square().sum().backward()
    row_topk(x, 3)[0].sum().backward()


def hostile() -> None:
    for name, (op, arguments) in HOSTILE.items():
        print("hostile", name)
        try:
            OPS[op].default(*arguments)
        except RuntimeError:
            continue
        sys.exit(f"{name}: accepted")
    for index in (6, -1, 2**40):
        print("hostile index", index)
        codes = SparseCodes(torch.ones(2, 2), torch.tensor([[0, 1], [2, index]]), 6)
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
            for part in (samples, sizes, cases, gradients, hostile):
                part()
    print("clean", *mikernels.supported_levels())
