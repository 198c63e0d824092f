# SPDX-License-Identifier: Apache-2.0
"""What SAELens keeps beside the weights, folded into them: other numbers, the same function.

With c, s and h as in `__init__.py`, and q = (1 - c) b_dec W_enc, what the input's centring by b_dec
would take away:

    w_enc = s W_enc^T,  b_enc = s (b_enc + q),  w_dec = W_dec / s       h and x^ are the same
    gated: b_enc = b_gate + q,  b_mag = b_mag + exp(r_mag) q            gate and magnitude are

Transcoders have nothing to fold: neither they nor ours centre their input.
"""

from __future__ import annotations

import torch

from mikernels.integrations.saelens.config import Config
from mikernels.integrations.saelens.form import NAMES


def folded(config: Config, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file, by our names, for an encoder without scaling that reads x - b_dec.

    In the configuration's dtype; float32 where half precision would lose what is folded. Thresholds
    are float32, as ours are.
    """
    centre = not config.centred and not config.form.transcodes
    dtype = config.dtype
    if (centre or config.rescaled) and dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    # rounded first to what the configuration says, as SAELens does
    w = {NAMES[name]: t.to(config.dtype).to(dtype) for name, t in weights.items()}
    if "threshold" in w:
        w["threshold"] = weights["threshold"].float()
    if centre:
        q = w["b_dec"].double() @ w["w_enc"].double()
        w["b_enc"] = (w["b_enc"].double() + q).to(dtype)
        if "b_mag" in w:
            w["b_mag"] = (w["b_mag"].double() + w["r_mag"].double().exp() * q).to(dtype)
    if config.rescaled:
        scale = torch.linalg.vector_norm(w["w_dec"], dim=1, dtype=torch.float64).to(dtype)
        w["w_enc"], w["b_enc"] = w["w_enc"] * scale, w["b_enc"] * scale
        w["w_dec"] = w["w_dec"] / torch.where(scale > 0, scale, 1)[:, None]  # 0 stays 0
    w["w_enc"] = w["w_enc"].T
    return w
