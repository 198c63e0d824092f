# SPDX-License-Identifier: Apache-2.0
"""SAELens accelerated: its own trainer, hooks and files come out as they do without.

Runs with any release: what one lacks is skipped. Which release is tested is the one that is
imported, so another is put first on PYTHONPATH.
"""

import copy
import functools
import pickle
import warnings
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from accelerate_cases import assert_as_accurate, assert_same, snapshot
from accelerate_saelens import (
    DEAD,
    INFERENCE,
    STEPS,
    TRAINING,
    D,
    F,
    N,
    Run,
    assert_equal_runs,
    batches,
    config,
    library,
    make,
    resume,
    state,
    steps_without_library,
    train,
    trainer,
)
from oracle import assert_accurate, identical, randn
from torch.utils.checkpoint import checkpoint

from mikernels.integrations.accelerate import Report, accelerate, check

pytestmark = pytest.mark.peers
FP64 = torch.float64
SPARSE_JUMPS = tuple(name for name in TRAINING if name.startswith("jumprelu"))
# what has a threshold, so that half of all features may be active
THRESHOLDS = (*SPARSE_JUMPS, "gated", "standard")
# one of every architecture
KINDS = ("topk", "batchtopk", "matryoshka", "jumprelu", "gated", "standard")


@pytest.fixture(autouse=True)
def sae_lens() -> ModuleType:
    return pytest.importorskip("sae_lens", exc_type=ImportError)


@pytest.fixture(autouse=True)
def looks_are_wanted() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "accelerate: .* needs the dense", RuntimeWarning)
        yield


@functools.cache
def plain(name: str, dtype: torch.dtype = torch.float32, apart: bool = False) -> Run:
    """20 steps of the library as it is, in bf16 autocast where that is the dtype."""
    wide = FP64 if dtype is FP64 else torch.float32
    sae = make(name, dtype=wide, apart=apart)
    run = trainer(sae, **settings_of(apart), autocast=dtype is torch.bfloat16)
    return train(run, batches(dtype=wide, apart=name if apart else ""))


def settings_of(apart: bool) -> dict[str, Any]:
    # steps so small that what is apart stays so
    return dict(lr=3e-4, lr_end=1e-4) if apart else {}


def three(name: str, each: Any, **settings: Any) -> tuple[Run, Run, Run, Report]:
    """Accelerated, in fp64 and in fp32: with the same hook into every step."""
    runs = []
    for dtype, faster in ((torch.float32, True), (FP64, False), (torch.float32, False)):
        made = trainer(make(name, dtype=dtype, **settings))
        if faster:
            report = accelerate(made)
        runs.append(train(made, batches(dtype=dtype), each))
    return *runs, report


# ---- 20 steps


@pytest.mark.parametrize("optimizer", [False, True], ids=["torch's Adam", "Adam by rows"])
@pytest.mark.parametrize("name", TRAINING)
def test_training_agrees(name, optimizer):
    made = trainer(make(name))
    report = accelerate(made, optimizer=optimizer)
    assert ("Adam.step" in report.methods) == optimizer
    assert_equal_runs(train(made, batches()), plain(name, FP64), plain(name))
    assert report.calls >= STEPS and not report.dense and not report.crowded


@pytest.mark.parametrize("name", TRAINING)
def test_training_in_bf16_agrees(name):
    made = trainer(make(name, apart=True), **settings_of(True), autocast=True)
    report = accelerate(made)
    got = train(made, batches(apart=name))
    assert_equal_runs(
        got, plain(name, FP64, True), plain(name, torch.bfloat16, True), torch.bfloat16
    )
    assert not report.dense and not report.crowded


@pytest.mark.parametrize("name", THRESHOLDS)
def test_training_of_crowded_features_agrees(name):
    got, exact, eager, report = three(name, lambda *_: None, crowded=True)
    assert_equal_runs(got, exact, eager)
    assert report.crowded >= STEPS


@pytest.mark.parametrize("name", KINDS)
def test_training_without_the_decoders_bias_in_the_input_agrees(name):
    got, exact, eager, report = three(name, lambda *_: None, apply_b_dec_to_input=False)
    assert_equal_runs(got, exact, eager)
    assert not report.dense


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_training_with_another_k_on_the_way_agrees(name):
    def anneal(step: int, made: Any, run: Run) -> None:
        made.sae.activation_fn.k = max(2, 5 - step // 5)

    got, exact, eager, report = three(name, anneal)
    assert_equal_runs(got, exact, eager)
    assert not report.dense
    # five steps of each k
    assert float(got.fired[-1].sum()) == N * 5 * (5 + 4 + 3 + 2)


@pytest.mark.parametrize("name", ["topk", "matryoshka", "jumprelu", "gated"])
def test_what_is_logged_agrees(name):
    def log(step: int, made: Any, run: Run) -> None:
        if step == 10:
            step_of = made.step

            def stepped(x: torch.Tensor) -> Any:
                output = step_of(x)
                said = made.build_train_step_log_dict(output=output, n_training_samples=0)
                run.seen.append(torch.tensor([float(said[n]) for n in sorted(said)]))
                return output

            made.step = stepped

    *runs, report = three(name, log)
    for run in runs:
        # steps of one metric are compared as a whole
        run.seen = list(torch.stack(run.seen).T)
    assert_equal_runs(*runs)
    assert len(runs[0].seen) > 9 and len(runs[0].seen[0]) == 10 and not report.dense


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP64], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_saes_of_other_dtypes_agree(name, dtype):
    runs = []
    for kind, faster in ((dtype, True), (FP64, False), (dtype, False)):
        sae = make(name, dtype=kind, apart=True)
        report = accelerate(sae) if faster else None
        runs.append(steps_without_library(sae, batches(3, dtype=kind, apart=name)))
        assert report is None or not report.dense
    if dtype is FP64:
        # there is nothing more exact
        torch.testing.assert_close(runs[0], runs[1])
    else:
        assert_as_accurate(*runs, dtype)


