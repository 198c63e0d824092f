# SPDX-License-Identifier: Apache-2.0
"""`accelerate(obj)`: SAELens, dictionary_learning and sparsify, many times faster, unchanged.

The library's own code goes on running; of one given object some methods run with the products of
activations and the encoder left as lazy tensors (mikernels/integrations/lazy). Before anything is
touched, a small object of the same class is trained for a step with and without that, and both must
agree (certify.py). What a library's page of this folder says: its classes, which methods form the
products, and which of its autograd functions have a counterpart here.
"""

from mikernels.integrations.accelerate.api import accelerate, check
from mikernels.integrations.accelerate.report import Report

__all__ = ["Report", "accelerate", "check"]
