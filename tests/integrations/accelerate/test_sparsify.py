# SPDX-License-Identifier: Apache-2.0
"""sparsify accelerated: its own code gives what it gives without, in every release that has it."""

import contextlib
import copy
import dataclasses
import io
import pickle
import re
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate_cases import assert_as_accurate, assert_same, rms, snapshot
from accelerate_sparsify import (
    SETTINGS,
    STEPS,
    D,
    F,
    Holder,
    K,
    N,
    assert_same_training,
    batches,
    dense_loss,
    library,
    make,
    train,
    unaccelerated,
)
from oracle import assert_accurate, randn

from mikernels.integrations.accelerate import accelerate, check

pytestmark = pytest.mark.peers


@pytest.fixture
def looks() -> Iterator[None]:
    """Looks at dense activations are wanted, and not warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "accelerate: .* needs the dense", RuntimeWarning)
        yield


def dense(acts: torch.Tensor) -> torch.Tensor:
    """Somebody's look at all activations."""
    return acts + 0


# ---- training


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_20_steps_are_the_librarys(name, autocast):
    exact, eager = unaccelerated(name)
    if autocast:
        eager = train(Holder(make(name)), batches(), autocast=True)
    for optimizer in (False, True) if name == "topk" else (True,):
        holder = Holder(make(name))
        report = accelerate(holder, optimizer=optimizer)
        found = train(holder, batches(), autocast=autocast)
        assert_same_training(found, exact, eager, low=autocast)
        assert not report.dense and not report.crowded and not report.kept
        assert report.calls == STEPS
        assert ("Adam.step" in report.methods) == optimizer
        assert report.library == f"eai-sparsify {library().__version__}"
    # AuxK was there
    assert (exact.aux > 0).sum() > STEPS // 2


VARIED: dict[str, dict[str, Any]] = {
    "micro-batches": dict(parts=4),
    "clipped": dict(clip=0.05),
    "k decays": dict(k_decay=12),
    "all": dict(parts=2, clip=0.05, k_decay=12),
}


@pytest.mark.parametrize("how", VARIED)
@pytest.mark.parametrize("name", ["topk", "skip transcoder"])
def test_what_the_trainer_does_around_it_is_followed(name, how):
    more = VARIED[how]
    holder = Holder(make(name))
    report = accelerate(holder, optimizer=True)
    found = train(holder, batches(), **more)
    exact = train(Holder(make(name)).double(), batches(torch.float64), **more)
    assert_same_training(found, exact, train(Holder(make(name)), batches(), **more))
    assert not report.dense and report.calls == STEPS * more.get("parts", 1)
    # it changes something
    plain = unaccelerated(name)[0]
    assert rms(plain.numbers["encoder.weight"] - exact.numbers["encoder.weight"]) > 1e-6


@pytest.mark.parametrize("name", ["topk", "groupmax, multi-topk", "skip transcoder"])
def test_strided_activations_are_taken(name):
    holder = Holder(make(name))
    accelerate(holder)
    found = train(holder, batches(strided=True))
    eager = train(Holder(make(name)), batches(strided=True))
    assert_same_training(found, unaccelerated(name)[0], eager)


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("what", ["forward", "encode"])
def test_hooks_of_some_steps_see_what_is_there(what):
    """A hook of the module, and somebody's own call of `encode` between the steps."""

    def with_hook(sae: Any) -> tuple[Callable[[int, Any], object], list[torch.Tensor]]:
        seen: list[torch.Tensor] = []
        handles: list[Any] = []

        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen.append(output.latent_acts.detach().sort(-1).values)
            seen.append(output.sae_out.detach().clone())

        def each(step: int, sae: Any) -> None:
            if what == "encode" and 5 <= step < 12:
                x = batches()[step][0].to(sae.dtype)
                seen.append(dense(sae.encode(x).pre_acts).detach())
            if what == "forward" and step == 5:
                handles.append(sae.register_forward_hook(hook))
            if what == "forward" and step == 12:
                handles[0].remove()

        return each, seen

    holders = [Holder(make()), Holder(make()).double(), Holder(make())]
    report = accelerate(holders[0])
    hooks = [with_hook(holder.sae) for holder in holders]
    runs = [
        train(holder, batches(holder.sae.dtype), each=each)
        for holder, (each, _) in zip(holders, hooks, strict=True)
    ]
    assert_same_training(*runs)
    found, exact, eager = (seen for _, seen in hooks)
    assert len(found) == len(eager) == (14 if what == "forward" else 7)
    for mine, true, theirs in zip(found, exact, eager, strict=True):
        assert type(mine) is torch.Tensor
        assert_as_accurate({what: mine}, {what: true}, {what: theirs})
    assert bool(report.dense) == (what == "encode")


