# SPDX-License-Identifier: Apache-2.0
"""Tensors of tokens x features that are there only when somebody looks.

A library's own code runs as it is. The products of activations with the encoder give a `Lazy`
tensor in place of `[..., F]` numbers (`encoder.leave_products`); what is done with it next decides
what is computed: `topk`, `relu`, a comparison, a product with the decoder, sums and counts go by
the codes (product.py, codes.py). Anything else, a hook or a line of the user's own, gets the dense
tensor, the same one every time and part of autograd's graph (tensor.py), and the ledger says what
asked for it.
"""

from mikernels.integrations.lazy.encoder import leave_products
from mikernels.integrations.lazy.tensor import Lazy, Ledger

__all__ = ["Lazy", "Ledger", "leave_products"]
