# SPDX-License-Identifier: Apache-2.0
"""Judges of a trained SAE, on activations and text that it has not seen, without a network."""

from mikernels.evaluate.judged import Judged, as_judged
from mikernels.evaluate.probes import Probes, measure_probes
from mikernels.evaluate.random_sae import random_like
from mikernels.evaluate.reconstruction import (
    Reconstruction,
    measure_reconstruction,
    variance_unexplained,
)
from mikernels.evaluate.spliced import Spliced, measure_spliced
from mikernels.values.intervals import Interval

__all__ = [
    "Interval",
    "Judged",
    "Probes",
    "Reconstruction",
    "Spliced",
    "as_judged",
    "measure_probes",
    "measure_reconstruction",
    "measure_spliced",
    "random_like",
    "variance_unexplained",
]
