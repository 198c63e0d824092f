# SPDX-License-Identifier: Apache-2.0
"""`mikernels train`: an SAE on the user's own activations, or on those of a local model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mikernels.cli import train_runs
from mikernels.cli.figures import Json, check_json, write_figures
from mikernels.cli.inputs import (
    Activations,
    Context,
    Field,
    GGUFFile,
    Inputs,
    Layers,
    Model,
    Place,
    SkipFirst,
    Texts,
    read_inputs,
    sites_of,
)
from mikernels.cli.options import ACTIVATIONS, OUTPUT, count, device_of, option
from mikernels.cli.planned import Planned

if TYPE_CHECKING:
    import torch

    from mikernels.activations import ModelSource
    from mikernels.models.sites import AnySite

SAE, TRAINING = "SAE", "Training"


def train(
    activations: Activations = None,
    model: Model = None,
    gguf_file: GGUFFile = None,
    layer: Layers = None,
    site: Place = "residual",
    sites: Annotated[
        list[str] | None,
        option(
            "Instead of --layer: an SAE for each of these, from one pass of the model, e.g. "
            "3.residual,7.residual,7.mlp_out.",
            ACTIVATIONS,
            metavar="LAYER.SITE,...",
        ),
    ] = None,
    target_site: Annotated[
        str | None,
        option("Reconstruct this site, not the input.", ACTIVATIONS, show_default="the input"),
    ] = None,
    target_layer: Annotated[
        list[int] | None,
        option("Of these layers; may be repeated.", ACTIVATIONS, show_default="--layer"),
    ] = None,
    text: Texts = None,
    field: Field = "text",
    context: Context = 256,
    skip_first: SkipFirst = 1,
    save_activations: Annotated[
        Path | None,
        option(
            "Keep what the model makes in this folder, and train on that; if it holds the same "
            "already, no model is run.",
            ACTIVATIONS,
        ),
    ] = None,
    features: Annotated[
        int | None, option("F, the number of features.", SAE, show_default="expansion x d")
    ] = None,
    expansion: Annotated[int, option("F / d, if --features is not given.", SAE)] = 16,
    arch: Annotated[
        list[str] | None,
        option(
            "topk, batch_topk, jumprelu, matryoshka, lista_matryoshka, gated, relu, transcoder, "
            "skip_transcoder, crosscoder or cross_layer_transcoder. Repeated: an SAE of each.",
            SAE,
            show_default="topk",
        ),
    ] = None,
    k: Annotated[
        list[float] | None,
        option(
            "Active features per token: of each with topk, else on average; jumprelu's target. "
            "gated and relu have none. Repeated: an SAE with each.",
            SAE,
            show_default="32",
        ),
    ] = None,
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
    out: Annotated[
        Path,
        option(
            "Folder of metrics.jsonl and checkpoints; of several SAEs, the folder of these "
            "folders, e.g. OUT/3.residual-k32.",
            OUTPUT,
        ),
    ] = Path("out/train"),
    resume: Annotated[
        bool, option("Continue from the newest checkpoint in --out.", OUTPUT, "--resume")
    ] = False,
    checkpoint_every: Annotated[int, option("Steps between checkpoints.", OUTPUT)] = 1000,
    log_every: Annotated[int, option("Steps between metrics.", OUTPUT)] = 10,
    log_to: Annotated[
        list[str] | None,
        option(
            "tensorboard (files in --out) or wandb, beside metrics.jsonl; may be repeated.", OUTPUT
        ),
    ] = None,
    export_saelens: Annotated[
        Path | None, option("Also write the SAE for SAELens to this folder.", OUTPUT)
    ] = None,
    json_file: Json = None,
    plan: Annotated[
        bool, option("Say what the run would take, as `mikernels plan` does.", OUTPUT, "--plan")
    ] = False,
) -> None:
    """Train an SAE or transcoder on your own activations, or on those of a local model over text.

    Activations are .safetensors files with a tensor "activations" of \\[rows, d], and perhaps
    "targets" to be reconstructed from them, as written by mikernels.activations.write_shards, or
    with a single 2-D tensor; or .npy files of \\[rows, d].

    Examples:

        mikernels train --activations acts/ --expansion 32 --k 32 --out out/sae

        mikernels train --model ~/models/gpt2 --layer 6 --text corpus.txt --tokens 10M

        mikernels train --model model.gguf --layer 6 --text pile.jsonl.gz --tokens 10M \\
            --save-activations acts/

        mikernels train --activations acts/ --arch jumprelu --k 64 --set bandwidth=0.1

        mikernels train --model gpt2 --layer 6 --site mlp_in --target-site mlp_out --text a.txt \\
            --arch transcoder

        mikernels train --model gpt2 --sites 3.residual,7.residual,11.residual --text a.txt \\
            --tokens 10M --out out/saes

        mikernels train --activations acts/ --k 16 --k 32 --k 64 --out out/k --log-to tensorboard

        mikernels train --activations acts/ --out out/sae --resume
    """
    import torch

    from mikernels.nn import ARCHITECTURES
    from mikernels.training import TrainConfig, Trainer

    check_json("train", json_file)
    archs, ks = arch or ["topk"], k or [32.0]
    each = train_runs.sites_given(sites)
    asked = train_runs.members(each, archs, ks)
    settings = settings or []
    for one in asked:
        _own_settings(one, settings)
    if activations is None and not each:
        train_runs.check_joined(layer, archs, site)
    if each and (layer or target_layer or activations or site != "residual"):
        raise ValueError(
            "train: --sites must go with --model and without --layer, --site and --target-layer, "
            "got one of them; name all places in --sites"
        )
    if export_saelens is not None:
        from mikernels.integrations.saelens.form import ARCHITECTURES as THEIRS

        if theirs_not := [one for one in archs if one not in THEIRS]:
            raise ValueError(
                f"train: --export-saelens must go with an architecture that SAELens has, one of "
                f"{sorted(THEIRS)}, got --arch {theirs_not[0]}; leave it out"
            )
    train_runs.loggers(log_to)  # a missing package is found before a model loads
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
    target = device_of("train", device)
    inputs = read_inputs(
        "train",
        activations=activations,
        model=model,
        gguf_file=gguf_file,
        layers=layer,
        site=site,
        sites=each,
        text=text,
        field=field,
        context=context,
        skip_first=skip_first,
    )
    if inputs.model is not None and tokens is None:
        raise ValueError("train: --tokens must be given with --model, e.g. --tokens 10M")
    if each and save_activations is not None:
        raise ValueError(
            f"train: --save-activations must go with one place, got --sites of {len(each)}; keep "
            f"each in a folder of its own, by --layer and --site"
        )
    sources: list[Any] = []
    if each:
        sources += _model_sources(inputs, target_site, batch_size, seed, target)
    else:
        targets = _targets(target_site, target_layer, site, layer)
        sources += [_source(inputs, targets, batch_size, seed, target, save_activations, tokens)]
    if tokens is None:
        tokens = sources[0].n_rows
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
    several = len(asked) > 1 or bool(each)
    if plan and several:
        raise ValueError(
            f"plan: the run must be of one SAE, got {len(asked)}; plan each by itself: memory and "
            f"times add up, but for the activations, which are read once"
        )

    def trainer_of(one: train_runs.Member) -> Trainer:
        variant, source = ARCHITECTURES[one.arch], sources[one.source]
        own = _own_settings(one, settings)
        names = {f.name for f in fields(variant.config_type)}
        # what the source says, unless it is given
        if "n_layers" in names:
            own.setdefault("n_layers", getattr(source, "n_layers", max(1, len(inputs.sites))))
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
        return Trainer(
            sae,
            source,
            config,
            optimizer=chosen,
            out_dir=out / one.name if several else out,
            log_to=train_runs.loggers(log_to),
        )

    trainers = {one.name: trainer_of(one) for one in asked}
    failed = train_runs.run(trainers, resume, several)
    for one in asked:
        if export_saelens is None or one.name in failed.get("names", ()):
            continue
        from mikernels.integrations.saelens import export_sae

        folder = export_saelens / one.name
        at = each[one.source : one.source + 1] or inputs.sites
        export_sae(
            trainers[one.name].sae,
            folder,
            model_name=Path(model).name if model else None,
            hook_name=None if target_site or target_layer else _hook_name(at),
        )
        print(f"SAELens: sae_lens.SAE.load_from_disk({str(folder)!r})")
    figures = {name: train_runs.figures(trainer) for name, trainer in trainers.items()}
    for name, error in failed.get("names", {}).items():
        figures[name]["error"] = str(error)
    write_figures("train", json_file, {"runs": figures} if several else figures[""])
    if failed:
        raise failed["error"]


def _own_settings(one: train_runs.Member, given: list[str]) -> dict[str, Any]:
    """Settings of an architecture by name: k where it has one, and `name=value` as JSON."""
    from mikernels.nn import ARCHITECTURES

    arch, k = one.arch, one.k
    names = {f.name for f in fields(ARCHITECTURES[arch].config_type)}
    own: dict[str, Any] = {}
    if name := train_runs.sparsity_setting(arch):
        whole = k.is_integer() and arch in ("topk", "cross_layer_transcoder")
        own[name] = int(k) if whole else k
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


def _optimizer_class(name: str) -> Any:
    import torch

    found, base = getattr(torch.optim, name, None), torch.optim.Optimizer
    if not isinstance(found, type) or not issubclass(found, base) or found is base:
        raise ValueError(
            f"train: --optimizer must be a class of torch.optim such as Adam, AdamW or SGD, got "
            f"{name!r}"
        )
    return found


def _targets(
    target_site: str | None, target_layers: list[int] | None, site: str, layers: list[int] | None
) -> list[AnySite] | None:
    """What is left out is as of the input; None where all is."""
    if target_site is None and not target_layers:
        return None
    return sites_of("train", "--target-site", target_site or site, target_layers or layers)


def _hook_name(sites: Sequence[AnySite]) -> str | None:
    """TransformerLens' name of one site; what an MLP reads has none (its norm is folded there)."""
    from mikernels.activations import Site

    hooks = {"residual": "resid_post", "mlp_out": "mlp_out", "attn_out": "attn_out"}
    if len(sites) != 1 or not isinstance(sites[0], Site) or sites[0].place not in hooks:
        return None
    return f"blocks.{sites[0].layer}.hook_{hooks[sites[0].place]}"


