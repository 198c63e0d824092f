# SPDX-License-Identifier: Apache-2.0
"""training: the fused step against autograd and dense PyTorch, schedules, metrics, bad input."""

import copy
import io
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from oracle import assert_accurate, identical, num_threads, randn
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mikernels.activations import TensorSource
from mikernels.nn import TopKSAE
from mikernels.optim import RowAdam
from mikernels.training import TrainConfig, Trainer
from mikernels.training.progress import Board
from mikernels.training.state.metrics import PARTS, Clock, History, Means
from mikernels.training.steps.autograd import AutogradStep, dense_forward, sparse_forward
from mikernels.training.steps.fused import FusedStep, Scratch
from mikernels.values.batch import Batch

D, F, K, BATCH = 16, 96, 4, 64
STEPS = 20


def activations(n: int = 1024) -> torch.Tensor:
    """Sparse combinations of 2 D hidden directions, off centre."""
    directions = randn(2 * D, D, seed=1)
    amounts = randn(n, 2 * D, seed=2).relu() * (randn(n, 2 * D, seed=4) > 1.3)
    return amounts @ directions + 0.01 * randn(n, D, seed=3) + 2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny steps wait longer for a second thread than they work (50 to 1 on a busy machine)."""
    with num_threads(1):
        yield


class Batches:
    """A source of the given batches, and then the end."""

    def __init__(self, batches: list[torch.Tensor]):
        self.batches, self.d, self.at = batches, D, 0

    def next_batch(self) -> torch.Tensor:
        if self.at == len(self.batches):
            raise StopIteration
        self.at += 1
        return self.batches[self.at - 1]

    def state_dict(self) -> dict:
        return {"at": self.at}

    def load_state_dict(self, state: dict) -> None:
        self.at = state["at"]


def make_sae(**settings) -> TopKSAE:
    settings = {"dead_after": 300, "k_aux": 5, **settings}
    return TopKSAE(D, F, K, generator=torch.Generator().manual_seed(0), **settings)


def train(sae: TopKSAE | None = None, steps: int = STEPS, optimizer=None, **settings) -> History:
    sae = make_sae() if sae is None else sae
    size = settings.setdefault("batch_size", BATCH)
    settings.setdefault("total_tokens", steps * size * settings.get("accumulation", 1))
    config = TrainConfig(**{"lr": 3e-3, "log_every": 1, **settings})
    source = TensorSource(activations(), size, seed=0)
    return Trainer(sae, source, config, quiet=True, optimizer=optimizer).run()


@pytest.mark.parametrize("loss", ["mse", "fvu"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_three_steps_agree(loss, accumulation) -> None:
    histories = {
        step: train(
            make_sae(loss=loss),
            step=step,
            accumulation=accumulation,
            warmup_steps=5,
            k_start=8,
            k_anneal_steps=6,
            decay="cosine",
        )
        for step in ("fused", "autograd", "dense")
    }
    fused = histories["fused"]
    assert max(fused.column("aux_loss")) > 0, "AuxK was never at work"
    for other in (histories["autograd"], histories["dense"]):
        for name in ("tokens", "lr", "k"):
            assert fused.column(name) == other.column(name)
        for name in ("loss", "mse", "fvu", "aux_loss", "l0", "dead_fraction"):
            # rounding at first; later a token may select another feature, which is 1e-3 of so small
            # a batch (training/steps/autograd.py)
            for steps, rel in ((1, 5e-7), (5, 5e-6), (STEPS, 5e-3)):
                expected = pytest.approx(other.column(name)[:steps], rel=rel, abs=1e-7)
                assert fused.column(name)[:steps] == expected, (name, steps)


@pytest.mark.parametrize("loss", ["mse", "fvu"])
@pytest.mark.parametrize("n_dead", [0, 3, 40])
def test_fused_gradients_are_those_of_autograd(loss, n_dead) -> None:
    x = [activations(BATCH), activations(2 * BATCH)[BATCH:]]
    dead = torch.arange(n_dead) * 2
    config = TrainConfig(total_tokens=2 * BATCH, clip_norm=None)

    sae = make_sae(loss=loss)

    def gradients(dtype: torch.dtype, fused: bool) -> list[torch.Tensor]:
        sae.zero_grad()
        sae.to(dtype)
        with torch.no_grad():
            sae.b_dec.fill_(1.5)
            sae.b_enc.copy_(0.1 * randn(F, seed=7))
        parameters = (sae.w_dec, sae.w_enc, sae.b_enc, sae.b_dec)
        batches = [Batch(part.to(dtype)) for part in x]
        if fused:
            step = FusedStep(sae, config)
            step.optimizer.apply_gradients = lambda gradients: None  # type: ignore[method-assign]
            step(batches, K, dead, Means(), Clock(History().parts))
            return [step.gradients[p] for p in parameters]
        for part in batches:
            (dense_forward(sae, part, K, dead, Clock(History().parts)).loss / 2).backward()
        return [p.grad for p in parameters]

    ours = gradients(torch.float32, True)
    # a sum over tokens of both signs: what one rounding is relative to
    terms = torch.zeros(F, D)
    with torch.no_grad():
        for part in x:
            for codes, dy, *_ in sae.terms(Batch(part), K, dead, 0.5, Scratch()).terms:
                terms += codes.to_dense().abs().T @ dy.abs()
    eagers, oracles = gradients(torch.float32, False), gradients(torch.float64, False)
    scales = terms.max().item(), None, None
    for actual, oracle, eager, scale in zip(ours[:3], oracles[:3], eagers[:3], scales, strict=True):
        assert_accurate(actual, oracle, eager, scale=scale)
    # db_dec is sum dy - w_enc^T db_enc, F terms of both signs
    scale = (oracles[2].abs() @ sae.w_enc.detach().double().abs()).max().item()
    assert_accurate(ours[3], oracles[3], eagers[3], scale=scale)


def test_one_step_moves_the_weights_alike() -> None:
    def weights(step: str) -> list[torch.Tensor]:
        sae = make_sae()
        train(sae, steps=1, step=step, eps=1e-3, clip_norm=0.5)
        return list(sae.state_dict().values())

    for fused, autograd in zip(weights("fused"), weights("autograd"), strict=True):
        torch.testing.assert_close(fused, autograd, rtol=1e-4, atol=1e-6)


def test_the_fused_step_makes_no_second_matrix_of_features() -> None:
    sae = make_sae()
    config = TrainConfig(total_tokens=100)
    step = FusedStep(sae, config)
    args = [Batch(activations(8))], K, torch.arange(20), Means(), Clock(History().parts)
    step(*args)  # Adam's state and the dead rows' buffer are made now, once
    states = [t for p in sae.parameters() for t in (p, *step.optimizer.state[p].values())]
    kept = [t for t in (*states, *step.gradients.values()) if isinstance(t, torch.Tensor)]
    known = {t.untyped_storage().data_ptr() for t in kept}
    fresh = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                    fresh.append((t.numel(), str(func)))
            return out

    with Watch():
        step(*args)
    assert fresh and max(fresh)[0] < F * D, max(fresh)


def test_training_explains_the_data_and_aux_revives_dead_features() -> None:
    def run(coefficient: float) -> tuple[TopKSAE, History]:
        sae = make_sae(aux_coefficient=coefficient)
        with torch.no_grad():
            sae.w_enc[8:] *= 0.05  # too weak to be selected beside the others
        return sae, train(sae, steps=150, lr=1e-2)

    (revived, history), (dead, other) = run(1 / 32), run(0.0)
    fvu = history.column("fvu")
    assert fvu[-1] < 0.2 * fvu[0] and fvu[-1] < 0.1
    assert history.rows[-1]["l0"] <= K
    assert dead.dead().sum() > revived.dead().sum() + 10
    assert fvu[-1] < other.column("fvu")[-1]
    torch.testing.assert_close(torch.linalg.vector_norm(revived.w_dec, dim=-1), torch.ones(F))


def test_b_dec_starts_at_the_geometric_median() -> None:
    for init, low, high in ((True, 1.5, 2.6), (False, 0, 0.1)):
        sae = make_sae()
        train(sae, steps=1, lr=1e-5, init_b_dec=init)
        assert low <= sae.b_dec.mean() <= high


def test_accumulated_micro_batches_are_one_batch() -> None:
    """With mse and the fvu's normaliser aside, four quarters average to the whole."""
    whole, quarters = make_sae(aux_coefficient=0.0), make_sae(aux_coefficient=0.0)
    a = train(whole, steps=5, init_b_dec=False)
    b = train(quarters, steps=5, init_b_dec=False, batch_size=BATCH // 4, accumulation=4)
    assert a.column("mse") == pytest.approx(b.column("mse"), rel=1e-5)
    torch.testing.assert_close(whole.w_dec, quarters.w_dec, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["mse", "fvu"])
@pytest.mark.parametrize("step", ["fused", "autograd", "dense"])
def test_unequal_micro_batches_are_weighted_by_token(step, loss) -> None:
    """Each token counts once: the gradient is the token-weighted mean of its micro-batches'."""
    x = activations(BATCH)
    parts = [x[:5], x[5:]]
    sae = make_sae(loss=loss, normalize_decoder=False)
    config = TrainConfig(total_tokens=BATCH, step=step, clip_norm=None, lr=1.0)
    forward = dense_forward if step == "dense" else sparse_forward
    run = FusedStep(sae, config) if step == "fused" else AutogradStep(sae, config, None, forward)
    # plain gradient descent shows the gradient
    before = [p.detach().clone() for p in sae.parameters()]
    if step == "fused":
        run.optimizer.apply_gradients = lambda gradients: [  # type: ignore[method-assign]
            p.sub_(g) for p, g in gradients.items()
        ]
    else:
        run.optimizer = torch.optim.SGD(sae.parameters(), lr=1.0)
    means = Means()
    run(
        [Batch(part) for part in parts],
        K,
        torch.empty(0, dtype=torch.int64),
        means,
        Clock(History().parts),
    )
    moved = [b - p.detach() for b, p in zip(before, sae.parameters(), strict=True)]

    with torch.no_grad():
        for p, start in zip(sae.parameters(), before, strict=True):
            p.copy_(start)
    sae.double()
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        out = sae.score(part.double(), codes := sae.encode(part.double()), sae.decode(codes))
        total = total + out.loss * (len(part) / BATCH)
    expected = torch.autograd.grad(total, list(sae.parameters()))
    for got, want in zip(moved, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert means.tokens == BATCH
    assert means.means()["loss"] == pytest.approx(total.item(), rel=1e-5)


PARAMETERS = ("w_dec", "w_enc", "b_enc", "b_dec")


@pytest.mark.parametrize("step", ["fused", "autograd", "dense"])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize(
    "frozen", [c for n in (1, 2, 3) for c in itertools.combinations(PARAMETERS, n)]
)
def test_frozen_parameters_stay_put(step, clip_norm, frozen) -> None:
    def run(step: str) -> dict[str, torch.Tensor]:
        sae = make_sae(dead_after=4 * BATCH)
        with torch.no_grad():
            sae.w_dec *= 1.5  # not even renormalised
        for name in frozen:
            p = getattr(sae, name)
            p.requires_grad_(False)
            p.grad = torch.ones_like(p)  # left by somebody
        before = {name: p.detach().clone() for name, p in sae.named_parameters()}
        train(sae, steps=8, step=step, clip_norm=clip_norm)
        for name, p in sae.named_parameters():
            assert torch.equal(p, before[name]) == (name in frozen), name
        return {name: p.detach() for name, p in sae.named_parameters()}

    ours = run(step)
    for name, other in run("dense").items():
        # the norm that is clipped is that of the others
        torch.testing.assert_close(ours[name], other, rtol=1e-2, atol=2e-3)


def _own_score(sae: TopKSAE) -> None:
    sae.score = lambda *args: None  # type: ignore[method-assign, assignment]


BYPASSED = {
    "a parametrization": lambda sae: parametrize.register_parametrization(
        sae, "w_dec", torch.nn.Identity()
    ),
    "forward hooks": lambda sae: sae.register_forward_hook(lambda *args: None),
    "its own score": _own_score,
    "a hook on w_enc": lambda sae: sae.w_enc.register_hook(lambda gradient: 0 * gradient),
    "a hook on b_dec": lambda sae: sae.b_dec.register_post_accumulate_grad_hook(lambda p: None),
    "backward hooks": lambda sae: sae.register_full_backward_hook(lambda *args: None),
}


@pytest.mark.parametrize("what", BYPASSED)
@pytest.mark.parametrize("step", ["fused", "dense"])
def test_what_a_step_would_pass_by_is_refused(step, what) -> None:
    BYPASSED[what](sae := make_sae())
    with pytest.raises(ValueError, match=f"plain TopKSAE for step='{step}'.*got {what}"):
        train(sae, steps=1, step=step)


def test_an_overridden_method_is_used_by_autograd_and_refused_by_the_others() -> None:
    class Half(TopKSAE):
        def decode(self, codes):
            return 0.5 * super().decode(codes)

        def score(self, x, codes, reconstruction, dead=None):
            seen.append(float(reconstruction.detach().abs().max()))
            return super().score(x, codes, reconstruction, dead)

    seen: list[float] = []
    train(Half(D, F, K), steps=2, step="autograd")
    assert len(seen) == 2
    for step in ("fused", "dense"):
        with pytest.raises(ValueError, match="its own decode, its own score"):
            train(Half(D, F, K), steps=1, step=step)
    hooked = make_sae()
    hooked.w_enc.register_hook(torch.zeros_like)
    before = hooked.w_enc.detach().clone()
    train(hooked, steps=2, step="autograd")
    assert torch.equal(hooked.w_enc, before)


def test_an_sae_without_a_parameter_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="must have a parameter to train"):
        train(make_sae().requires_grad_(False))
    with pytest.raises(ValueError, match="loss='fvu' must have batches of at least 2 tokens"):
        train(make_sae(loss="fvu"), batch_size=1)


class Weighted(Batches):
    """Batches with targets and weights, as a transcoder's source gives them."""

    def __init__(self, batches: list[Batch]):
        super().__init__(batches)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["mse", "fvu"])
