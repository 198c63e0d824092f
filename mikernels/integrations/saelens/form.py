# SPDX-License-Identifier: Apache-2.0
"""What the format calls things: its files, architectures and tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
FORMAT_VERSION = "6.54.12"
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# in the metadata of `cfg.json`: the variant and its settings
SETTINGS = "mikernels_sae"


class Form(NamedTuple):
    """What files of an architecture hold beside W_enc, W_dec and b_dec.

    Attributes:
        features: tensors of `[F]`.
        transcodes: the output is not the input: it has a width of its own, and b_dec is of it.
        skips: there is a W_skip.
    """

    features: tuple[str, ...]
    transcodes: bool = False
    skips: bool = False

    def shapes(self, d: int, n_features: int, d_out: int) -> dict[str, list[int]]:
        return {
            "W_enc": [d, n_features],
            "W_dec": [n_features, d_out],
            "b_dec": [d_out],
            **{name: [n_features] for name in self.features},
            **({"W_skip": [d_out, d]} if self.skips else {}),
        }


FORMS = {
    "topk": Form(("b_enc",)),
    "standard": Form(("b_enc",)),
    "jumprelu": Form(("b_enc", "threshold")),
    "gated": Form(("b_gate", "r_mag", "b_mag")),
    "transcoder": Form(("b_enc",), transcodes=True),
    "skip_transcoder": Form(("b_enc",), transcodes=True, skips=True),
    "jumprelu_transcoder": Form(("b_enc", "threshold"), transcodes=True),
    "jumprelu_skip_transcoder": Form(("b_enc", "threshold"), transcodes=True, skips=True),
}
# what a variant is there; the first is what it is written as
ARCHITECTURES = {
    "topk": ("topk",),
    "batch_topk": ("jumprelu",),
    "matryoshka": ("jumprelu",),
    "jumprelu": ("jumprelu",),
    "gated": ("gated",),
    "relu": ("standard",),
    "transcoder": ("jumprelu_transcoder", "transcoder"),
    "skip_transcoder": ("jumprelu_skip_transcoder", "skip_transcoder"),
}
# names of tensors there and here; W_enc is the transpose of w_enc
NAMES = {
    "W_enc": "w_enc",
    "W_dec": "w_dec",
    "b_dec": "b_dec",
    "b_enc": "b_enc",
    "b_gate": "b_enc",
    "r_mag": "r_mag",
    "b_mag": "b_mag",
    "threshold": "threshold",
    "W_skip": "w_skip",
}