def _model_sources(
    inputs: Inputs, target_site: str | None, batch_size: int, seed: int, device: torch.device
) -> list[ModelSource]:
    """One for each site of --sites."""
    from mikernels.activations import ModelSource, Site

    targets: list[AnySite] | None = None
    if target_site is not None:
        layers = [site.layer for site in inputs.sites if isinstance(site, Site)]
        if len(layers) < len(inputs.sites):
            raise ValueError(
                "train: --target-site must go with --sites of numbered layers, got a module's name"
            )
        targets = list(sites_of("train", "--target-site", target_site, layers))
    local = inputs.local()
    with local.reading():
        tokenizer, network = local.tokenizer(), local.model()
    assert inputs.texts is not None
    return ModelSource.each(
        network.to(device),
        tokenizer,
        inputs.sites,
        inputs.texts,
        batch_size,
        seed,
        targets=targets,
        context=inputs.context,
        skip_first=inputs.skip_first,
    )


def _source(
    inputs: Inputs,
    targets: list[AnySite] | None,
    batch_size: int,
    seed: int,
    device: torch.device,
    save: Path | None,
    tokens: int | None,
) -> Any:
    from mikernels.activations import ShardSource

    if inputs.activations:
        for given, name in ((targets, "--target-site and --target-layer"),
                            (save, "--save-activations")):  # fmt: skip
            if given is not None:
                raise ValueError(
                    f"train: {name} must go with --model, got it with --activations "
                    f"{inputs.label}, whose shards are as they are; leave it out"
                )
        return ShardSource(inputs.activations, batch_size, seed)
    if save is None:
        return _model_source(inputs, targets, batch_size, seed, device)
    assert tokens is not None
    _save(save, inputs, targets, device, tokens)
    return ShardSource(save, batch_size, seed)


