# SPDX-License-Identifier: Apache-2.0
"""SAELens' on-disk format: a folder with `cfg.json` and `sae_weights.safetensors`.

The format is that of sae-lens 6 (checked against 6.54.12); sae-lens itself is not needed. It stores
`W_enc [d, F]`, `W_dec [F, d_out]` and `b_dec [d_out]`, for all but transcoders with d_out = d, and
what the architecture has beside them. With c = 1 when `apply_b_dec_to_input`, else 0 (always so for
transcoders), and s = |W_dec| (row norms) when `rescale_acts_by_decoder_norm`, which only "topk"
has, else 1, it computes

    h = s ((x - c b_dec) W_enc + b_enc),  x^ = (codes / s) W_dec + b_dec
    "topk":        codes = relu(top_k(h))
    "standard":    codes = relu(h)
    "jumprelu":    codes = relu(h) where h > threshold [F], else 0
    "gated":       codes = relu((x - c b_dec) (W_enc exp(r_mag)) + b_mag)  where h > 0, else 0,
                   with b_gate as b_enc
    "transcoder", "jumprelu_transcoder":             "standard", "jumprelu" with c = 0
    "skip_transcoder", "jumprelu_skip_transcoder":   x^ + x W_skip^T, W_skip [d_out, d]

| here | there |
|---|---|
| TopKSAE | "topk" |
| ReLUSAE | "standard" |
| GatedSAE | "gated" |
| JumpReLUSAE | "jumprelu" |
| BatchTopKSAE, MatryoshkaSAE | "jumprelu", as SAELens saves its own: all thresholds are the same |
| Transcoder, SkipTranscoder | "jumprelu_transcoder", "jumprelu_skip_transcoder", likewise |
| these with k = F and threshold 0 | "transcoder", "skip_transcoder" |

The other variants have no counterpart. `metadata.mikernels_sae` keeps the variant and its settings.

The variants are the case c = 1 (transcoders: 0), s = 1. Other files are folded into them on loading
(`fold.py`).
"""

from mikernels.integrations.saelens.export import export_sae
from mikernels.integrations.saelens.load import load_sae

__all__ = ["export_sae", "load_sae"]