def test_targets_and_weights_count_alike_in_all_steps(loss) -> None:
    """A weight of 2 is a token twice, of 0 a token that is not there; the target is what counts."""
    x = activations(3 * BATCH).view(3, BATCH, D)
    y = x.roll(1, -1) + 1
    weights = torch.randint(0, 3, (3, BATCH), generator=torch.Generator().manual_seed(0)).float()
    repeats = [w.long() for w in weights]

    def run(step: str, repeated: bool) -> tuple[list[torch.Tensor], list[dict]]:
        sae = make_sae(loss=loss, dead_after=10**9)
        with torch.no_grad():
            sae.w_enc[F // 2 :] *= 0.02
            sae.tokens_since_fired[F // 2 :] = 10**9
        batches = [
            Batch(a.repeat_interleave(r, 0), b.repeat_interleave(r, 0))
            if repeated
            else Batch(a, b, w)
            for a, b, w, r in zip(x, y, weights, repeats, strict=True)
        ]
        config = TrainConfig(
            total_tokens=3 * BATCH, batch_size=BATCH, step=step, lr=1e-3, log_every=1, eps=1e-3,
            scale_activations=False, init_b_dec=False,
        )  # fmt: skip
        rows = Trainer(sae, Weighted(batches), config, quiet=True).run().rows
        return [p.detach() for p in sae.parameters()], rows

    expected, rows = run("dense", repeated=True)
    assert rows[0]["aux_loss"] > 0
    for step in ("fused", "autograd", "dense"):
        got, weighted = run(step, repeated=False)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        for name in ("loss", "mse", "fvu", "aux_loss", "l0"):
            a, b = ([row[name] for row in history] for history in (weighted, rows))
            assert a == pytest.approx(b, rel=1e-4), (step, name)
    with pytest.raises(ValueError, match="weights of batch 1 must be finite and at least 0"):
        Trainer(
            make_sae(), Weighted([Batch(x[0], None, -weights[0])]),
            TrainConfig(BATCH, BATCH), quiet=True,
        ).run()  # fmt: skip
    with pytest.raises(ValueError, match=r"the target of batch 1 must be \[batch, 16\]"):
        bad = Batch(x[0], y[0, :, :3])
        Trainer(make_sae(), Weighted([bad]), TrainConfig(BATCH, BATCH), quiet=True).run()


@pytest.mark.parametrize("step", ["fused", "autograd", "dense"])
@pytest.mark.parametrize("loss", ["mse", "fvu"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_tokens_without_variance_keep_every_number_finite(step, loss, tokens) -> None:
    sae = make_sae(loss=loss)
    same = activations(1).expand(tokens, D)
    config = TrainConfig(total_tokens=BATCH, step=step)
    forward = dense_forward if step == "dense" else sparse_forward
    run = FusedStep(sae, config) if step == "fused" else AutogradStep(sae, config, None, forward)
    means = Means()
    run([Batch(same.clone())], K, torch.arange(6, 40), means, Clock(History().parts))
    assert all(math.isfinite(value) for value in means.means().values())
    assert means.means()["fvu"] == 0 and means.means()["aux_loss"] == 0
    assert all(p.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize("step", ["fused", "autograd", "dense"])
@pytest.mark.parametrize("size", [0.2, 30.0, 300.0])
def test_aux_revives_dead_features_at_any_scale_of_activations(step, size) -> None:
    def revived(size: float, coefficient: float = 1 / 32) -> float:
        sae = make_sae(aux_coefficient=coefficient, dead_after=10 * BATCH)
        with torch.no_grad():
            sae.w_enc[F // 2 :] *= 0.02  # too weak to be selected beside the others
        config = TrainConfig(total_tokens=120 * BATCH, batch_size=BATCH, step=step, lr=3e-3)
        x = size * activations()
        Trainer(sae, TensorSource(x, BATCH), config, quiet=True).run()
        return (sae.encode(x).fired()[F // 2 :] > 0).double().mean().item()

    unit = revived(1.0)
    assert unit > 0.2 and revived(size, 0.0) < 0.5 * unit
    assert revived(size) == pytest.approx(unit, rel=0.3)


def test_the_scale_of_activations_is_folded_back() -> None:
    x = 100 * activations()

    def run(**settings) -> tuple[TopKSAE, History]:
        sae = make_sae()
        config = TrainConfig(
            **{"total_tokens": 40 * BATCH, "batch_size": BATCH, "lr": 1e-2, **settings}
        )
        return sae, Trainer(sae, TensorSource(x, BATCH), config, quiet=True).run()

    sae, history = run()
    assert history.scale == 2.0 ** round(math.log2(D**0.5 / x[:BATCH].norm(dim=-1).mean()))
    # the rows of the run say what the SAE does with the activations as they are
    with torch.no_grad():
        fvu = sae.eval()(x).fvu.item()
    assert fvu == pytest.approx(history.rows[-1]["fvu"], rel=0.3) and fvu < 0.5
    # scaling by a power of two by hand is the same run, to the bit
    by_hand = make_sae()
    config = TrainConfig(
        total_tokens=40 * BATCH, batch_size=BATCH, lr=1e-2, scale_activations=False
    )
    rows = Trainer(by_hand, TensorSource(x * history.scale, BATCH), config, quiet=True).run().rows
    assert [row["loss"] for row in rows] == history.column("loss")
    by_hand.rescale_(1 / history.scale)
    assert all(
        torch.equal(a, b)
        for a, b in zip(sae.state_dict().values(), by_hand.state_dict().values(), strict=True)
    )
    assert run(scale_activations=False)[1].scale == 1.0


@pytest.mark.parametrize("exponent", [-80, -64, -50, 50, 62, 80])
def test_activations_of_any_size_are_measured(exponent) -> None:
    """Their squares are beyond fp32, where norms would be 0 or inf and no scale found."""

    def trainer(x: torch.Tensor) -> Trainer:
        config = TrainConfig(8 * BATCH, BATCH, lr=1e-2, log_every=1)
        return Trainer(make_sae(), TensorSource(x, BATCH), config, quiet=True)

    usual, other = trainer(activations()).run(), trainer(activations() * 2.0**exponent)
    expected = round(math.log2(usual.scale)) - exponent
    if abs(expected) > 64:
        with pytest.raises(ValueError, match=rf"multiply them by 2\^{expected} in the source"):
            other.run()
        return
    assert other.run().scale == 2.0**expected
    assert other.history.column("loss") == usual.column("loss")


def test_float16_weights_are_trained_without_a_scale() -> None:
    """Biases of 1e5 would be inf, and those of 1e-6 lose their bits, once folded back."""
    with pytest.raises(ValueError, match="scale_activations must be False for float16"):
        train(make_sae(dtype=torch.float16), step="autograd")
    history = train(make_sae(dtype=torch.float16), step="autograd", scale_activations=False)
    assert history.column("fvu")[-1] < history.column("fvu")[0]


@pytest.mark.parametrize("step", ["fused", "autograd", "dense"])
def test_a_trained_b_dec_is_where_further_training_starts(step) -> None:
    sae = make_sae()
    train(sae, steps=60, lr=1e-2)
    with torch.no_grad():
        sae.b_dec += randn(D)
    before = sae.b_dec.clone()
    train(sae, steps=1, lr=1e-12, step=step)
    assert torch.allclose(sae.b_dec, before, atol=1e-6, rtol=0)


def test_rescale_scales_the_function() -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc.copy_(randn(F, seed=8))
        sae.b_dec.copy_(randn(D, seed=9))
    x = activations(50)
    before, codes = sae(x).reconstruction, sae.encode(x)
    sae.rescale_(0.25)
    assert torch.equal(sae(0.25 * x).reconstruction, 0.25 * before)
    assert torch.equal(sae.encode(0.25 * x).values, 0.25 * codes.values)
    assert torch.equal(sae.encode(0.25 * x).indices, codes.indices)


def test_dead_after_is_a_sixth_of_a_short_run() -> None:
    def after(total_tokens: int, **settings) -> int | None:
        sae = TopKSAE(D, F, K, **settings)
        Trainer(sae, TensorSource(activations(), BATCH), TrainConfig(total_tokens, BATCH))
        return sae.config.dead_after

    assert after(60 * BATCH) == 10 * BATCH
    assert after(10**9) == 10_000_000
    assert after(60 * BATCH, dead_after=77) == 77
    assert after(5) == 1


def test_bfloat16_weights_train_with_float32_state() -> None:
    for step in ("fused", "autograd"):
        sae = make_sae()
        config = TrainConfig(
            total_tokens=60 * BATCH, batch_size=BATCH, lr=1e-2, dtype="bfloat16", step=step
        )
        trainer = Trainer(sae, TensorSource(activations(), BATCH), config, quiet=True)
        fvu = trainer.run().column("fvu")
        assert fvu[-1] < 0.5 * fvu[0]
        assert sae.w_enc.dtype == torch.bfloat16
        assert isinstance(trainer.optimizer, RowAdam)
        state = trainer.optimizer.state[sae.w_enc]
        assert state["exp_avg_sq"].dtype == torch.float32 and state["exp_avg_sq"].max() > 0


def test_any_torch_optimizer_serves_the_autograd_step() -> None:
    sae = make_sae()
    optimizer = torch.optim.SGD(sae.parameters(), lr=1.0, momentum=0.9)
    history = train(sae, steps=60, step="autograd", optimizer=optimizer, lr=0.05)
    fvu = history.column("fvu")
    assert fvu[-1] < 0.7 * fvu[0]
    assert optimizer.param_groups[0]["lr"] == history.rows[-1]["lr"] > 0
    with pytest.raises(TypeError, match="needs a mikernels.optim.RowAdam, got SGD"):
        train(sae, step="fused", optimizer=optimizer)


def test_a_given_row_adam_equals_the_default() -> None:
    a, b = make_sae(), make_sae()
    constrained = {"params": [b.w_dec], "project": True, "unit_norm": True}
    rest = {"params": [b.w_enc, b.b_enc, b.b_dec]}
    train(a, steps=4)
    train(b, steps=4, optimizer=RowAdam([constrained, rest], clip_norm=1.0))
    assert all(identical(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def refused_optimizers(sae: TopKSAE) -> dict:
    """(settings, optimiser, error, message) of those that would do something else in silence."""
    adam, params = torch.optim.Adam, list(sae.parameters())
    dec = {"params": [sae.w_dec], "project": True, "unit_norm": True}
    rest = [p for p in params if p is not sae.w_dec]
    return {
        "missing": ("autograd", adam(rest), "0 others and without \\['w_dec'\\]"),
        "missing, fused": ("fused", RowAdam([dec, {"params": rest[1:]}]), "without \\['w_enc'\\]"),
        "of another SAE": ("autograd", adam(make_sae().parameters()), "4 others and without"),
        "more": ("dense", adam([*params, nn.Parameter(torch.ones(1))]), "1 others and without"),
        "rates": (
            "autograd",
            adam([{"params": params[:1], "lr": 1.0}, {"params": params[1:]}]),
            "one lr for all its groups, .*got \\[1.0, 0.001\\]",
        ),
        "unconstrained": ("fused", RowAdam(params), "constrain w_dec .*'unit_norm': False"),
        "closure": ("autograd", torch.optim.LBFGS(params), "got LBFGS, which needs a closure"),
    }


@pytest.mark.parametrize("what", refused_optimizers(make_sae()))
def test_an_optimizer_that_the_step_would_not_follow_is_refused(what) -> None:
    sae = make_sae()
    step, optimizer, message = refused_optimizers(sae)[what]
    with pytest.raises((TypeError, ValueError), match=f"^Trainer: optimizer must .*{message}"):
        train(sae, steps=2, step=step, optimizer=optimizer)


def test_an_optimizer_may_leave_out_what_is_frozen() -> None:
    sae = make_sae()
    sae.w_dec.requires_grad_(False)
    before, rest = sae.w_enc.clone(), [sae.w_enc, sae.b_enc, sae.b_dec]
    train(sae, steps=2, step="autograd", optimizer=torch.optim.Adam(rest))
    assert not torch.equal(sae.w_enc, before)
    train(make_sae(normalize_decoder=False), steps=2)


@pytest.mark.parametrize(
    "settings, optimizer",
    [
        ({"step": "dense", "dtype": "bfloat16"}, None),
        ({"step": "fused", "dtype": "bfloat16"}, lambda sae: torch.optim.Adam(sae.parameters())),
        ({"step": "autograd", "dtype": "bfloat16"}, lambda sae: torch.optim.Adam([sae.w_enc])),
        ({"cuda_graph": True, "dtype": "bfloat16"}, None),
    ],
)
def test_a_refused_run_leaves_the_sae_as_it_was(settings, optimizer) -> None:
    sae = make_sae(dead_after=None)
    before = copy.deepcopy(sae)
    with pytest.raises((TypeError, ValueError), match="^Trainer: "):
        train(sae, optimizer=None if optimizer is None else optimizer(sae), **settings)
    assert sae.config == before.config
    assert all(identical(p, q) for p, q in zip(sae.parameters(), before.parameters(), strict=True))


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast in inference_mode": lambda: Nested(),
}


class Nested(ExitStack):
    def __enter__(self):
        self.enter_context(torch.inference_mode())
        self.enter_context(torch.autocast("cpu", torch.float16))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", ["fused", "autograd", "dense"])
def test_the_mode_of_the_caller_changes_nothing(step, mode) -> None:
    config = TrainConfig(8 * BATCH, BATCH, step=step, log_every=1)
    usual, trainer = (
        Trainer(make_sae(), TensorSource(activations(), BATCH), config, quiet=True) for _ in "ab"
    )
    expected = usual.run()
    with MODES[mode]():
        got = trainer.run()
    assert got.column("loss") == expected.column("loss")
    # what the run made is no inference tensor: it goes on outside
    a, b = usual.sae, trainer.sae
    assert all(identical(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    again = [
        train(t.sae, steps=2, step=step, optimizer=t.optimizer).column("loss")
        for t in (usual, trainer)
    ]
    assert again[0] == again[1]


@pytest.mark.parametrize("scale_activations", [False, True])
@pytest.mark.parametrize("step", ["fused", "autograd", "dense"])
def test_batches_made_in_inference_mode_are_trained_on(step, scale_activations) -> None:
    def losses(batches: list[torch.Tensor]) -> list[float]:
        config = TrainConfig(
            8 * BATCH, BATCH, step=step, scale_activations=scale_activations, log_every=1
        )
        return Trainer(make_sae(), Batches(batches), config, quiet=True).run().column("loss")

    with torch.inference_mode():
        inferred = [x.clone() for x in activations(8 * BATCH).split(BATCH)]
    assert losses(inferred) == losses([x.clone() for x in inferred])
    with torch.inference_mode():
        sae = make_sae()
    with pytest.raises(ValueError, match="sae must be made outside of torch.inference_mode"):
        train(sae)
    train(copy.deepcopy(sae), steps=2)


def test_schedules() -> None:
    config = TrainConfig(
        total_tokens=1000, batch_size=10, warmup_steps=10, decay="linear", decay_steps=20, lr=1.0
    )
    lrs = [config.lr_at(step) for step in range(config.total_steps)]
    assert lrs[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(lrs[9:81]) == {1.0}
    assert lrs[80:] == pytest.approx([1 - i / 20 for i in range(20)])
    cosine = replace(config, decay="cosine", decay_steps=100, warmup_steps=0, lr=2.0)
    assert cosine.lr_at(0) == 2.0 and cosine.lr_at(50) == pytest.approx(1.0)
    assert 0 < cosine.lr_at(99) < 1e-3
    constant = replace(config, decay="constant", decay_steps=None, warmup_steps=0)
    assert {constant.lr_at(step) for step in range(100)} == {1.0}
    annealed = TrainConfig(total_tokens=1000, batch_size=10, k_start=96, k_anneal_steps=10)
    ks = [annealed.k_at(step, K) for step in range(12)]
    assert ks[0] == 96 and ks[5] == 50 and ks[10:] == [K, K]
    assert TrainConfig.from_dict(json.loads(json.dumps(annealed.to_dict()))) == annealed


def test_a_run_of_any_length_warms_up_for_5_percent_and_decays_over_the_last_20() -> None:
    config = TrainConfig(total_tokens=1000, batch_size=10, lr=1.0)
    assert (config.warmup, config.decay_length) == (5, 20)
    lrs = [config.lr_at(step) for step in range(100)]
    assert lrs[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(lrs[5:81]) == {1.0}
    assert lrs[80:] == pytest.approx([1 - i / 20 for i in range(20)])
    for steps in range(1, 12):
        short = replace(config, total_tokens=10 * steps)
        assert short.warmup + short.decay_length <= steps
        assert all(0 < short.lr_at(step) <= 1 for step in range(steps))
    # what is given is kept, and the rest makes room for it
    assert replace(config, warmup_steps=90).decay_length == 10
    assert replace(config, decay_steps=98).warmup == 2


def test_rows_are_means_of_their_interval_and_parts_add_up() -> None:
    each, tens = train(), train(log_every=10)
    assert [row["step"] for row in tens.rows] == [10, 20]
    assert tens.column("tokens") == [10 * BATCH, 20 * BATCH]
    losses = each.column("loss")
    assert tens.column("loss") == pytest.approx([sum(losses[:10]) / 10, sum(losses[10:]) / 10])
    assert set(tens.parts) == set(PARTS) and all(tens.parts[name] > 0 for name in PARTS)
    total = sum(row["step_ms"] for row in tens.rows) * 10
    assert 1e3 * sum(tens.parts.values()) == pytest.approx(total)
    # everything counts for tokens/s but the source
    busy = sum(BATCH * 10 / row["tokens_per_second"] for row in tens.rows)
    assert busy > sum(tens.parts.values())
    assert each.rows[0]["dead_fraction"] == 0


def test_the_end_of_a_source_ends_the_run(capfd) -> None:
    batches = list(activations(5 * BATCH + 10).split(BATCH))
    sae = make_sae()
    config = TrainConfig(total_tokens=10**6, batch_size=BATCH, log_every=4)
    history = Trainer(sae, Batches(batches), config, quiet=True).run()
    assert history.column("step") == [4, 6] and history.column("tokens")[-1] == 5 * BATCH + 10
    assert "the source ended after 330 of 1,000,000 tokens" in capfd.readouterr().err
    # a step without all of its micro-batches is not taken
    config = TrainConfig(total_tokens=10**6, batch_size=BATCH, accumulation=4)
    assert Trainer(sae, Batches(batches), config, quiet=True).run().column("step") == [1]
    with pytest.raises(ValueError, match="must give at least the 4 batches of one step, got 2"):
        Trainer(sae, Batches(batches[:2]), config, quiet=True).run()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((4, D), torch.nan), r"batch 3 must be finite, got NaN or inf in 4 of 4 rows"),
        (torch.eye(D).mul(torch.inf).nan_to_num(0, torch.inf), "batch 3 must be finite"),
        (torch.zeros(4, D + 1), rf"batch 3 must be \[batch, {D}\]"),
        (torch.zeros(0, D), "with at least one row"),
        (torch.zeros(4, D, dtype=torch.int64), "batch 3 must be a floating tensor"),
    ],
)
def test_a_bad_batch_is_named_and_touches_no_weight(bad, message) -> None:
    good = list(activations(2 * BATCH).split(BATCH))
    reference, sae = make_sae(), make_sae()
    config = TrainConfig(total_tokens=2 * BATCH, batch_size=BATCH)
    Trainer(reference, Batches(good), config, quiet=True).run()
    config = TrainConfig(total_tokens=10 * BATCH, batch_size=BATCH)
    with pytest.raises((TypeError, ValueError), match=message):
        Trainer(sae, Batches([*good, bad]), config, quiet=True).run()
    assert all(
        identical(p, q) for p, q in zip(reference.parameters(), sae.parameters(), strict=True)
    )


def test_a_large_finite_batch_is_not_refused() -> None:
    # its sum overflows, it does not
    huge = torch.full((4, D), 3e38)
    source = Batches([activations(BATCH), huge])
    config = TrainConfig(total_tokens=10**6, batch_size=BATCH, log_every=1)
    with pytest.raises(FloatingPointError, match="loss must be finite"):
        Trainer(make_sae(), source, config, quiet=True).run()


@pytest.mark.parametrize("step", ["fused", "autograd"])
def test_a_diverged_run_stops_and_says_so(step, tmp_path) -> None:
    config = TrainConfig(
        total_tokens=50 * BATCH,
        batch_size=BATCH,
        lr=1e30,
        clip_norm=None,
        warmup_steps=0,
        log_every=5,
        checkpoint_every=1,
        step=step,
    )
    sae = make_sae(normalize_decoder=False)
    trainer = Trainer(sae, TensorSource(activations(), BATCH), config, out_dir=tmp_path, quiet=True)
    with pytest.raises(
        FloatingPointError, match=r"must be finite, got .* in steps \d+ to \d+; low"
    ):
        trainer.run()
    for path in tmp_path.glob("checkpoint-*/sae.safetensors"):
        from safetensors.torch import load_file

        assert all(t.isfinite().all() for t in load_file(path).values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_tokens": 0}, "total_tokens must be at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be an int, got 1.5"),
        ({"step": "jit"}, r"step must be one of \['fused', 'autograd', 'dense'\], got 'jit'"),
        ({"lr": 0.0}, "lr must be finite and above 0"),
        ({"lr": math.nan}, "lr must be finite"),
        ({"lr": "1e-3"}, "lr must be a number, got '1e-3'"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"clip_norm": -1.0}, "clip_norm must be finite and above 0"),
        ({"warmup_steps": 99}, r"warmup_steps \+ decay_steps must be at most 10"),
        ({"decay": "step"}, "decay must be one of"),
        (
            {"decay": "constant", "decay_steps": 5},
            "decay_steps must be None with decay='constant'",
        ),
        ({"scale_activations": 0.5}, r"scale_activations must be one of \[False, True\], got 0.5"),
        ({"k_start": 8}, "k_start and k_anneal_steps must be given together, got 8 and 0"),
        ({"k_start": 8, "k_anneal_steps": 99}, "k_anneal_steps must be at most 10"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, message) -> None:
    with pytest.raises((TypeError, ValueError), match=f"TrainConfig: {message}"):
        TrainConfig(**{"total_tokens": 10 * BATCH, "batch_size": BATCH, **settings})
    with pytest.raises(ValueError, match=r"got \['momentum'\]"):
        TrainConfig.from_dict({"total_tokens": 1, "momentum": 0.9})


def test_parts_that_do_not_fit_are_refused_before_any_work() -> None:
    source = TensorSource(activations(), BATCH)
    config = TrainConfig(total_tokens=640, batch_size=BATCH)
    with pytest.raises(ValueError, match="source.d must be the SAE's d = 8, got 16"):
        Trainer(TopKSAE(8, 32, 2), source, config)
    with pytest.raises(
        ValueError, match="source.batch_size must be config.batch_size = 32, got 64"
    ):
        Trainer(make_sae(), source, TrainConfig(total_tokens=640, batch_size=32))
    with pytest.raises(ValueError, match="k_start must be in 1..96"):
        annealed = TrainConfig(total_tokens=640, batch_size=64, k_start=97, k_anneal_steps=2)
        Trainer(make_sae(), source, annealed)
    with pytest.raises(TypeError, match="trains float32 or bfloat16 weights, got torch.float64"):
        Trainer(make_sae(dtype=torch.float64), source, config)
    with pytest.raises(TypeError, match="float32 baseline, got torch.bfloat16"):
        Trainer(make_sae(dtype=torch.bfloat16), source, config, step="dense")


def test_float64_trains_under_autograd() -> None:
    fvu = train(make_sae(dtype=torch.float64), steps=30, step="autograd").column("fvu")
    assert fvu[-1] < fvu[0]


def test_the_console_shows_a_bar_or_lines_or_nothing() -> None:
    row = train(steps=1).rows[0]
    for terminal, quiet, expected in (
        (True, False, "fused"),
        (False, False, "step 1/5  FVU"),
        (False, True, ""),
        (True, True, ""),
    ):
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=120)
        with Board(console) as board:
            report = board.reporter(5, 0, "fused", quiet=quiet)
            report.step(1)
            report.log(row)
        shown = text.getvalue()
        assert expected in shown and bool(expected) == bool(shown)
        if expected:
            assert all(word in shown for word in ("FVU", "L0", "dead", "tokens/s"))
    report.note("where the work is")
    assert "where the work is" in text.getvalue()


def test_autograd_step_leaves_no_gradients_behind() -> None:
    sae = make_sae()
    step = AutogradStep(sae, TrainConfig(total_tokens=10))
    no_dead = torch.empty(0, dtype=torch.int64)
    step([Batch(activations(BATCH))], K, no_dead, Means(), Clock(History().parts))
    assert all(p.grad is None for p in sae.parameters())
