# SPDX-License-Identifier: Apache-2.0
"""`mikernels train`: an SAE on the user's own activations, or on those of a local model."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mikernels.cli.figures import Json, check_json, write_figures
from mikernels.cli.planned import Planned

if TYPE_CHECKING:
    import torch

    from mikernels.activations import Site, Source

ACTIVATIONS, SAE, TRAINING, OUTPUT = "Activations", "SAE", "Training", "Output"
SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9}


def count(text: str | int) -> int:
    """A whole number, or one with a suffix: 500k, 10M, 1.5B."""
    digits, unit = str(text).strip().replace(",", "").replace("_", ""), 1
    if digits[-1:].lower() in SUFFIXES:
        digits, unit = digits[:-1], SUFFIXES[digits[-1].lower()]
    try:
        number = float(digits) * unit
    except ValueError as error:
        raise typer.BadParameter(f"expected a number such as 500k or 10M, got {text!r}") from error
    if not number >= 1 or number % 1:
        raise typer.BadParameter(f"expected a whole number of at least 1, got {text!r}")
    return int(number)


def option(help_text: str, panel: str, *names: str, **more):
    return typer.Option(*names, help=help_text, rich_help_panel=panel, **more)


# the same in every command that runs a model over text
GGUFFile = Annotated[
    str | None, option("The GGUF file's name, if the folder has several.", ACTIVATIONS)
]
Texts = Annotated[
    list[Path] | None,
    option("UTF-8 text file; may be repeated.", ACTIVATIONS, metavar="<path>"),
]
Context = Annotated[int, option("Tokens of a context window.", ACTIVATIONS)]


def train(
    activations: Annotated[
        Path | None,
        option("Folder of safetensors shards, or one file, of \\[rows, d].", ACTIVATIONS),
    ] = None,
    model: Annotated[
        Path | None,
        option("Instead: local folder of a Hugging Face model or a GGUF file.", ACTIVATIONS),
    ] = None,
    gguf_file: GGUFFile = None,
    layer: Annotated[
        list[int] | None,
        option(
            "Decoder layer, from 0; may be repeated: the activations of several are joined.",
            ACTIVATIONS,
        ),
    ] = None,
    site: Annotated[
        str,
        option(
            "Of each layer: residual (the stream after it), mlp_in (what its MLP reads), mlp_out "
            "or attn_out (what MLP or attention add).",
            ACTIVATIONS,
        ),
    ] = "residual",
    target_site: Annotated[
        str | None,
        option("Reconstruct this site, not the input.", ACTIVATIONS, show_default="the input"),
    ] = None,
    target_layer: Annotated[
        list[int] | None,
        option("Of these layers; may be repeated.", ACTIVATIONS, show_default="--layer"),
    ] = None,
    text: Texts = None,
    context: Context = 256,
    skip_first: Annotated[
        int, option("Positions of a window left out: attention sinks.", ACTIVATIONS)
    ] = 1,
    features: Annotated[
        int | None, option("F, the number of features.", SAE, show_default="expansion x d")
    ] = None,
    expansion: Annotated[int, option("F / d, if --features is not given.", SAE)] = 16,
    arch: Annotated[
        str,
        option(
            "topk, batch_topk, jumprelu, matryoshka, lista_matryoshka, gated, relu, transcoder, "
            "skip_transcoder, crosscoder or cross_layer_transcoder.",
            SAE,
        ),
    ] = "topk",
    k: Annotated[
        float,
        option(
            "Active features per token: of each with topk, else on average; jumprelu's target. "
            "gated and relu have none.",
            SAE,
        ),
    ] = 32,
    settings: Annotated[
        list[str] | None,
        option(
            "A setting of the architecture, name=value; may be repeated, e.g. "
            "--set widths=\\[1024,4096,16384] --set l1_coefficient=2.",
            SAE,
            "--set",
            metavar="NAME=VALUE",
        ),
    ] = None,
    k_aux: Annotated[
        int | None, option("Dead features a token revived by AuxK.", SAE, show_default="d / 2")
    ] = None,
    aux_coefficient: Annotated[float, option("Weight of AuxK; 0 is off.", SAE)] = 1 / 32,
    dead_after: Annotated[
        int | None,
        option(
            "Tokens without firing that make a feature dead.",
            SAE,
            parser=count,
            metavar="N",
            show_default="10M, or a sixth of the run",
        ),
    ] = None,
    encoder_scale: Annotated[float, option("Norm of the first encoder rows.", SAE)] = 1.0,
    loss: Annotated[str, option("mse or fvu.", SAE)] = "mse",
    tokens: Annotated[
        int | None,
        option(
            "Tokens to train on, e.g. 500k or 10M.",
            TRAINING,
            parser=count,
            metavar="N",
            show_default="the activations once",
        ),
    ] = None,
    batch_size: Annotated[int, option("Tokens of a batch.", TRAINING)] = 4096,
    accumulate: Annotated[int, option("Batches of a step.", TRAINING)] = 1,
    lr: Annotated[
        float | None,
        option("Peak learning rate.", TRAINING, show_default="by features and steps"),
    ] = None,
    warmup: Annotated[
        int | None, option("Steps of linear warm-up.", TRAINING, show_default="5 % of the steps")
    ] = None,
    decay: Annotated[str, option("constant, linear or cosine, to zero.", TRAINING)] = "linear",
    decay_steps: Annotated[
        int | None, option("Length of the decay.", TRAINING, show_default="the last 20 %")
    ] = None,
    scale: Annotated[
        bool,
        option(
            "Train on activations scaled to a mean norm near sqrt(d), and fold the scale back.",
            TRAINING,
            "--scale/--no-scale",
        ),
    ] = True,
    k_start: Annotated[
        int | None, option("Begin with this k ...", TRAINING, show_default="k")
    ] = None,
    k_anneal: Annotated[int, option("... and reach --k after so many steps.", TRAINING)] = 0,
    sparsity_warmup: Annotated[
        int, option("Steps in which penalties on codes grow from 0.", TRAINING)
    ] = 0,
    clip_norm: Annotated[float, option("Limit on the gradient norm; 0 is none.", TRAINING)] = 1.0,
    dtype: Annotated[str, option("Of the weights: float32 or bfloat16.", TRAINING)] = "float32",
    step: Annotated[
        str, option("fused, autograd (any optimizer) or dense (plain PyTorch).", TRAINING)
    ] = "fused",
    optimizer: Annotated[
        str | None,
        option("A class of torch.optim, with --step autograd.", TRAINING, show_default="Adam"),
    ] = None,
    device: Annotated[
        str | None,
        option("cpu, cuda or cuda:N.", TRAINING, show_default="cuda where there is one"),
    ] = None,
    cuda_graph: Annotated[
        bool, option("Launch a step at once, on a GPU.", TRAINING, "--cuda-graph")
    ] = False,
    threads: Annotated[int | None, option("CPU threads.", TRAINING, show_default="torch's")] = None,
    seed: Annotated[int, option("Seed of weights and order.", TRAINING)] = 0,
    out: Annotated[Path, option("Folder of metrics.jsonl and checkpoints.", OUTPUT)] = Path(
        "out/train"
    ),
    resume: Annotated[
        bool, option("Continue from the newest checkpoint in --out.", OUTPUT, "--resume")
    ] = False,
    checkpoint_every: Annotated[int, option("Steps between checkpoints.", OUTPUT)] = 1000,
    log_every: Annotated[int, option("Steps between metrics.", OUTPUT)] = 10,
    export_saelens: Annotated[
        Path | None, option("Also write the SAE for SAELens to this folder.", OUTPUT)
    ] = None,
    json_file: Json = None,
    plan: Annotated[
        bool, option("Say what the run would take, as `mikernels plan` does.", OUTPUT, "--plan")
    ] = False,
) -> None:
    """Train an SAE or transcoder on your own activations, or on those of a local model over text.

    Activations are shards of safetensors files with a tensor "activations" of \\[rows, d], and
    perhaps "targets" to be reconstructed from them, as written by
    mikernels.activations.write_shards, or any file with a single 2-D tensor.

    Examples:

        mikernels train --activations acts/ --expansion 32 --k 32 --out out/sae

        mikernels train --model ~/models/gpt2 --layer 6 --text corpus.txt --tokens 10M

        mikernels train --activations acts/ --arch jumprelu --k 64 --set bandwidth=0.1

        mikernels train --model gpt2 --layer 6 --site mlp_in --target-site mlp_out --text a.txt \\
            --arch transcoder

        mikernels train --activations acts/ --out out/sae --resume --export-saelens out/saelens
    """
    import torch

    from mikernels.nn import ARCHITECTURES
    from mikernels.training import TrainConfig, Trainer

    check_json("train", json_file)
    if arch not in ARCHITECTURES:
        raise ValueError(f"train: --arch must be one of {sorted(ARCHITECTURES)}, got {arch!r}")
    own = _own_settings(arch, k, settings or [])
    if export_saelens is not None:
        from mikernels.integrations.saelens.form import ARCHITECTURES as THEIRS

        if arch not in THEIRS:
            raise ValueError(
                f"train: --export-saelens must go with an architecture that SAELens has, one of "
                f"{sorted(THEIRS)}, got --arch {arch}; leave it out"
            )
    if optimizer is not None and step == "fused":
        raise ValueError(
            f"train: --optimizer needs --step autograd or dense, got --optimizer {optimizer} with "
            f"--step fused, which has its own Adam"
        )
    make_optimizer = None if optimizer is None else _optimizer_class(optimizer)
    if threads is not None:
        if threads < 1:
            raise ValueError(f"train: --threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    target = _device(device)
    source = _source(
        activations,
        model,
        gguf_file,
        _sites("--site", site, layer),
        _targets(target_site, target_layer, site, layer),
        text,
        context,
        skip_first,
        batch_size,
        seed,
        target,
    )
    if tokens is None:
        tokens = getattr(source, "n_rows", None)
        if tokens is None:
            raise ValueError("train: --tokens must be given with --model, e.g. --tokens 10M")
    config = TrainConfig(
        total_tokens=tokens,
        batch_size=batch_size,
        accumulation=accumulate,
        step=step,
        lr=lr,
        warmup_steps=warmup,
        decay=decay,
        decay_steps=decay_steps,
        k_start=k_start,
        k_anneal_steps=k_anneal,
        sparsity_warmup_steps=sparsity_warmup,
        clip_norm=clip_norm or None,
        dtype=dtype,
        scale_activations=scale,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        cuda_graph=cuda_graph,
        seed=seed,
    )
    variant = ARCHITECTURES[arch]
    names = {f.name for f in fields(variant.config_type)}
    # what the source says, unless it is given
    if "n_layers" in names:
        own.setdefault("n_layers", getattr(source, "n_layers", 1))
    if "d_out" in names:
        own.setdefault("d_out", getattr(source, "d_out", source.d))
    width = source.d // own.get("n_layers", 1)
    own.setdefault("n_features", expansion * width if features is None else features)
    given = {"k_aux": k_aux, "aux_coefficient": aux_coefficient, "dead_after": dead_after}
    generator = torch.Generator().manual_seed(seed)
    more = {"generator": generator, "encoder_scale": encoder_scale}
    sae = variant(source.d, **{**given, "loss": loss, **own, **more}).to(target)  # type: ignore[call-arg, arg-type]
    if plan:
        (plan if isinstance(plan, Planned) else Planned()).show(
            sae, source, config, make_optimizer, out, json_file
        )
    chosen = None
    if make_optimizer is not None:
        rate = config.peak_lr(sae.config.n_features)
        chosen = make_optimizer(sae.parameters(), lr=rate)
    trainer = Trainer(sae, source, config, optimizer=chosen, out_dir=out)
    if resume:
        print(f"resumed at step {trainer.resume():,} of {config.total_steps:,}")
    print(
        f"{sae.name}: d {source.d:,}, F {sae.config.n_features:,}, "
        f"{sparsity(sae)}; {tokens:,} tokens to {out}\n"
        f"lr {trainer.config.lr:.1e}, warm-up {config.warmup:,} and decay "
        f"{config.decay_length:,} of {config.total_steps:,} steps"
    )
    history = trainer.run()
    if history.rows:
        last = history.rows[-1]
        print(
            f"step {last['step']:,}: FVU {last['fvu']:.4f}, L0 {last['l0']:.1f}, dead "
            f"{last['dead_fraction']:.1%}; saved in {out}"
        )
    if export_saelens is not None:
        from mikernels.integrations.saelens import export_sae

        hook = _hook_name(site, layer) if target_site is None and target_layer is None else None
        export_sae(sae, export_saelens, model_name=model.name if model else None, hook_name=hook)
        print(f"SAELens: sae_lens.SAE.load_from_disk({str(export_saelens)!r})")
    figures = {"sae": sae.name, "d": source.d, "n_features": sae.config.n_features}
    figures |= {"steps": trainer.step, "tokens": trainer.tokens, "seconds": history.parts}
    figures |= {"out": str(out), "last": history.rows[-1] if history.rows else None}
    write_figures("train", json_file, figures)


def _own_settings(arch: str, k: float, given: list[str]) -> dict[str, Any]:
    """Settings of an architecture by name: k where it has one, and `name=value` as JSON."""
    from mikernels.nn import ARCHITECTURES

    names = {f.name for f in fields(ARCHITECTURES[arch].config_type)}
    own: dict[str, Any] = {}
    if "k" in names:
        whole = k.is_integer() and arch in ("topk", "cross_layer_transcoder")
        own["k"] = int(k) if whole else k
    elif "target_l0" in names:
        own["target_l0"] = k
    for setting in given:
        name, sign, text = setting.partition("=")
        if not sign or name not in names:
            raise ValueError(
                f"train: --set must be name=value with a name among {sorted(names)} for --arch "
                f"{arch}, got {setting!r}"
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text  # a word needs no quotes
        own[name] = value
    return own


def sparsity(sae: Any) -> str:
    """How many features are meant to be active, in words."""
    if sae.k is not None:
        return f"k {sae.k:g}"
    target = getattr(sae.config, "target_l0", None)
    return "L0 by its penalty" if target is None else f"target L0 {target:g}"


def _optimizer_class(name: str) -> Any:
    import torch

    found, base = getattr(torch.optim, name, None), torch.optim.Optimizer
    if not isinstance(found, type) or not issubclass(found, base) or found is base:
        raise ValueError(
            f"train: --optimizer must be a class of torch.optim such as Adam, AdamW or SGD, got "
            f"{name!r}"
        )
    return found


def _device(name: str | None, where: str = "train") -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{where}: --device must be cpu, cuda or cuda:N, got {name!r}") from error
    seen = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= seen:
        raise ValueError(
            f"{where}: --device must be one that torch sees, got {name} of {seen} CUDA devices "
            f"(torch {torch.__version__}); use --device cpu, or install a torch with CUDA"
        )
    return device


def _sites(name: str, site: str, layers: list[int] | None) -> list[Site]:
    """The same place of each layer."""
    from mikernels.activations import Site
    from mikernels.models.sites import PLACES

    if site not in PLACES:
        raise ValueError(f"train: {name} must be one of {', '.join(PLACES)}, got {site!r}")
    return [Site(layer, site) for layer in layers or ()]


def _targets(
    target_site: str | None, target_layers: list[int] | None, site: str, layers: list[int] | None
) -> list[Site] | None:
    """What is left out is as of the input; None where all is."""
    if target_site is None and not target_layers:
        return None
    return _sites("--target-site", target_site or site, target_layers or layers)


def _hook_name(site: str, layers: list[int] | None) -> str | None:
    """TransformerLens' name of one site; what an MLP reads has none (its norm is folded there)."""
    hooks = {"residual": "resid_post", "mlp_out": "mlp_out", "attn_out": "attn_out"}
    if site not in hooks or layers is None or len(layers) != 1:
        return None
    return f"blocks.{layers[0]}.hook_{hooks[site]}"


def _source(
    activations: Path | None,
    model: Path | None,
    gguf_file: str | None,
    sites: list[Site],
    targets: list[Site] | None,
    text: list[Path] | None,
    context: int,
    skip_first: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> Source:
    if (activations is None) == (model is None):
        raise ValueError(
            "train: give either --activations FOLDER, or --model FOLDER with --layer and --text"
        )
    if activations is not None:
        from mikernels.activations import ShardSource

        if targets is not None:
            raise ValueError(
                f"train: --target-site and --target-layer must go with --model, got them with "
                f"--activations {activations}, whose shards hold their targets or none; leave "
                f"them out"
            )
        return ShardSource(activations, batch_size, seed)
    if not sites or not text:
        raise ValueError("train: --model needs --layer NUMBER and --text FILE")
    from mikernels.activations import ModelSource, TextFiles
    from mikernels.models.load import load_model

    assert model is not None
    texts = TextFiles(text)  # a missing file is found before the model loads
    network, tokenizer = load_model(model, gguf_file)
    return ModelSource(
        network.to(device),
        tokenizer,
        sites,
        texts,
        batch_size,
        seed,
        target=targets,
        context=context,
        skip_first=skip_first,
    )
