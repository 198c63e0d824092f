# SPDX-License-Identifier: Apache-2.0
"""Small SAEs for the tiny decoders, and the activations and gradients at their sites by hand."""

import torch
from decoder_cases import parts

from mikernels.nn import BatchTopKSAE, GatedSAE, JumpReLUSAE, SkipTranscoder, TopKSAE

OTHER = torch.tensor([[3, 14, 21, 9, 2], [6, 5, 35, 30, 9]])
PAIR = (7, 11)
D, F = 24, 40


def filled(sae, seed):
    """An SAE with random parameters in double precision, about half of whose features are active
    where they may."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
        if isinstance(sae, JumpReLUSAE):
            sae.threshold.abs_()
        for name, buffer in sae.named_buffers():
            if name.endswith("_scale"):
                buffer.copy_(torch.exp2(torch.arange(len(buffer)) - 1.0))
    return sae


def dictionaries():
    double = {"dtype": torch.float64}
    # the second reads what the first writes
    return {
        "0.mlp_in": filled(JumpReLUSAE(D, F, target_l0=5, **double), 3),
        "0.mlp_out": filled(SkipTranscoder(D, F, 4, **double), 0),
        "0.residual": filled(TopKSAE(D, F, 5, **double), 1),
        "1.attn_out": filled(BatchTopKSAE(D, F, 5, **double), 2),
        2: filled(GatedSAE(D, F, **double), 4),
    }


def at_sites(model, ids, pair=PAIR):
    """By hand: every site's activation and gradient, and the numbers of the prompts."""
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    found, handles = {}, []

    def keep(name):
        def hook(module, args, output):
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def first(module, args, output):
        return output.detach().requires_grad_()

    handles.append(model.get_input_embeddings().register_forward_hook(first))
    for layer, block in enumerate(blocks):
        attention, _, mlp = parts(model, layer)
        wrote = (attention, mlp)
        if hasattr(block, "post_feedforward_layernorm"):
            wrote = (block.post_attention_layernorm, block.post_feedforward_layernorm)
        at = dict(zip(("attn_out", "mlp_out"), wrote, strict=True))
        handles += [m.register_forward_hook(keep(f"{layer}.{n}")) for n, m in at.items()]
        handles.append(block.register_forward_hook(keep(f"{layer}.residual")))
        see = keep(f"{layer}.mlp_in")
        handles.append(mlp.register_forward_pre_hook(lambda m, args, see=see: see(m, (), args[0])))
    for p in model.parameters():
        p.requires_grad_(False)
    logits = model(ids).logits[:, -1]
    values = logits[:, pair[0]] - logits[:, pair[1]]
    grads = torch.autograd.grad(values.sum(), list(found.values()))
    for handle in handles:
        handle.remove()
    for p in model.parameters():
        p.requires_grad_(True)
    found = {name: x.detach() for name, x in found.items()}
    return found, dict(zip(found, grads, strict=True)), values.detach()


def dense(scores):
    """`[B, P, F]` of a site's scores in coordinate form."""
    total = torch.zeros(*scores.error.shape, scores.n_features, dtype=torch.float64)
    at = scores.prompts, scores.positions, scores.features
    return total.index_put(at, scores.scores.double(), accumulate=True)


def close(a, b):
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-9, atol=1e-11)