# ---- hooks


def attach(first: int, last: int, put: Any) -> Any:
    """`each` of a run: hooks are there for some steps."""

    def each(step: int, made: Any, run: Run) -> None:
        if step == first:
            put(made.sae, run)
        elif step == last:
            made.sae.reset_hooks()

    return each


@pytest.mark.parametrize("name", [*KINDS, "topk, sparse", "matryoshka, aux by level"])
def test_hooks_see_activations(name):
    looks = []

    def put(sae: Any, run: Run) -> None:
        def look(t: torch.Tensor, hook: Any) -> None:
            run.seen.append(t.detach().clone())

        sae.hook_sae_acts_pre.add_hook(look)
        sae.hook_sae_acts_post.add_hook(look)

    def each(step: int, made: Any, run: Run) -> None:
        attach(6, 13, put)(step, made, run)
        looks.append(len(run.seen))

    got, exact, eager, report = three(name, each)
    assert_equal_runs(got, exact, eager)
    assert got.seen[0].shape == (N, F)
    # two at each step from the 6th to the 12th, and none before or later
    assert looks[:STEPS] == [0] * 7 + list(range(2, 15, 2)) + [14] * 6
    # an SAE that makes torch's sparse tensors has codes after the pre-activations
    assert sum(report.dense.values()) >= (7 if "sparse" in name else 14)
    before = dict(report.dense)
    train(report_of(report), batches()[:1])
    assert dict(report.dense) == before


def report_of(report: Report) -> Any:
    """A trainer of the SAE of a report."""
    assert report.plan is not None
    return trainer(report.plan.autoencoders[0])


def _ablate(t: torch.Tensor, hook: Any) -> torch.Tensor:
    t = t.clone()
    t[..., 3:9] = 0
    return t


def _scale(t: torch.Tensor, hook: Any) -> torch.Tensor:
    return t * torch.linspace(0.5, 1.5, t.shape[-1], dtype=t.dtype)


def _shift(t: torch.Tensor, hook: Any) -> torch.Tensor:
    return t + 0.1


def _in_place(t: torch.Tensor, hook: Any) -> None:
    t.mul_(0.5)


@pytest.mark.parametrize(
    "point, change",
    [
        ("hook_sae_acts_pre", _shift),
        ("hook_sae_acts_pre", _in_place),
        ("hook_sae_acts_post", _ablate),
        ("hook_sae_acts_post", _scale),
        ("hook_sae_acts_post", _in_place),
    ],
)
@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_hooks_change_activations(name, point, change):
    def put(sae: Any, run: Run) -> None:
        getattr(sae, point).add_hook(change)

    got, exact, eager, _ = three(name, attach(8, 12, put))
    assert_equal_runs(got, exact, eager)
    changed, unchanged = got.losses["loss"], plain(name).losses["loss"]
    assert torch.allclose(changed[:8], unchanged[:8]) and not torch.allclose(changed, unchanged)


@pytest.mark.parametrize("name", KINDS)
def test_hooks_see_gradients(name):
    def put(sae: Any, run: Run) -> None:
        def look(grad: torch.Tensor, hook: Any) -> None:
            run.seen.append(grad.detach().clone())

        sae.hook_sae_acts_pre.add_hook(look, dir="bwd")
        sae.hook_sae_acts_post.add_hook(look, dir="bwd")

    got, exact, eager, _ = three(name, attach(8, 12, put))
    assert_equal_runs(got, exact, eager)
    assert len(got.seen) == 8 and float(got.seen[0].abs().sum()) > 0


@pytest.mark.parametrize("point", ["hook_sae_acts_pre", "hook_sae_acts_post"])
@pytest.mark.parametrize("name", ["topk", "jumprelu", "standard"])
def test_hooks_change_gradients(name, point):
    def put(sae: Any, run: Run) -> None:
        getattr(sae, point).add_hook(lambda grad, hook: grad * 0.5, dir="bwd")

    got, exact, eager, _ = three(name, attach(8, 12, put))
    assert_equal_runs(got, exact, eager)
    assert not torch.allclose(got.losses["loss"], plain(name).losses["loss"], rtol=1e-5)


@pytest.mark.parametrize("name", [*KINDS, "topk, sparse"])
def test_caches_agree(name):
    def each(step: int, made: Any, run: Run) -> None:
        if step % 10 == 5:
            _, cache = made.sae.run_with_cache(batches()[0].to(made.sae.W_enc.dtype))
            run.seen.extend(t.to_dense() for t in cache.values())

    got, exact, eager, _ = three(name, each)
    assert len(got.seen) >= 10
    # the caches are looked at after steps have changed the parameters
    assert_equal_runs(got, exact, eager)


