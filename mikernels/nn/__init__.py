# SPDX-License-Identifier: Apache-2.0
"""SAE modules made of the operators."""

from mikernels.nn.batch_topk_sae import BatchTopKConfig, BatchTopKSAE
from mikernels.nn.config import SAEConfig
from mikernels.nn.cross_layer_transcoder import CrossLayerTranscoder, CrossLayerTranscoderConfig
from mikernels.nn.crosscoder import Crosscoder, CrosscoderConfig
from mikernels.nn.gated_sae import GatedConfig, GatedSAE
from mikernels.nn.geometric_median import geometric_median
from mikernels.nn.jumprelu_sae import JumpReLUConfig, JumpReLUSAE
from mikernels.nn.lista_matryoshka_sae import LISTAMatryoshkaConfig, LISTAMatryoshkaSAE
from mikernels.nn.matryoshka_sae import MatryoshkaConfig, MatryoshkaSAE
from mikernels.nn.relu_sae import ReLUConfig, ReLUSAE
from mikernels.nn.sae import SAE, SAEOutput
from mikernels.nn.topk_sae import TopKConfig, TopKSAE
from mikernels.nn.transcoder import (
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)

_VARIANTS: tuple[type[SAE], ...] = (
    TopKSAE,
    BatchTopKSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    LISTAMatryoshkaSAE,
    GatedSAE,
    ReLUSAE,
    Transcoder,
    SkipTranscoder,
    Crosscoder,
    CrossLayerTranscoder,
)
# what checkpoints and `mikernels train --arch` call them
ARCHITECTURES: dict[str, type[SAE]] = {v.architecture: v for v in _VARIANTS}

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "BatchTopKConfig",
    "BatchTopKSAE",
    "CrossLayerTranscoder",
    "CrossLayerTranscoderConfig",
    "Crosscoder",
    "CrosscoderConfig",
    "GatedConfig",
    "GatedSAE",
    "JumpReLUConfig",
    "JumpReLUSAE",
    "LISTAMatryoshkaConfig",
    "LISTAMatryoshkaSAE",
    "MatryoshkaConfig",
    "MatryoshkaSAE",
    "ReLUConfig",
    "ReLUSAE",
    "SAEConfig",
    "SAEOutput",
    "SkipTranscoder",
    "SkipTranscoderConfig",
    "TopKConfig",
    "TopKSAE",
    "Transcoder",
    "TranscoderConfig",
    "geometric_median",
]
