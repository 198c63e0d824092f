# SPDX-License-Identifier: Apache-2.0
"""HookedTransformers written out from their weights, with backward rules; in float64 the truth.

Nothing of `mikernels` and no forward of `transformer_lens` is used: parameters, `cfg`, and the
buffers of the rotary embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from rules_algebra import Rules, Tensor, activated, gated, normed, pattern, scaled
from torch.nn import functional as F

ACTIVATIONS = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "solu_ln": lambda x: x * x.softmax(-1),
}


class Lens:
    """A model's weights and cfg, under rules."""

    def __init__(self, model: Any, rules: Any) -> None:
        self.cfg, self.rules, self.w = model.cfg, rules, model.state_dict()
        self.f = ACTIVATIONS[model.cfg.act_fn] if model.cfg.act_fn else None

    def norm(self, name: str, x: Tensor, kind: str | None) -> Tensor:
        if kind is None:
            return x
        y = normed(x, self.cfg.eps, centred=kind.startswith("LN"), rule=self.rules.norm)
        gain, bias = (self.w.get(f"{name}.{part}") for part in "wb")
        y = y if gain is None else y * gain
        return y if bias is None else y + bias

    def rotated(self, name: str, x: Tensor, positions: Tensor) -> Tensor:
        n = self.cfg.rotary_dim
        sin, cos = (
            self.w[f"{name}.rotary_{part}"][positions][:, :, None] for part in ("sin", "cos")
        )
        turned, rest = x[..., :n], x[..., n:]
        if self.cfg.rotary_adjacent_pairs:
            other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            other = torch.cat((-b, a), -1)
        return torch.cat((turned * cos + other * sin, rest), -1)

    def qkv(self, name: str, reads: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        found = []
        for part, x in zip("QKV", reads, strict=True):
            weight, bias = (
                self.w.get(f"{name}._{kind}_{part}", self.w.get(f"{name}.{kind}_{part}"))
                for kind in ("W", "b")
            )
            y = torch.einsum("bpd,hde->bphe", x, weight) + bias
            if part != "V" and f"{name}.{part.lower()}_norm.w" in self.w:
                rows = y if self.cfg.use_qk_norm else y.flatten(2)
                y = self.norm(f"{name}.{part.lower()}_norm", rows, "RMS").view_as(y)
            found.append(y)
        return found

    def attention(self, name: str, reads: Any, kept: Tensor, positions: Tensor, at: int) -> Tensor:
        cfg, rules = self.cfg, self.rules
        q, k, v = self.qkv(name, reads)
        if cfg.positional_embedding_type == "rotary":
            q, k = (self.rotated(name, x, positions) for x in (q, k))
        q, k, v = scaled(q, rules.query), scaled(k, rules.key), scaled(v, rules.value)
        k, v = (x.repeat_interleave(cfg.n_heads // x.shape[2], 2) for x in (k, v))
        s = torch.einsum("bqhd,bkhd->bhqk", q, k) / cfg.attn_scale
        if cfg.attn_scores_soft_cap > 0:
            s = (s / cfg.attn_scores_soft_cap).tanh() * cfg.attn_scores_soft_cap
        place = torch.arange(s.shape[-1])
        back = place[:, None] - place
        if cfg.positional_embedding_type == "alibi":
            slopes = 2.0 ** (-8 / cfg.n_heads * torch.arange(1, cfg.n_heads + 1))
            s = s - slopes[:, None, None].to(s.dtype) * back.clamp(min=0)
        seen = back >= 0
        if cfg.use_local_attn and cfg.attn_types[at] == "local":
            seen = seen & (back < cfg.window_size)
        seen = seen & kept[:, None, :] | (back == 0)  # what is at padding, no other query sees
        p = pattern(s.masked_fill(~seen[:, None], -torch.inf), rules.softmax)
        z = torch.einsum("bhqk,bkhd->bqhd", p, v)
        return torch.einsum("bqhd,hde->bqe", z, self.w[f"{name}.W_O"]) + self.w[f"{name}.b_O"]

    def mlp(self, name: str, x: Tensor) -> Tensor:
        cfg, w, rules = self.cfg, self.w, self.rules
        if cfg.num_experts:
            chances = F.linear(x, w[f"{name}.W_gate.weight"]).softmax(-1)
            top, chosen = chances.topk(cfg.experts_per_token, -1)
            if getattr(cfg, "norm_topk_prob", True):
                top = top / top.sum(-1, keepdim=True)
            weights = torch.zeros_like(chances).scatter(-1, chosen, top)
            y = torch.zeros_like(x)
            for e in range(cfg.num_experts):
                gate, into, out = (
                    w[f"{name}.experts.{e}.W_{part}.weight"] for part in ("gate", "in", "out")
                )
                h = gated(F.linear(x, gate), F.linear(x, into), self.f, rules)
                y = y + weights[..., e, None] * F.linear(h, out)
            return y
        if cfg.gated_mlp:
            h = gated(x @ w[f"{name}.W_gate"], x @ w[f"{name}.W_in"], self.f, rules)
            h = h + w[f"{name}.b_in"]
        else:
            h = activated(x @ w[f"{name}.W_in"] + w[f"{name}.b_in"], self.f, rules.activation)
            if cfg.act_fn.endswith("_ln"):
                h = self.norm(f"{name}.ln", h, "LN")
        return h @ w[f"{name}.W_out"] + w[f"{name}.b_out"]

    def block(self, at: int, x: Tensor, moved: Any, kept: Tensor, positions: Tensor) -> Tensor:
        name, cfg = f"blocks.{at}", self.cfg
        olmo2 = cfg.original_architecture == "Olmo2ForCausalLM"
        before = None if olmo2 else cfg.normalization_type
        after = "RMS" if olmo2 or cfg.use_normalization_before_and_after else None
        post = "" if olmo2 else "_post"
        read = self.norm(f"{name}.ln1", x, before)
        reads = (read + moved, read + moved, read)
        y = self.attention(f"{name}.attn", reads, kept, positions, at)
        attended = x + self.norm(f"{name}.ln1{post}", y, after)
        if cfg.attn_only:
            return attended
        read = self.norm(f"{name}.ln2", x if cfg.parallel_attn_mlp else attended, before)
        return attended + self.norm(f"{name}.ln2{post}", self.mlp(f"{name}.mlp", read), after)


def lens_oracle(
    model: Any, batch: dict[str, Tensor], rules: Any = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, the embeddings (a leaf), and what each block reads, in the model's dtype."""
    lens = Lens(model, Rules() if rules is None else rules)
    cfg, w, kept = lens.cfg, lens.w, batch["attention_mask"] == 1
    positions = (kept.cumsum(-1) - 1).clamp(min=0)
    x0 = w["embed.W_E"][batch["input_ids"]]
    if cfg.post_embedding_ln:
        x0 = lens.norm("embed.ln", x0, "LN")
    x0 = x0.detach().requires_grad_()
    x, moved = x0, 0.0
    if cfg.positional_embedding_type in ("standard", "shortformer"):
        learned = torch.where(kept[..., None], w["pos_embed.W_pos"][positions], 0)
        if cfg.positional_embedding_type == "standard":
            x = x + learned
        else:
            moved = learned
    stream = []
    for at in range(cfg.n_layers):
        stream.append(x)
        x = lens.block(at, x, moved, kept, positions)
    final = cfg.normalization_type
    if final is not None and cfg.final_rms:
        final = final.replace("LN", "RMS")
    logits = lens.norm("ln_final", x, final) @ w["unembed.W_U"] + w["unembed.b_U"]
    if cfg.output_logits_soft_cap > 0:
        logits = (logits / cfg.output_logits_soft_cap).tanh() * cfg.output_logits_soft_cap
    return logits, x0, stream
