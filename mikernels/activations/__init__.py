# SPDX-License-Identifier: Apache-2.0
"""Where batches of activations come from: tensors, shards on disk, a model reading text."""

from mikernels.activations.model import ModelSource
from mikernels.activations.shards import ShardSource, write_shards
from mikernels.activations.sources import Rows, Source, SourceExhausted, TensorSource
from mikernels.activations.texts import TextFiles
from mikernels.models.sites import Site

__all__ = [
    "ModelSource",
    "Rows",
    "ShardSource",
    "Site",
    "Source",
    "SourceExhausted",
    "TensorSource",
    "TextFiles",
    "write_shards",
]