def test_pre_activations_of_earlier_parameters_are_not_made_up():
    made = trainer(make("topk"))
    accelerate(made)
    output = made.step(batches()[0])
    assert output.feature_acts.sum() > 0
    with pytest.raises(RuntimeError, match="before the optimizer's step"):
        output.hidden_pre.detach().clone()


# ---- loops of one's own


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("how", ["strided", "accumulated", "three axes"])
def test_own_loops_agree(name, how):
    runs: list[Any] = []
    for dtype, faster in ((torch.float32, True), (FP64, False), (torch.float32, False)):
        sae, data = make(name, dtype=dtype), batches(6, dtype=dtype)
        if how == "strided":
            data = [torch.stack([x, -x], -1)[..., 0] for x in data]
        elif how == "three axes":
            data = [x.reshape(4, N // 4, D) for x in data]
        report = accelerate(sae) if faster else None
        try:
            found = steps_without_library(sae, data, accumulate=2 if how == "accumulated" else 1)
        except (RuntimeError, NotImplementedError) as error:
            found = error
        runs.append(found)
        assert not report or not report.dense or isinstance(found, Exception)
    if isinstance(runs[2], Exception):
        # the library cuts columns along the wrong axis
        assert how == "three axes" and name.startswith("matryoshka")
        assert type(runs[0]) is type(runs[2])
        return
    assert_as_accurate(*runs)


@pytest.mark.parametrize("name", [*KINDS, "topk, sparse"])
def test_input_gradients_agree(name):
    found = []
    for dtype, faster in ((torch.float32, True), (FP64, False), (torch.float32, False)):
        sae = make(name, dtype=dtype)
        report = accelerate(sae) if faster else None
        x = batches(1, dtype=dtype)[0].requires_grad_()
        (sae(x) * randn(N, D, seed=5).to(dtype)).sum().backward()
        grads = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
        found.append({"x": x.grad, **grads})
        assert not report or not report.dense
    assert_as_accurate(*found)


# ---- normalisation


def fitted(name: str, kind: str, faster: bool, dtype: torch.dtype = torch.float32) -> Any:
    settings = {} if kind.endswith(("in", "whitening")) else dict(dead_feature_window=1000)
    sae = make(name, dtype=dtype, normalize_activations=kind)
    made = trainer(sae, batches(STEPS + 3, dtype=dtype), **settings)
    report = accelerate(made) if faster else None
    made.fit()
    assert not report or (report.calls >= STEPS and not report.dense)
    return made


@pytest.mark.parametrize(
    "kind",
    ["expected_average_only_in", "covariance_whitening", "layer_norm", "constant_norm_rescale"],
)
@pytest.mark.parametrize("name", KINDS)
def test_fits_of_normalised_activations_agree(name, kind):
    if name == "matryoshka" and kind in ("layer_norm", "constant_norm_rescale"):
        with pytest.raises(AttributeError):
            # what the input's norms were is deleted by the first level
            fitted(name, kind, False)
        with pytest.raises((AttributeError, ValueError)):
            fitted(name, kind, True)
        return
    got, exact, eager = (
        fitted(name, kind, faster, dtype)
        for dtype, faster in ((torch.float32, True), (FP64, False), (torch.float32, False))
    )
    assert_as_accurate(*(state(made.sae, made.optimizer) for made in (got, exact, eager)))
    assert torch.equal(got.act_freq_scores, eager.act_freq_scores)
    assert got.sae.cfg.normalize_activations == eager.sae.cfg.normalize_activations
    assert got.sae.cfg.metadata.to_dict() == eager.sae.cfg.metadata.to_dict()


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_refusals_of_the_library_stay(kind):
    made = trainer(make("topk", normalize_activations=kind))
    accelerate(made)
    with pytest.raises(ValueError, match="does not support activation normalization"):
        train(made, batches())


# ---- several SAEs


def test_trainers_of_several_saes_agree():
    found, reports = [], []
    for dtype, faster in ((torch.float32, True), (FP64, False), (torch.float32, False)):
        names = ("topk", "jumprelu")
        saes = {n: make(n, dtype=dtype) for n in names}
        data = iter([{n: x for n in names} for x in batches(dtype=dtype)])
        made = library("sae_lens.training.multi_sae_trainer").MultiSAETrainer(
            cfg=trainer(saes["topk"]).cfg,
            saes=saes,
            hook_names={n: n for n in names},
            data_provider=data,
        )
        if faster:
            reports.append(accelerate(made, optimizer=True))
        made.fit()
        parts = {n: state(t.sae, t.optimizer) for n, t in made.trainers.items()}
        found.append({f"{n} {key}": t for n in names for key, t in parts[n].items()})
    assert_as_accurate(*found)
    report = reports[0]
    assert report.calls >= 2 * STEPS and not report.dense
    with pytest.raises(ValueError, match="codes need one SAE, got 2"):
        report.codes(batches()[0])


def test_each_sae_of_a_trainer_is_tried():
    names = ("topk", "standard")
    saes = {"topk": make("topk"), "standard": make("standard", lp_norm=2.0)}
    made = library("sae_lens.training.multi_sae_trainer").MultiSAETrainer(
        cfg=trainer(saes["topk"]).cfg,
        saes=saes,
        hook_names={n: n for n in names},
        data_provider=iter([]),
    )
    before = everything(made, *saes.values())
    with pytest.raises(ValueError, match="norm of StandardTrainingSAE would make the dense"):
        accelerate(made)
    assert_same(before, everything(made, *saes.values()))


@pytest.mark.parametrize("runner", ["LanguageModelSAETrainingRunner", "SAETrainingRunner"])
def test_runners_hand_on_their_sae(sae_lens, runner):
    kind = getattr(sae_lens, runner)
    made = object.__new__(kind)
    made.sae, made.cfg = make("topk"), SimpleNamespace(compile_sae=False)
    report = accelerate(made)
    assert report.plan.autoencoders == [made.sae]
    report.restore()
    made.cfg.compile_sae = True
    before = everything(made.sae)
    with pytest.raises(ValueError, match="got compile_sae=True"):
        accelerate(made)
    assert_same(before, everything(made.sae))


def test_runners_of_several_saes_hand_them_on(sae_lens):
    kind = getattr(sae_lens, "MultiSAETrainingRunner", None)
    if kind is None:
        pytest.skip(f"sae-lens {sae_lens.__version__} has no MultiSAETrainingRunner")
    made = object.__new__(kind)
    made.saes, made.cfg = {n: make(n) for n in ("topk", "gated")}, SimpleNamespace()
    report = accelerate(made)
    for sae in made.saes.values():
        sae(batches()[0])
    assert report.plan.autoencoders == list(made.saes.values())
    assert report.calls == 3 and not report.dense


def test_runners_train_the_same_sae(monkeypatch, tmp_path, sae_lens):
    monkeypatch.chdir(tmp_path)
    lens = pytest.importorskip("transformer_lens")
    data = pytest.importorskip("datasets").Dataset
    tokens = torch.randint(0, 50, (40, 16), generator=torch.Generator().manual_seed(1))
    trained = []
    for faster in (False, True):
        model = lens.HookedTransformer(
            lens.HookedTransformerConfig(
                **dict(n_layers=1, d_model=D, n_ctx=16, d_head=8, n_heads=2, d_vocab=50),
                **dict(act_fn="relu", seed=0, device="cpu"),
            )
        )
        kind = type(make("topk"))
        torch.manual_seed(0)
        runner = sae_lens.LanguageModelSAETrainingRunner(
            library("sae_lens.config").LanguageModelSAERunnerConfig(
                sae=config(kind, k=4),
                hook_name="blocks.0.hook_resid_post",
                **dict(dataset_path="none", streaming=False, is_dataset_tokenized=True),
                **dict(context_size=16, prepend_bos=False, store_batch_size_prompts=4),
                **dict(n_batches_in_buffer=4, train_batch_size_tokens=N, training_tokens=STEPS * N),
                **dict(lr=1e-3, dead_feature_window=2, device="cpu", output_path=None),
                logger=library("sae_lens.config").LoggingConfig(log_to_wandb=False, wandb_id="1"),
            ),
            override_dataset=data.from_dict({"input_ids": tokens.tolist()}),
            override_model=model,
        )
        report = accelerate(runner) if faster else None
        trained.append(state(runner.run()))
    torch.testing.assert_close(*trained)
    assert report.calls == STEPS and not report.dense


# ---- files


@pytest.mark.parametrize("name", TRAINING)
def test_files_are_what_they_are_without(tmp_path, name):
    plain_sae, sae = make(name), make(name)
    report = accelerate(sae)
    for folder, made in (("plain", plain_sae), ("faster", sae)):
        made.save_model(tmp_path / folder)
        made.save_inference_model(tmp_path / folder / "inference")
    files = [p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").rglob("*.*")]
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "faster" / file).read_bytes()
    # nor is the object changed by it
    train(trainer(sae), batches()[:2])
    sae.save_inference_model(tmp_path / "trained")
    sae.save_model(tmp_path / "trained" / "sae")
    report.restore()
    sae.save_inference_model(tmp_path / "restored")
    sae.save_model(tmp_path / "restored" / "sae")
    for file in (p.relative_to(tmp_path / "trained") for p in (tmp_path / "trained").rglob("*.*")):
        assert (tmp_path / "trained" / file).read_bytes() == (
            tmp_path / "restored" / file
        ).read_bytes()


@pytest.mark.parametrize(
    "name, optimizer", [*((name, True) for name in KINDS), ("topk", False), ("jumprelu", False)]
)
@pytest.mark.parametrize("way", ["plain to faster", "faster to plain", "faster, loaded into"])
def test_checkpoints_go_on_in_the_other_form(tmp_path, name, way, optimizer):
    data = batches()
    first = trainer(make(name), checkpoint_path=str(tmp_path))
    if way != "plain to faster":
        accelerate(first, optimizer=optimizer)
    begun = train(first, data[:10])
    first.save_checkpoint("middle")
    # another SAE, whose weights are those of the file
    second = trainer(make(name, crowded=True))
    if way == "faster, loaded into":
        accelerate(second, optimizer=optimizer)
    resume(second, first, tmp_path / "middle")
    if way == "plain to faster":
        accelerate(second, optimizer=optimizer)
    ended = train(second, data[10:])
    ended.losses = {n: torch.cat([begun.losses[n], t]) for n, t in ended.losses.items()}
    for part in ("fired", "passes"):
        setattr(ended, part, torch.cat([getattr(begun, part), getattr(ended, part)]))
    ended.dead = begun.dead + ended.dead
    assert_equal_runs(ended, plain(name, FP64), plain(name))


@pytest.mark.parametrize("name", KINDS)
def test_checkpoints_hold_what_they_hold_without(tmp_path, name):
    for folder, faster in (("plain", False), ("faster", True)):
        made = trainer(make(name), checkpoint_path=str(tmp_path / folder))
        report = accelerate(made) if faster else None
        # a step that is one in both: of moments, and of nothing that is rounded
        for p in made.sae.parameters():
            p.grad = torch.ones_like(p)
        made.optimizer.step()
        made.optimizer.zero_grad()
        made.n_frac_active_samples = N
        made.save_checkpoint("it")
        assert report is None or not report.dense
    held = [
        torch.load(tmp_path / folder / "it" / "trainer_state.pt") for folder in ("plain", "faster")
    ]
    for a, b in zip(*(h["optimizer"]["state"].values() for h in held), strict=True):
        assert all(identical(a[key], b[key]) for key in a) and a.keys() == b.keys()
    assert held[0]["lr_scheduler"] == held[1]["lr_scheduler"]
    for file in ("sae_weights.safetensors", "sparsity.safetensors", "cfg.json"):
        both = [(tmp_path / folder / "it" / file).read_bytes() for folder in ("plain", "faster")]
        assert both[0] == both[1]


@pytest.mark.parametrize("name", TRAINING)
def test_loaded_saes_are_accelerated(tmp_path, name):
    sae = make(name)
    accelerate(sae)
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    x = batches()[0]
    for loaded in (
        type(sae).load_from_disk(tmp_path / "training"),
        library("sae_lens").SAE.load_from_disk(tmp_path / "inference"),
    ):
        if hasattr(loaded, "threshold") and not bool(loaded.threshold.any()):
            # no step has given it one
            loaded.threshold.data.fill_(2.3)
        with torch.no_grad():
            wanted, out = loaded.encode(x).to_dense(), loaded(x)
        report = accelerate(loaded)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), out)
        assert torch.equal(report.codes(x).to_dense() != 0, wanted != 0)
        assert report.calls and not report.dense


