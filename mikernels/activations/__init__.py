# SPDX-License-Identifier: Apache-2.0
"""Where batches of activations come from: tensors, any stream of them, shards on disk, a model
reading text."""

from mikernels.activations.model import ModelSource
from mikernels.activations.shards import ShardSource, write_shards
from mikernels.activations.sources import Rows, Source, SourceExhausted, TensorSource
from mikernels.activations.streams import IterableSource
from mikernels.activations.texts import TextFiles
from mikernels.models.sites import Site

__all__ = [
    "IterableSource",
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