# ---- the whole trainer, on a language model


def _model() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=D, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


# of its k decay the first k is ten times the width, of which so many must be positive
FITS: dict[str, dict[str, Any]] = {
    "fvu": dict(
        auxk_alpha=0.25,
        dead_feature_threshold=20,
        k_decay_steps=6,
        num_latents=32 * D,
        layers=[0, 1],
    ),
    "accumulated": dict(
        auxk_alpha=0.25, dead_feature_threshold=20, micro_acc_steps=2, grad_acc_steps=2
    ),
    "ce": dict(loss_fn="ce"),
    "kl": dict(loss_fn="kl"),
    "skip transcoder, seeds": dict(
        transcode=True, skip_connection=True, multi_topk=True, init_seeds=[0, 1]
    ),
    "groupmax, signum": dict(activation="groupmax", optimizer="signum"),
    "muon": dict(optimizer="muon"),
}


@pytest.fixture
def precision() -> Iterator[None]:
    """`fit` allows less precise products for good."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("how", FITS)
def test_its_trainer_is_the_same(how, tmp_path):
    sparsify = library()
    if "seeds" in how and not hasattr(library("sparsify.trainer"), "get_saes_by_layer_name"):
        pytest.skip("several seeds are a KeyError in this release's own trainer")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    tokens = torch.randint(50, (16, 8), generator=torch.Generator().manual_seed(3))
    data = datasets.Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
    names = {f.name for f in dataclasses.fields(sparsify.TrainConfig)}
    given = dict(FITS[how])
    of_sae = {n: given.pop(n) for n in [*given] if n not in names}
    if "exclude_tokens" in names:
        # 1.2.1 trains on no token where none is excluded
        given["exclude_tokens"] = [7]

    def run(make_them: Callable[[Any], Any], folder: str) -> tuple[Any, Any]:
        model = _model()
        config = sparsify.TrainConfig(
            **{
                **dict(
                    sae=sparsify.SparseCoderConfig(**{"num_latents": F, "k": K, **of_sae}),
                    batch_size=2,
                    optimizer="adam",
                    lr=3e-3,
                    lr_warmup_steps=2,
                    layers=[1],
                    log_to_wandb=False,
                    save_dir=str(tmp_path / folder),
                    save_every=4,
                ),
                **given,
            }
        )
        trainer = sparsify.Trainer(config, data, model)
        for optimizer in trainer.optimizers:
            for group in getattr(optimizer, "param_groups", []):
                if "eps" in group:
                    group["eps"] = 1e-3
        made = make_them(trainer)
        trainer.fit()
        return trainer, made

    def double(trainer: Any) -> None:
        trainer.model.double()
        for sae in trainer.saes.values():
            sae.double()

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        mine, report = run(lambda trainer: accelerate(trainer, optimizer=True), "mine")
        exact, eager = run(double, "exact")[0], run(lambda trainer: None, "eager")[0]
    assert not report.dense and report.calls >= 8
    # Adam and Muon's Adam; what is not torch's is told
    adams = [m for m in report.methods if m == "Adam.step"]
    assert len(adams) == ("signum" not in how)
    assert any("step" in kept for kept in report.kept) == (how in ("groupmax, signum", "muon"))
    for name, sae in mine.saes.items():
        runs = [dict(t.saes[name].state_dict()) for t in (mine, exact, eager)]
        assert_as_accurate(*runs)
        since = [t.num_tokens_since_fired[name] for t in (mine, eager)]
        assert torch.equal(*since)
        written = sparsify.SparseCoder.load_from_disk(tmp_path / "mine" / "unnamed" / name)
        # what signum trains is between what it saves and the mean of it
        assert torch.equal(written.W_dec, sae.W_dec) != ("signum" in how)


# ---- saving and loading


@pytest.mark.parametrize("first", ["plain", "accelerated", "both"])
@pytest.mark.parametrize("name", ["topk", "groupmax, multi-topk", "skip transcoder"])
def test_a_run_goes_on_in_either_direction(name, first, tmp_path):
    kind, half = type(make()), STEPS // 2
    holder = Holder(make(name))
    if first != "plain":
        accelerate(holder, optimizer=True)
    begun = train(holder, batches()[:half])
    holder.sae.save_to_disk(tmp_path / "sae")
    torch.save(holder.optimizers[0].state_dict(), tmp_path / "optimizer.pt")
    other = Holder(kind.load_from_disk(tmp_path / "sae"))
    for key, value in holder.sae.state_dict().items():
        assert torch.equal(other.sae.state_dict()[key], value)
    assert other.sae.cfg == holder.sae.cfg
    if first != "accelerated":
        accelerate(other, optimizer=True)
    other.optimizers[0].load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    other.schedulers[0].load_state_dict(holder.schedulers[0].state_dict())
    other.since_fired, other.step = holder.since_fired.clone(), half
    ended = train(other, batches())
    ended.numbers["losses"] = torch.cat([begun.numbers["losses"], ended.numbers["losses"]])
    ended.silent = torch.cat([begun.silent, ended.silent])
    assert_same_training(ended, *unaccelerated(name))


def test_weights_are_loaded_into_what_is_accelerated(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    trained = Holder(make())
    train(trained, batches()[:4])
    trained.sae.save_to_disk(tmp_path)
    sae, x = make(), batches()[5][0]
    report = accelerate(sae)
    safetensors.load_model(sae, tmp_path / "sae.safetensors")
    with torch.no_grad():
        found, eager = sae(x).sae_out, trained.sae(x).sae_out
        exact = copy.deepcopy(trained.sae).double()(x.double()).sae_out
    assert_accurate(found, exact, eager)
    assert report.calls == 1


# ---- a coder by itself


INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "rows": lambda: randn(N, D, seed=21),
    "every other": lambda: randn(N, 2 * D, seed=21)[:, ::2],
    "transposed": lambda: randn(D, N, seed=21).T,
    "sequences": lambda: randn(3, 5, D, seed=22),
    "one": lambda: randn(D, seed=23),
    "none": lambda: randn(0, D),
    "another dtype": lambda: randn(N, D, seed=21).double(),
    "another width": lambda: randn(N, D + 1, seed=21),
}


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_coder_gives_what_it_gives(name, inputs):
    def forward(sae: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        out = sae(x)
        names = ("sae_out", "latent_acts", "latent_indices")
        return {name: getattr(out, name) for name in names}

    def encode(sae: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        top_acts, top_indices, pre_acts = sae.encode(x)
        return {"latent_acts": top_acts, "latent_indices": top_indices, "pre": dense(pre_acts)}

    plain, sae, x = make(name), make(name), INPUTS[inputs]()
    exact = copy.deepcopy(plain).double()
    report = accelerate(sae)
    for call in (forward, encode):
        try:
            eager = call(plain, x)
        except Exception as error:
            # as much of an input as the library takes
            with pytest.raises(type(error), match=re.escape(str(error)[:40])):
                call(sae, x)
            continue
        found, true = call(sae, x), call(exact, x.double())
        assert report.calls
        for key, theirs in eager.items():
            assert found[key].shape == theirs.shape and found[key].dtype == theirs.dtype, key
        # in any order
        runs = [
            {k: t.sort(-1).values if k.startswith("latent") else t for k, t in run.items()}
            for run in (found, true, eager)
        ]
        indices = [run.pop("latent_indices") for run in runs]
        assert torch.equal(indices[0], indices[2])
        assert_as_accurate(*runs)


@pytest.mark.parametrize("name", ["topk", "groupmax, multi-topk", "skip transcoder"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_makes_nothing_dense(name, mode):
    def numbers(sae: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        dead = torch.arange(F) % 3 == 0
        with mode():
            outs = [sae(x, y, dead_mask=dead) for x, y in batches(dtype)]
            names = ("sae_out", "fvu", "auxk_loss", "multi_topk_fvu")
            return {n: torch.stack([getattr(o, n) for o in outs]) for n in names}

    sae = make(name)
    report = accelerate(sae)
    found = numbers(sae, torch.float32)
    exact = numbers(make(name).double(), torch.float64)
    assert_as_accurate(found, exact, numbers(make(name), torch.float32))
    assert report.calls == STEPS and not report.dense


def test_gradients_reach_the_input():
    def gradient(sae: Any, x: torch.Tensor) -> torch.Tensor:
        x.requires_grad_()
        sae(x).sae_out.square().sum().backward()
        assert x.grad is not None
        return x.grad

    sae = make()
    accelerate(sae)
    found = gradient(sae, randn(N, D, seed=21))
    exact = gradient(make().double(), randn(N, D, seed=21).double())
    assert_accurate(found, exact, gradient(make(), randn(N, D, seed=21)))


def test_without_a_decoder_it_encodes(tmp_path):
    make().save_to_disk(tmp_path)
    kind, x = type(make()), randn(N, D, seed=21)
    plain, sae = (kind.load_from_disk(tmp_path, decoder=False) for _ in range(2))
    report = accelerate(sae)
    with torch.no_grad():
        found, eager = sae.encode(x), plain.encode(x)
    assert torch.equal(found.top_indices.sort(-1).values, eager.top_indices.sort(-1).values)
    assert report.calls == 1
    with pytest.raises(AssertionError, match="Decoder weight was not initialized"):
        sae(x)


@pytest.mark.parametrize("name", SETTINGS)
def test_codes_are_the_dense_ones(name):
    plain, sae, x = make(name), make(name), randn(N, D, seed=21)
    report = accelerate(sae)
    codes = report.codes(x)
    eager = plain.encode(x)
    wanted = torch.zeros(N, F).scatter(-1, eager.top_indices, eager.top_acts)
    true = copy.deepcopy(plain).double().encode(x.double())
    exact = torch.zeros(N, F, dtype=torch.float64).scatter(-1, true.top_indices, true.top_acts)
    assert_accurate(codes.to_dense(), exact, wanted)
    assert codes.values.shape == (N, K) and codes.n_features == F and not report.dense
    report.restore()
    with pytest.raises(RuntimeError, match="restored"):
        report.codes(x)


# ---- fewer than k positive activations


def _few(name: str) -> Any:
    """Of most tokens fewer than k pre-activations are positive, of some none."""
    sae = make(name)
    with torch.no_grad():
        sae.encoder.bias.sub_(2.5)
    return sae


@pytest.mark.parametrize("name", ["topk", "groupmax", "multi-topk"])
def test_zeros_fill_up_what_is_not_positive(name):
    plain, sae, x = _few(name), _few(name), randn(N, D, seed=21)
    accelerate(sae)
    found, eager = sae(x), plain(x)
    exact = copy.deepcopy(plain).double()(x.double())
    there = eager.latent_acts > 0
    assert 0 < int(there.sum()) < there.numel() / 2 and (there.sum(-1) == 0).any()
    names = ("sae_out", "fvu", "multi_topk_fvu")
    runs = [{n: getattr(o, n) for n in names} for o in (found, exact, eager)]
    assert_as_accurate(*runs)
    # the positive ones are the same; which features stand for zeros is anybody's choice
    for mine, theirs in zip(*(_positive(o) for o in (found, eager)), strict=True):
        assert mine == theirs
    assert (found.latent_acts >= 0).all()
    assert all(len({*row}) == len(row) for row in found.latent_indices.tolist())


def _positive(out: Any) -> list[set[int]]:
    return [
        {i for i, a in zip(indices, acts, strict=True) if a > 0}
        for indices, acts in zip(out.latent_indices.tolist(), out.latent_acts.tolist(), strict=True)
    ]


@pytest.mark.parametrize("correct", [False, True])
def test_zeros_have_the_gradient_that_the_library_gives_them(correct):
    """Its backward pass scatters gradients to whichever features were chosen, those at 0 too."""
    sae, x = _few("topk"), randn(N, D, seed=21)
    accelerate(sae, correct=correct)
    acts, indices, _ = sae.encode(x)
    grad = randn(N, K, seed=22)
    acts.backward(grad)
    if correct:
        grad = grad.masked_fill(acts == 0, 0)
    runs = []
    for dtype in (torch.float64, torch.float32):
        spread = torch.zeros(N, F, dtype=dtype).scatter(-1, indices, grad.to(dtype))
        centred = x.to(dtype) - sae.b_dec.detach().to(dtype)
        of_bias = -(spread @ sae.encoder.weight.detach().to(dtype)).sum(0)
        runs.append({"w": spread.T @ centred, "b": spread.sum(0), "b_dec": of_bias})
    found = {"w": sae.encoder.weight.grad, "b": sae.encoder.bias.grad, "b_dec": sae.b_dec.grad}
    assert_as_accurate(found, *runs)


# ---- the right gradient


@pytest.mark.parametrize("name", SETTINGS)
def test_correct_gradients_are_those_of_the_dense_expression(name):
    dead = torch.arange(F) % 3 == 0

    def gradients(sae: Any, dtype: torch.dtype, plain: bool) -> dict[str, torch.Tensor]:
        x, y = batches(dtype)[0]
        y = y if sae.cfg.transcode else x
        if plain:
            loss, parts = dense_loss(sae, x, y, dead)
        else:
            out = sae(x, y, dead_mask=dead)
            loss = out.fvu + out.auxk_loss / 4 + out.multi_topk_fvu / 8
            parts = {"fvu": out.fvu, "aux": out.auxk_loss}
            if sae.cfg.multi_topk:
                parts["multi"] = out.multi_topk_fvu
        loss.backward()
        grads = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
        return {**grads, **{n: t.detach() for n, t in parts.items()}, "loss": loss.detach()}

    exact = gradients(make(name).double(), torch.float64, plain=True)
    eager = gradients(make(name), torch.float32, plain=True)
    sae = make(name)
    report = accelerate(sae, correct=True)
    assert_as_accurate(gradients(sae, torch.float32, plain=False), exact, eager)
    assert not report.dense
    in_double = make(name).double()
    accelerate(in_double, correct=True)
    torch.testing.assert_close(gradients(in_double, torch.float64, plain=False), exact)
    # the library's own is another one, and is what `correct=False` gives
    own = gradients(make(name).double(), torch.float64, plain=False)
    assert rms(own["encoder.weight"] - exact["encoder.weight"]) > 1e-2 * rms(
        exact["encoder.weight"]
    )
    assert rms(own["loss"] - exact["loss"]) < 1e-12
    kept = make(name).double()
    accelerate(kept)
    torch.testing.assert_close(gradients(kept, torch.float64, plain=False), own)


def test_a_correct_run_of_micro_batches_trains():
    """AuxK and multi-top-k teach the encoder too; by its own loss that is no worse."""
    name = "multi-topk"
    holder = Holder(make(name))
    report = accelerate(holder, correct=True, optimizer=True)
    found = train(holder, batches(), parts=2)
    own = train(Holder(make(name)), batches(), parts=2)
    assert found.numbers["losses"][-1] < own.numbers["losses"][0]
    assert rms(found.numbers["encoder.weight"] - own.numbers["encoder.weight"]) > 1e-5
    assert not report.dense


# ---- the way back, and copies


@pytest.mark.parametrize("name", ["topk", "groupmax", "skip transcoder"])
def test_everything_is_put_back(name):
    holder = Holder(make(name))
    before = snapshot(holder, holder.sae, holder.optimizers[0])
    report = accelerate(holder, optimizer=True)
    assert report.replaced and "forward" in vars(holder.sae)
    report.restore()
    assert_same(before, snapshot(holder, holder.sae, holder.optimizers[0]))
    report.restore()
    found, wanted = train(holder, batches()), train(Holder(make(name)), batches())
    for key, value in wanted.numbers.items():
        assert torch.equal(found.numbers[key], value), key
    assert report.calls == 0


def test_a_block_ends_where_it_began():
    holder, half = Holder(make()), STEPS // 2
    with accelerate(holder, optimizer=True) as report:
        begun = train(holder, batches()[:half])
    assert "forward" not in vars(holder.sae)
    ended = train(holder, batches())
    assert report.calls == half
    ended.numbers["losses"] = torch.cat([begun.numbers["losses"], ended.numbers["losses"]])
    ended.silent = torch.cat([begun.silent, ended.silent])
    assert_same_training(ended, *unaccelerated("topk"))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["topk", "groupmax, multi-topk"])
def test_copies_are_their_own(name, how):
    sae, x = make(name), randn(N, D, seed=21)
    report = accelerate(sae)
    other = copy.deepcopy(sae) if how == "deepcopy" else pickle.loads(pickle.dumps(sae))
    other(x).fvu.backward()
    # a deep copy is accelerated too, what was pickled is plain
    assert report.calls == (how == "deepcopy")
    assert all(p.grad is None for p in sae.parameters())
    exact, eager = make(name).double(), make(name)
    exact(x.double()).fvu.backward()
    eager(x).fvu.backward()
    grads = [
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        for m in (other, exact, eager)
    ]
    assert_as_accurate(*grads)
    if how == "pickle":
        with accelerate(other) as again:
            other(x)
        assert again.calls == 1


# ---- what is refused


def _refused(obj: Any, *parts: Any, match: str, kind: type[Exception] = ValueError) -> None:
    before = snapshot(obj, *parts)
    for ask in (accelerate, check):
        with pytest.raises(kind, match=match):
            ask(obj)
    assert_same(before, snapshot(obj, *parts))


@pytest.mark.parametrize("method", ["encode", "decode", "forward"])
def test_a_coder_that_overrides_is_refused(method):
    sae = make()
    sae.__class__ = type("Mine", (type(sae),), {method: lambda self, x: x, "__module__": __name__})
    _refused(sae, match=rf"SparseCoder\.{method} .*\.Mine")
    holder = Holder(sae)
    _refused(holder, sae, holder.optimizers[0], match=rf"SparseCoder\.{method} .*\.Mine")


def test_a_subclass_that_overrides_nothing_is_accelerated():
    sae = make()
    sae.__class__ = type("Mine", (type(sae),), {"more": 1, "__module__": __name__})
    with accelerate(sae) as report:
        sae(randn(N, D))
    assert report.calls == 1


def test_other_classes_of_the_library_are_refused():
    config = library().SparseCoderConfig()
    _refused(config, match="SparseCoderConfig is not supported", kind=TypeError)


def test_a_trainer_without_coders_is_refused():
    holder = Holder(make())
    holder.saes = {}
    _refused(holder, match="at least one SparseCoder")


def test_what_is_accelerated_already_is_refused():
    holder = Holder(make())
    accelerate(holder)
    _refused(holder, holder.sae, holder.optimizers[0], match="accelerated already")
    _refused(holder.sae, match="accelerated already")


def _squared(own: Any) -> Any:
    """An encoder of a release that is not known, of another activation function."""

    def fused_encoder(input: Any, weight: Any, bias: Any, k: int, activation: str) -> Any:
        acts, indices, pre = own(input, weight, bias, k, activation)
        return type(own(input, weight, bias, k, activation))(acts.square(), indices, pre)

    return fused_encoder


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("changed", ["encoder", "decoder", "signature", "local", "by hand"])
def test_a_version_that_computes_otherwise_is_refused(changed, correct, monkeypatch):
    module = library("sparsify.sparse_coder")
    sae = make()
    kind, own = type(sae), type(sae).encode
    if changed == "encoder":
        monkeypatch.setattr(module, "fused_encoder", _squared(module.fused_encoder))
    elif changed == "signature":
        monkeypatch.setattr(kind, "encode", _rebound(_with_another_argument, own))
    elif changed == "decoder":
        plain = module.decoder_impl
        monkeypatch.setattr(module, "decoder_impl", lambda i, acts, w: plain(i, 2 * acts, w))
    elif changed == "local":
        monkeypatch.setattr(kind, "encode", _rebound(_with_a_local_import, own))
    else:
        monkeypatch.setattr(kind, "encode", _rebound(_by_hand, own))
    _refused(sae, match="is not known")
    if correct:
        with pytest.raises(ValueError, match="is not known"):
            accelerate(sae, correct=True)


def test_a_version_that_decodes_otherwise_is_followed(monkeypatch):
    plain, sae, x = make(), make(), randn(N, D, seed=21)
    kind = type(sae)
    monkeypatch.setattr(kind, "decode", _rebound(_decode_twice_as_much, kind.decode))
    report = accelerate(sae)
    found, eager = sae(x).sae_out, plain(x).sae_out
    assert_accurate(found, copy.deepcopy(plain).double()(x.double()).sae_out, eager)
    assert report.calls == 1 and not report.dense


def _rebound(function: Any, own: Any) -> Any:
    """As if it stood in the library's module."""
    made = types.FunctionType(function.__code__, own.__globals__, own.__name__)
    made.__module__ = own.__module__
    return made


def _with_another_argument(self, x):
    return fused_encoder(x, self.encoder.weight, self.encoder.bias, self.cfg.k, "topk", True)  # noqa: F821


def _with_a_local_import(self, x):
    from sparsify.fused_encoder import fused_encoder as encode

    return encode(x - self.b_dec, self.encoder.weight, self.encoder.bias, self.cfg.k, "topk")


def _by_hand(self, x):
    pre = torch.relu(self.encoder(x - self.b_dec))
    return EncoderOutput(*pre.topk(self.cfg.k, dim=-1), pre)  # noqa: F821


def _decode_twice_as_much(self, top_acts, top_indices):
    return 2 * decoder_impl(top_indices, top_acts, self.W_dec.mT) + self.b_dec  # noqa: F821