# ---- copies


@pytest.mark.parametrize("name", KINDS)
def test_copies_are_by_themselves(name):
    sae = make(name)
    report = accelerate(sae)
    other = copy.deepcopy(sae)
    before = state(sae)
    run = train(trainer(other), batches())
    assert_equal_runs(run, plain(name, FP64), plain(name))
    assert not report.dense
    assert all(identical(t, before[n]) for n, t in state(sae).items())
    report.restore()
    assert "encode" not in vars(sae)
    x = batches()[0]
    torch.testing.assert_close(copy.deepcopy(other)(x), other(x))


def test_pickles_are_what_they_are_without(tmp_path):
    sae, faster = make("topk"), make("topk")
    accelerate(faster)
    # the library's lambdas cannot be pickled; what can be is its state
    for made in (sae, faster):
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pickle.dumps(made)
    torch.save(sae.state_dict(), tmp_path / "plain")
    torch.save(faster.state_dict(), tmp_path / "faster")
    wanted, found = (torch.load(tmp_path / n) for n in ("plain", "faster"))
    assert list(wanted) == list(found)
    assert all(identical(wanted[n], found[n]) for n in wanted)
    assert all(t.is_contiguous() for t in found.values())
    acts = faster.encode(batches()[0])
    torch.testing.assert_close(pickle.loads(pickle.dumps(acts)), sae.encode(batches()[0]).detach())