def _model_source(
    inputs: Inputs,
    targets: list[AnySite] | None,
    batch_size: int | None,
    seed: int,
    device: torch.device,
) -> ModelSource:
    from mikernels.activations import ModelSource

    local = inputs.local()
    with local.reading():
        tokenizer, network = local.tokenizer(), local.model()
    assert inputs.texts is not None
    return ModelSource(
        network.to(device),
        tokenizer,
        inputs.sites,
        inputs.texts,
        batch_size,
        seed,
        target=targets,
        context=inputs.context,
        skip_first=inputs.skip_first,
    )


def _save(
    folder: Path,
    inputs: Inputs,
    targets: list[AnySite] | None,
    device: torch.device,
    rows: int,
) -> None:
    """Activations of the model in the folder, made unless they are there."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from mikernels.activations.saved import is_saved, save_activations

    assert inputs.texts is not None
    origin = {
        "sites": [str(site) for site in inputs.sites],
        "target_sites": [str(site) for site in targets or ()],
        "field": inputs.texts.field,
        "context": inputs.context,
        "skip_first": inputs.skip_first,
    }
    files = {"model": inputs.local().files(), "texts": inputs.texts.files()}
    if is_saved(folder, origin, files, rows):
        print(f"activations: read from {folder}, which holds these")
        return
    source = _model_source(inputs, targets, None, 0, device)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} of {task.total:,} rows"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("activations", total=rows)
        held = save_activations(
            folder,
            source,
            rows,
            origin,
            files,
            most=inputs.texts.most_tokens(),
            on_progress=lambda done: progress.update(task, completed=done),
        )
        progress.update(task, completed=held, total=held)
    print(f"activations: {held:,} rows in {folder}")
