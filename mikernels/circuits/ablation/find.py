# SPDX-License-Identifier: Apache-2.0
"""Where the components that are named are, in this model: structure, checked by arithmetic in a
pass of two tokens (`mikernels.models.watch`, `neurons`, `experts`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch

from mikernels.circuits.ablation.expert_place import ExpertPlace
from mikernels.circuits.ablation.feature_place import FeaturePlace
from mikernels.circuits.ablation.names import Part
from mikernels.circuits.ablation.place import Place, Slices
from mikernels.circuits.passes import run
from mikernels.circuits.prompts import embeddings
from mikernels.models.claims import Claims
from mikernels.models.experts import experts_of, watch_experts
from mikernels.models.neurons import Neurons, NeuronWatch
from mikernels.models.parts import Block, Decoder, Tap
from mikernels.models.watch import Flow, Watch
from mikernels.nn.sae import SAE

# in the order in which a block gets to them
KINDS = ("input", "head", "attn", "neuron", "expert", "mlp", "feature")


def _runs(decoder: Decoder, parts: Sequence[Part]) -> tuple[list[Flow], dict[int, Neurons | None]]:
    """How the blocks are connected, and their neurons."""

    def layers(kind: str) -> list[int]:
        return sorted({part.layer for part in parts if part.kind == kind})

    w_o = [decoder.w_o(block) for block in decoder.blocks] if layers("head") else []
    weight = embeddings(decoder)
    device = next(decoder.model.parameters()).device if weight is None else weight.device
    claims = Claims(None)
    # inside of inference mode nothing says what is changed in place
    with ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
        watch = Watch(decoder, None, w_o, stack)
        neurons = NeuronWatch(decoder, layers("neuron"), stack)
        for layer in layers("expert"):
            watch_experts(decoder, decoder.blocks[layer], claims, stack)
        # of one token alone the embedding may be 0, as padding's is; with the mask that they are
        # not padding
        ids = torch.tensor([[0, 1]], device=device)
        run(decoder, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, last=True)
        watch.check()
    claims.check(decoder.refusal)
    return watch.flows, neurons.found


def _neurons(where: str, found: Neurons | None, own: Sequence[Part]) -> Neurons:
    first = own[0]
    if found is None:
        raise ValueError(
            f"{where}: names must be components of the model, got {first.name!r}, where no layer "
            f"returns what the MLP does (it is a mixture of experts, or does more); name "
            f"L{first.layer}.mlp"
        )
    for part in own:
        if part.number >= found.n:
            raise ValueError(
                f"{where}: names must be of neurons 0..{found.n - 1} of block {part.layer}, got "
                f"{part.name!r}; count from 0"
            )
    return found


def _site(place: str, block: Block, flow: Flow) -> Tap:
    if place == "residual":
        return Tap(block.module)
    if place == "attn_out":
        return Tap(flow.attention_writer)
    assert block.mlp_reader is not None and flow.mlp_writer is not None
    return Tap(block.mlp_reader, before=True) if place == "mlp_in" else Tap(flow.mlp_writer)


def find_places(
    where: str, decoder: Decoder, parts: Sequence[Part], saes: Mapping[str, SAE]
) -> list[Place]:
    """One place for all components of a block that are of one tensor, in the order of the model.

    Args:
        where: of messages: the public function. parts: of `read_names`. saes: of `read_saes`.

    Raises:
        ValueError: for neurons that the model has not, and a model whose arithmetic is another.
    """
    flows, neurons = _runs(decoder, parts)
    together: dict[tuple[int, int, str], list[int]] = defaultdict(list)
    for i, part in enumerate(parts):
        together[part.layer, KINDS.index(part.kind), part.place].append(i)
    found: list[Place] = []
    d = decoder.d
    for (layer, kind, place), members in sorted(together.items()):
        block, flow = decoder.blocks[layer], flows[layer]
        own = [parts[i] for i in members]
        name = own[0].name if len(own) == 1 else f"{own[0].name} and {len(own) - 1} more"
        numbers = [part.number for part in own]
        at = name, layer, members
        match KINDS[kind]:
            case "input":
                tap = Tap(block.module, before=True)
                found.append(Slices(*at, tap, d, [range(d)]))
            case "head":
                heads = decoder.heads(block)
                columns = [range(h * heads.size, (h + 1) * heads.size) for h in numbers]
                found.append(Slices(*at, block.z, heads.query * heads.size, columns))
            case "attn":
                found.append(Slices(*at, Tap(flow.attention_writer), d, [range(d)]))
            case "mlp":
                assert flow.mlp_writer is not None
                found.append(Slices(*at, Tap(flow.mlp_writer), d, [range(d)]))
            case "neuron":
                mlp = _neurons(where, neurons.get(layer), own)
                found.append(Slices(*at, mlp.tap, mlp.n, [range(n, n + 1) for n in numbers]))
            case "expert":
                experts = experts_of(block)
                assert experts is not None
                found.append(ExpertPlace(*at, experts, numbers))
            case _:
                sae = saes[f"{layer}.{place}"]
                found.append(FeaturePlace(*at, _site(place, block, flow), sae, numbers))
    return found