# ---- there and back


@pytest.mark.parametrize("optimizer", [False, True], ids=["torch's Adam", "Adam by rows"])
@pytest.mark.parametrize("name", TRAINING)
def test_restored_objects_are_what_they_were(name, optimizer):
    made = trainer(make(name))
    train(made, batches()[:2])
    # gradients that somebody left
    made.sae(batches()[0]).sum().backward()
    before = everything(made, made.sae, made.optimizer)
    report = accelerate(made, optimizer=optimizer)
    assert made.sae.W_enc.T.is_contiguous()
    report.restore()
    assert_same(before, everything(made, made.sae, made.optimizer))
    report.restore()
    assert_same(before, everything(made, made.sae, made.optimizer))


@pytest.mark.parametrize("name", INFERENCE)
def test_restored_inference_saes_are_what_they_were(name):
    sae = make(name, inference=True)
    before = everything(sae)
    with accelerate(sae) as report:
        assert not identical_layout(before, everything(sae))
        sae(batches()[0])
    assert_same(before, everything(sae))
    assert report.calls and report.plan is None
    with pytest.raises(RuntimeError, match="got a restored one"):
        report.codes(batches()[0])


def identical_layout(before: Any, after: Any) -> bool:
    try:
        assert_same(before, after)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", KINDS)
def test_restored_trainers_go_on_bit_by_bit(tmp_path, name):
    data = batches()
    made = trainer(make(name), checkpoint_path=str(tmp_path))
    with accelerate(made):
        train(made, data[:6])
    made.save_checkpoint("middle")
    other = trainer(make(name, crowded=True))
    resume(other, made, tmp_path / "middle")
    # files of releases before 6.48 hold exp of a parameter
    other.sae.load_state_dict(made.sae.state_dict())
    found, wanted = (train(t, data[6:10]) for t in (made, other))
    assert all(identical(t, wanted.parameters[n]) for n, t in found.parameters.items())
    assert all(identical(t, wanted.losses[n]) for n, t in found.losses.items())
    assert all(
        t.stride() == u.stride()
        for t, u in zip(made.sae.parameters(), other.sae.parameters(), strict=True)
    )


