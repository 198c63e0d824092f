# SPDX-License-Identifier: Apache-2.0
"""Hugging Face decoders written out from their weights, with backward rules, in any dtype.

In float64 it is the truth for the rules; in float32 and bfloat16 the eager torch of the error-ratio
rule, which rounds where the models do: norms, softmax, angles and router in single precision, the
rest in the dtype. Nothing of `mikernels` and no forward of `transformers` is used: parameters,
`config`, and the buffers of the rotary embedding (frequencies) and of Gemma's embedding (scale).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from rules_algebra import Rules, Tensor, activated, gated, normed, pattern, scaled
from torch.nn import functional as F


class Result(NamedTuple):
    logits: Tensor  # [B, P, V]
    x0: Tensor  # [B, P, d], what the embedding gives; a leaf that requires a gradient
    stream: list[Tensor]  # what each block reads, then what the final norm reads
    # [B, P, k] of each block with experts: in a smaller dtype the choice may be another, and then
    # the result is another function's and not less exact
    chosen: list[Tensor]


class Family(NamedTuple):
    """What differs: names, the norm, how q, k and v lie in a projection."""

    # before attention, after it, before the MLP, after it
    norms: tuple[str | None, str | None, str | None, str | None] = (
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    )
    norm: str = "rms"
    root: str = "model"
    embedding: str = "embed_tokens"
    positions: tuple[str, int] | None = None  # learned ones, and how far they are moved
    blocks: str = "layers"
    final: str = "norm"
    attention: tuple[str, str] = ("self_attn", "o_proj")
    split: str = "separate"
    mlp: tuple[str, str, str] = ("mlp.", "", "down_proj")
    softcap: bool = False


SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
LLAMA = Family()
GEMMA = Family(norms=SANDWICH, norm="rms of 1 + w")
FAMILIES = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"), LLAMA),
    "phi3": Family(split="qkv_proj"),
    "gemma2": GEMMA._replace(softcap=True),
    "gemma3_text": GEMMA,
    "olmo2": Family(norms=(None, SANDWICH[1], None, SANDWICH[3]), norm="rms, gain in single"),
    "gpt2": Family(
        norms=("ln_1", None, "ln_2", None),
        norm="layer",
        root="transformer",
        embedding="wte",
        positions=("wpe", 0),
        blocks="h",
        final="ln_f",
        attention=("attn", "c_proj"),
        split="c_attn",
        mlp=("mlp.", "c_fc", "c_proj"),
    ),
    "gpt_neox": Family(
        norm="layer",
        root="gpt_neox",
        embedding="embed_in",
        final="final_layer_norm",
        attention=("attention", "dense"),
        split="query_key_value",
        mlp=("mlp.", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "opt": Family(
        norms=("self_attn_layer_norm", None, "final_layer_norm", None),
        norm="layer",
        root="model.decoder",
        positions=("embed_positions", 2),
        final="final_layer_norm",
        attention=("self_attn", "out_proj"),
        mlp=("", "fc1", "fc2"),
    ),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Weights(NamedTuple):
    """The parameters below a name."""

    tensors: Mapping[str, Tensor]
    prefix: str = ""

    def below(self, name: str) -> Weights:
        return self._replace(prefix=self.prefix + name)

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(self.prefix + name)

    def __call__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self(f"{name}.weight"), self.get(f"{name}.bias"))


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def first_of(config: Any, *names: str, default: Any = None) -> Any:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if value is not None), default)


class Decoder:
    """A family with the weights and the config of one model."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        config = model.config
        self.family, self.config = FAMILIES[config.model_type], config
        # GPT-2 keeps its weights the other way round
        turned = {n for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
        tensors = {
            name: (t.T if name.removesuffix(".weight") in turned else t).detach().to(dtype)
            for name, t in model.state_dict().items()
        }
        self.weights = Weights(tensors)
        root = model.get_submodule(self.family.root)
        self.rotary = getattr(root, "rotary_emb", None)
        self.embed_scale = getattr(getattr(root, self.family.embedding), "embed_scale", None)
        self.chosen: list[Tensor] = []
        self.heads = config.num_attention_heads
        self.groups = first_of(config, "num_key_value_heads", default=self.heads)
        self.size = first_of(config, "head_dim", default=config.hidden_size // self.heads)
        self.scale = first_of(config, "query_pre_attn_scalar", default=self.size) ** -0.5
        self.f = ACTIVATIONS[
            first_of(config, "hidden_activation", "hidden_act", "activation_function")
        ]
        # OPT has torch's own
        self.eps = first_of(
            config, "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", default=1e-5
        )

    def norm(self, w: Weights, name: str | None, x: Tensor, rules: Any) -> Tensor:
        if name is None:
            return x
        kind, gain = self.family.norm, w(f"{name}.weight")
        centred = kind == "layer"
        y = normed(x.to(wide(x.dtype)), self.eps, centred=centred, rule=rules.norm)
        if kind == "rms":  # rounded before the gain, the others after it
            return gain * y.to(x.dtype)
        gain = gain.to(y.dtype)
        y = y * (1 + gain) if kind == "rms of 1 + w" else y * gain
        return (y + w(f"{name}.bias").to(y.dtype) if centred else y).to(x.dtype)

    def layer_type(self, layer: int) -> str:
        types = getattr(self.config, "layer_types", None)
        return types[layer] if types else "sliding_attention"

    def seen(self, kept: Tensor, layer: int) -> Tensor:
        """[B, P, P]: which keys a query sees; one of padding, itself, which no other sees."""
        place = torch.arange(kept.shape[1])
        back = place[:, None] - place
        seen = back >= 0
        window = getattr(self.config, "sliding_window", None)
        if window and self.layer_type(layer) == "sliding_attention":
            seen = seen & (back < window)
        return seen & kept[:, None, :] | (back == 0)

    def rotated(self, x: Tensor, positions: Tensor, layer: int) -> Tensor:
        if self.rotary is None:
            return x
        single = hasattr(self.rotary, "inv_freq")
        kind = "" if single else f"{self.layer_type(layer)}_"
        frequencies = getattr(self.rotary, f"{kind}inv_freq").to(wide(x.dtype))
        angles = positions[:, :, None, None].to(frequencies.dtype) * frequencies
        angles = torch.cat((angles, angles), -1)
        factor = getattr(self.rotary, f"{kind}attention_scaling")
        cos, sin = ((part * factor).to(x.dtype) for part in (angles.cos(), angles.sin()))
        turned, rest = x.tensor_split((cos.shape[-1],), -1)
        a, b = turned.chunk(2, -1)
        return torch.cat((turned * cos + torch.cat((-b, a), -1) * sin, rest), -1)

    def split(self, w: Weights, x: Tensor) -> list[Tensor]:
        """q, k, v `[B, P, heads of each * size]`."""
        how = self.family.split
        if how == "separate":
            return [w.linear(f"{part}_proj", x) for part in "qkv"]
        both = w.linear(how, x)
        if how == "query_key_value":  # q, k, v of a head beside each other
            parts = both.unflatten(-1, (self.heads, -1)).chunk(3, -1)
            return [part.flatten(2) for part in parts]
        return list(both.split([n * self.size for n in (self.heads, *2 * [self.groups])], -1))

    def attention(
        self, w: Weights, x: Tensor, kept: Tensor, positions: Tensor, layer: int, rules: Any
    ) -> Tensor:
        parts = {}
        for name, part in zip("qkv", self.split(w, x), strict=True):
            parts[name] = part.unflatten(-1, (-1, self.size))
            gain = w.get(f"{name}_norm.weight")
            if gain is not None:  # of each head, or of all of them as one row (OLMo 2)
                rows = parts[name] if gain.numel() == self.size else part
                y = self.norm(w, f"{name}_norm", rows, rules)
                parts[name] = y.view_as(parts[name])
        q = scaled(self.rotated(parts["q"], positions, layer), rules.query)
        k = scaled(self.rotated(parts["k"], positions, layer), rules.key)
        v = scaled(parts["v"], rules.value)
        k, v = (part.repeat_interleave(self.heads // self.groups, 2) for part in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale
        cap = self.config.attn_logit_softcapping if self.family.softcap else None
        scores = scores if cap is None else (scores / cap).tanh() * cap
        seen = self.seen(kept, layer)[:, None]
        scores = scores.to(wide(x.dtype)).masked_fill(~seen, -torch.inf)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern(scores, rules.softmax).to(x.dtype), v)
        return w.linear(self.family.attention[1], z.flatten(2))

    def mlp(self, w: Weights, x: Tensor, rules: Any) -> Tensor:
        _, first, last = self.family.mlp
        if w.get("experts.gate_up_proj") is not None:
            return self.experts(w, x, rules)
        if w.get("gate_up_proj.weight") is not None:
            gate, up = w.linear("gate_up_proj", x).chunk(2, -1)
            return w.linear(last, gated(gate, up, self.f, rules))
        if w.get("gate_proj.weight") is not None:
            gate, up = w.linear("gate_proj", x), w.linear("up_proj", x)
            return w.linear(last, gated(gate, up, self.f, rules))
        return w.linear(last, activated(w.linear(first, x), self.f, rules.activation))

    def experts(self, w: Weights, x: Tensor, rules: Any) -> Tensor:
        """Every expert at every token, times its weight, which is 0 where it was not chosen."""
        chances = w.linear("gate", x).to(wide(x.dtype)).softmax(-1)
        top, chosen = chances.topk(self.config.num_experts_per_tok, -1)
        if getattr(self.config, "norm_topk_prob", True):  # Mixtral always
            top = top / top.sum(-1, keepdim=True)
        self.chosen.append(chosen)
        weights = torch.zeros_like(chances).scatter(-1, chosen, top).to(x.dtype)
        both = torch.einsum("bpd,efd->bpef", x, w("experts.gate_up_proj"))
        inner = gated(*both.chunk(2, -1), self.f, rules)
        y = torch.einsum("bpef,edf->bped", inner, w("experts.down_proj"))
        y = (weights[..., None] * y).sum(-2)
        if w.get("shared_expert_gate.weight") is None:
            return y
        shared = self.mlp(w.below("shared_expert."), x, rules)
        return y + w.linear("shared_expert_gate", x).sigmoid() * shared

    def block(
        self, w: Weights, x: Tensor, kept: Tensor, positions: Tensor, layer: int, rules: Any
    ) -> Tensor:
        before, after, before_mlp, after_mlp = self.family.norms
        inside = w.below(f"{self.family.attention[0]}.")
        y = self.norm(w, before, x, rules)
        y = self.attention(inside, y, kept, positions, layer, rules)
        attended = x + self.norm(w, after, y, rules)
        # GPT-NeoX: both read what the block reads
        read = x if getattr(self.config, "use_parallel_residual", False) else attended
        y = self.mlp(w.below(self.family.mlp[0]), self.norm(w, before_mlp, read, rules), rules)
        return attended + self.norm(w, after_mlp, y, rules)


def oracle(
    model: Any,
    inputs: Tensor | Mapping[str, Tensor],
    rules: Any = None,
    dtype: torch.dtype = torch.float64,
    *,
    for_layers: Callable[[int | str], Any] | Mapping[int | str, Any] | None = None,
) -> Result:
    """The model's logits, differentiable by x0 and by the stream under the rules.

    Args:
        model: A decoder of FAMILIES; only its weights and its config are read.
        inputs: Token ids, or `input_ids` with `attention_mask` and `position_ids` if there are any.
            Positions are counted from the first token of each row otherwise.
        rules: Has the attributes of Rules; None is no rule.
        dtype: float64 is the truth.
        for_layers: The rules at a block by its number or at the final norm by "final", instead of
            `rules`: a function, or a mapping of those places where they are others.
    """
    rules = Rules() if rules is None else rules
    others = {} if for_layers is None else for_layers
    at = others if callable(others) else lambda place: others.get(place, rules)
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    decoder = Decoder(model, dtype)
    family, w = decoder.family, decoder.weights
    inner = w.below(f"{family.root}.")
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask == 1
    positions = inputs.get("position_ids")
    if positions is None:
        positions = (kept.cumsum(-1) - 1).clamp(min=0)
    positions = positions.expand_as(ids)
    x0 = inner(f"{family.embedding}.weight")[ids]
    if decoder.embed_scale is not None:
        x0 = x0 * decoder.embed_scale.to(dtype)
    x0 = x0.detach().requires_grad_()
    x = x0
    if family.positions is not None:
        name, moved = family.positions
        x = x + inner(f"{name}.weight")[positions + moved]
    stream = [x]
    for layer in range(decoder.config.num_hidden_layers):
        block = inner.below(f"{family.blocks}.{layer}.")
        x = decoder.block(block, x, kept, positions, layer, at(layer))
        stream.append(x)
    logits = w.linear("lm_head", decoder.norm(inner, family.final, x, at("final")))
    cap = getattr(decoder.config, "final_logit_softcapping", None)
    logits = logits if cap is None else (logits / cap).tanh() * cap
    return Result(logits, x0, stream, decoder.chosen)