# ---- refusals


def everything(*objects: Any) -> list[Any]:
    """A snapshot of objects with the SAEs' configurations and metadata."""
    cfgs = [obj.cfg for obj in objects if hasattr(obj, "W_enc")]
    return snapshot(*objects, *cfgs, *(cfg.metadata for cfg in cfgs))


def refused(obj: Any, error: type[Exception], match: str, *parts: Any) -> None:
    """It is, and the object is what it was."""
    before = everything(obj, *parts)
    for way in (accelerate, check):
        with pytest.raises(error, match=match):
            way(obj)
        assert_same(before, everything(obj, *parts))


@pytest.mark.parametrize("name", [*KINDS])
def test_a_second_acceleration_is_refused(name):
    made = trainer(make(name))
    report = accelerate(made)
    refused(made, ValueError, "accelerated already", made.sae)
    refused(made.sae, ValueError, "accelerated already", made)
    report.restore()
    accelerate(made.sae).restore()


def test_compiled_methods_are_refused():
    made = trainer(make("topk"))
    # what the library's runner does
    made.sae.training_forward_pass = torch.compile(made.sae.training_forward_pass)
    refused(made, ValueError, "forward_pass of the class, got a method of this object", made.sae)


def test_compiled_modules_are_refused():
    refused(torch.compile(make("topk")), TypeError, "expected an SAE, trainer or runner")
    sae = make("topk")
    sae.compile()
    refused(sae, ValueError, "compile")


@pytest.mark.parametrize("method", ["encode", "decode", "calculate_aux_loss", "forward"])
def test_overridden_methods_are_refused(method):
    kind = type(make("topk"))
    inherited = getattr(kind, method)
    own = type("Own", (kind,), {method: lambda self, *args, **kwargs: inherited(self, *args)})
    sae = own(config(kind, k=4))
    refused(trainer(sae), ValueError, f"expected TopKTrainingSAE.{method} of sae_lens", sae)


def test_subclasses_that_override_nothing_are_accelerated():
    kind = type(make("topk"))
    sae = type("Own", (kind,), {"name": "own"})(config(kind, k=4))
    report = accelerate(sae)
    sae(batches()[0])
    assert report.calls == 1 and not report.dense


@pytest.mark.parametrize(
    "name", ["AbsTopKTrainingSAE", "AbsTopKSAE", "MatchingPursuitSAE", "MatchingPursuitTrainingSAE"]
)
def test_unknown_classes_are_refused(sae_lens, name):
    kind = getattr(sae_lens, name, None)
    if kind is None:
        pytest.skip(f"sae-lens {sae_lens.__version__} has no {name}")
    sae = kind(config(kind))
    refused(sae, TypeError, f"{name} is not supported")


@pytest.mark.parametrize(
    "obj", [torch.nn.Linear(2, 3), torch.nn.Module()], ids=["Linear", "Module"]
)
def test_objects_of_no_library_are_refused(obj):
    refused(obj, TypeError, "expected an SAE, trainer or runner of sae_lens")


@pytest.mark.parametrize(
    "name, settings, match",
    [
        ("standard", dict(lp_norm=2.0), "norm of StandardTrainingSAE would make the dense"),
        ("standard", dict(lp_norm=0.5), "norm of StandardTrainingSAE would make the dense"),
        ("topk", dict(d_sae=D), "expected more features than activations' width"),
    ],
)
def test_settings_that_are_not_known_are_refused(name, settings, match):
    made = trainer(make(name, **settings))
    refused(made, ValueError, match, made.sae)


def test_settings_with_which_the_library_fails_are_refused():
    made = trainer(make("topk, sparse", rescale_acts_by_decoder_norm=True))
    try:
        train(made, batches()[:1])
    except NotImplementedError:
        made = trainer(make("topk, sparse", rescale_acts_by_decoder_norm=True))
        refused(
            made, ValueError, "a small TopKTrainingSAE of these settings, as it is, fails", made.sae
        )
    else:
        accelerate(trainer(make("topk, sparse", rescale_acts_by_decoder_norm=True)))


def _no_product(self: Any, x: torch.Tensor) -> Any:
    h = torch.einsum("nd,df->nf", self.process_sae_in(x), self.W_enc) + self.b_enc
    return self.activation_fn(h), h


def _looks(self: Any, x: torch.Tensor) -> Any:
    h = self.process_sae_in(x) @ self.W_enc + self.b_enc
    return self.activation_fn(h.sigmoid()), h


@pytest.mark.parametrize(
    "changed, match",
    [(_no_product, "formed no product of activations"), (_looks, "sigmoid of TopKTrainingSAE")],
)
def test_versions_whose_internals_changed_are_refused(monkeypatch, changed, match):
    made = trainer(make("topk"))
    monkeypatch.setattr(type(made.sae), "encode_with_hidden_pre", changed)
    refused(made, ValueError, f"{match}.*not known", made.sae)


def test_versions_of_which_a_step_comes_out_otherwise_are_refused(monkeypatch):
    made = trainer(make("topk"))
    page = library("mikernels.integrations.lazy.product")
    monkeypatch.setattr(page.Product, "shaped", lambda self, h, *args, **kwargs: h * 1.01)
    refused(made, ValueError, "would be off by", made.sae)


# ---- in use


INPUTS = {"plain": (N, D), "three axes": (4, N // 4, D), "one": (D,), "none": (0, D)}


@pytest.mark.parametrize("shape", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("name", INFERENCE)
def test_inference_agrees(name, shape):
    # seed 19: some feature is active at one token too
    x = randn(*shape, seed=19)
    sae, faster, exact = (
        make(name, inference=True, dtype=t) for t in (torch.float32, torch.float32, FP64)
    )
    report = accelerate(faster)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            acts = exact.encode(x.double())
            assert_accurate(faster(x), exact(x.double()), sae(x))
            codes = report.codes(x).to_dense().reshape(acts.shape)
            assert torch.equal(codes != 0, acts != 0)
            assert_accurate(codes, acts, sae.encode(x))
    assert not report.dense and not report.crowded
    if x.numel():
        assert 0 < int((acts != 0).sum()) < acts.numel() / 4
    with torch.no_grad():
        assert_accurate(faster.encode(x) + 0, acts, sae.encode(x))


@pytest.mark.parametrize("crowded", [False, True], ids=["few", "crowded"])
@pytest.mark.parametrize("name", INFERENCE)
def test_inference_gradients_agree(name, crowded):
    found = []
    for dtype, faster in ((torch.float32, True), (FP64, False), (torch.float32, False)):
        sae = make(name, inference=True, dtype=dtype, crowded=crowded)
        if faster:
            report = accelerate(sae)
        x = batches(1, dtype=dtype)[0].requires_grad_()
        out = sae(x)
        (out * randn(*out.shape, seed=5).to(dtype)).sum().backward()
        grads = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
        found.append({"out": out, "x": x.grad, **grads})
    assert_as_accurate(*found)
    assert bool(report.crowded) == (crowded and "topk" not in name)
    assert report.crowded or not report.dense


@pytest.mark.parametrize("name", [n for n in INFERENCE if "transcoder" not in n])
def test_inference_with_an_error_term_agrees(name):
    found = []
    for dtype, faster in ((torch.float32, True), (FP64, False), (torch.float32, False)):
        sae = make(name, inference=True, dtype=dtype)
        sae.use_error_term = True
        if faster:
            report = accelerate(sae)
        sae.hook_sae_acts_post.add_hook(_scale)
        given = batches(1, dtype=dtype)[0].requires_grad_()
        out = sae(given)
        out.square().sum().backward()
        found.append({"out": out, "x": given.grad})
        sae.reset_hooks()
        whole = sae(given)
        # with nothing changed the error makes up for all
        torch.testing.assert_close(whole, given, rtol=1e-5, atol=1e-5)
    assert_as_accurate(*found)
    assert report.calls >= 4


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu", "standard"])
def test_training_saes_with_an_error_term_agree(name):
    found = []
    for dtype, faster in ((torch.float32, True), (FP64, False), (torch.float32, False)):
        sae = make(name, dtype=dtype)
        sae.use_error_term = True
        if faster:
            report = accelerate(sae)
        out = sae(batches(1, dtype=dtype)[0])
        out.square().sum().backward()
        found.append({"out": out, "W_enc": sae.W_enc.grad, "W_dec": sae.W_dec.grad})
    assert_as_accurate(*found)
    assert report.calls == 2 and not report.dense


def _twice(sae: Any, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sae(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), sae.W_dec)[0]


def _by_jacobian(sae: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.functional.jacobian(sae, x[:2])


def _by_vmap(sae: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.func.vmap(lambda row: sae(row[None])[0])(x)


def _forward(sae: Any, x: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(sae(forward_ad.make_dual(x, x + 1))).tangent


def _by_functions(sae: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda x: sae(x).square().sum())(x)


def _by_call(sae: Any, x: torch.Tensor) -> torch.Tensor:
    state = {n: 1.1 * t for n, t in sae.state_dict().items()}
    return torch.func.functional_call(sae, state, (x,))


def _checkpointed(sae: Any, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    checkpoint(sae, x, use_reentrant=False).square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(
    "how",
    [_twice, _by_jacobian, _by_vmap, _forward, _by_functions, _by_call, _checkpointed],
)
@pytest.mark.parametrize("name", INFERENCE)
def test_derivatives_of_every_kind_agree(name, how):
    sae, faster, exact = (
        make(name, inference=True, dtype=t) for t in (torch.float32, torch.float32, FP64)
    )
    report = accelerate(faster)
    x = batches()[0]
    assert_accurate(how(faster, x), how(exact, x.double()), how(sae, x))
    # the library's own product where the operators do not know the transform, which is said
    assert bool(report.dense) == (how in (_by_vmap, _forward, _by_functions))


@pytest.mark.parametrize("frozen", ["W_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("name", ["topk", "jumprelu", "gated", "standard"])
def test_frozen_parameters_agree(name, frozen):
    found = []
    for dtype, faster in ((torch.float32, True), (FP64, False), (torch.float32, False)):
        sae = make(name, inference=True, dtype=dtype)
        getattr(sae, frozen).requires_grad_(False)
        report = accelerate(sae) if faster else None
        x = batches(1, dtype=dtype)[0].requires_grad_()
        sae(x).square().sum().backward()
        grads = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
        assert frozen not in grads and not (report and report.dense)
        found.append({"x": x.grad, **grads})
    assert_as_accurate(*found)


@pytest.mark.parametrize("point", ["hook_sae_acts_pre", "hook_sae_acts_post"])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_kept_for_hooks(name, point):
    found = []
    for dtype, faster in ((torch.float32, True), (FP64, False), (torch.float32, False)):
        sae, seen = make(name, dtype=dtype), {}
        if faster:
            accelerate(sae)

        def keep(t: torch.Tensor, hook: Any, seen: dict[str, Any] = seen) -> None:
            seen["kept"] = t
            t.retain_grad()
            t.register_hook(lambda grad: seen.update(told=grad))

        getattr(sae, point).add_hook(keep)
        sae(batches(1, dtype=dtype)[0]).square().sum().backward()
        found.append({"told": seen["told"], "kept": seen["kept"].grad})
    assert_as_accurate(*found)
    assert float(found[1]["kept"].abs().sum()) > 0


@pytest.mark.parametrize("name", KINDS)
def test_gradients_that_codes_do_not_have_are_refused(name):
    sae = make(name)
    accelerate(sae)
    acts = sae.encode(batches()[0])
    loss = sae.decode(acts).square().sum()
    with pytest.raises(RuntimeError, match=r"autograd.grad must come before .* retain_grad\(\)"):
        torch.autograd.grad(loss, acts, allow_unused=True)
    acts = sae.encode(batches()[0]).detach().requires_grad_()
    (grad,) = torch.autograd.grad(sae.decode(acts).square().sum(), acts)
    assert grad.shape == (N, F) and float(grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["topk, by norms", "jumprelu", "gated", "standard", "transcoder"])
def test_decoders_norms_are_folded_as_they_are_without(name):
    sae, faster = (make(name, inference=True) for _ in range(2))
    report = accelerate(faster)
    for made in (sae, faster):
        made.fold_W_dec_norm()
    assert all(identical(t, sae.state_dict()[n]) for n, t in faster.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(faster(batches()[0]), sae(batches()[0]))
    assert not report.dense
    report.restore()
    assert faster.W_enc.is_contiguous()


def test_heads_are_flattened_as_the_library_does():
    x = randn(N, 4, D // 4, seed=8)
    sae, faster = (make("jumprelu", inference=True, reshape_activations="hook_z") for _ in range(2))
    report = accelerate(faster)
    with torch.no_grad():
        torch.testing.assert_close(faster(x), sae(x))
    assert report.calls == 1 and not report.dense and faster(x).shape == x.shape


@pytest.mark.parametrize("name", [*TRAINING])
def test_codes_are_the_dense_encoding(name):
    sae, x = make(name), batches()[0]
    wanted = sae.encode(x).to_dense().detach()
    with accelerate(sae) as report:
        codes = report.codes(x)
        torch.testing.assert_close(codes.to_dense().detach(), wanted)
        assert torch.equal(codes.to_dense() != 0, wanted != 0)
        assert not report.dense
        deep = report.codes(x.reshape(2, -1, D)).to_dense()
        torch.testing.assert_close(deep.reshape(N, F).detach(), wanted)
        (codes.values.sum() + codes.to_dense().sum()).backward()
        assert sae.W_enc.grad is not None


@pytest.mark.parametrize("name", THRESHOLDS)
def test_codes_of_crowded_features_are_the_dense_encoding(name):
    sae, x = make(name, crowded=True), batches()[0]
    wanted = sae.encode(x).detach()
    report = accelerate(sae)
    torch.testing.assert_close(report.codes(x).to_dense().detach(), wanted)
    assert report.crowded and int((wanted != 0).sum()) > N * F / 5


def _masked(t: torch.Tensor) -> torch.Tensor:
    mask = t > 0.5
    mask[:, 3:9] = 0
    return mask


@pytest.mark.parametrize("name", [*KINDS, "topk, sparse"])
def test_encodings_may_be_looked_at(name):
    sae, faster, x = make(name), make(name), batches()[0]
    report = accelerate(faster)
    for look in (
        lambda t: torch.from_numpy(t.detach().numpy()),
        lambda t: t[3],
        lambda t: t.topk(2).values,
        lambda t: t.max(0).values,
        lambda t: (t > 0).float().mean(0),
        lambda t: torch.tensor(t.cpu().tolist()),
        lambda t: torch.pow(2.0, t),
        lambda t: torch.ones(F).to(t).gt(t),
        lambda t: torch.nn.functional.linear(torch.ones(N, F), t),
        lambda t: t * torch.full((F,), torch.inf),
        _masked,
    ):
        # nobody has looked before
        wanted, found = (look(s.encode(x).to_dense()) for s in (sae, faster))
        torch.testing.assert_close(found, wanted, equal_nan=True)
    assert name == "topk, sparse" or report.dense


def test_modes_of_other_threads_are_their_own():
    import threading

    sae, x = make("topk"), batches()[0]
    wanted = sae(x).detach()
    report = accelerate(sae)
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(sae(x).detach())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and not report.dense
    for out in found:
        torch.testing.assert_close(out, wanted)


def test_dead_features_are_those_of_the_case():
    """What the other tests rest on: AuxK is active, and has features to choose from."""
    run = plain("topk", FP64)
    assert all(dead > D // 2 for dead in run.dead[2:])
    assert float(run.losses["auxiliary_reconstruction_loss"][2:].min()) > 0
    assert int((run.fired[-1] == 0).sum()) <= DEAD
