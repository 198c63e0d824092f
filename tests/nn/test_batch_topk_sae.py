# SPDX-License-Identifier: Apache-2.0
"""BatchTopKSAE: equal in all three steps, by its threshold in use, saved and exported whole."""

import math

import pytest
import torch
from oracle import num_threads, randn

from mikernels.activations import TensorSource
from mikernels.integrations.saelens import export_sae
from mikernels.integrations.saelens import load_sae as load_saelens
from mikernels.nn import BatchTopKSAE
from mikernels.training import TrainConfig, Trainer, load_sae
from mikernels.training.steps.fused import Scratch
from mikernels.values.batch import Batch

D, F, K, BATCH = 16, 96, 4.5, 64


@pytest.fixture(autouse=True)
def one_thread():
    with num_threads(1):
        yield


def activations(n: int = 1024) -> torch.Tensor:
    directions = randn(2 * D, D, seed=1)
    amounts = randn(n, 2 * D, seed=2).relu() * (randn(n, 2 * D, seed=4) > 1.3)
    return amounts @ directions + 0.01 * randn(n, D, seed=3) + 2


def make_sae(**settings) -> BatchTopKSAE:
    settings = {"dead_after": 300, "k_aux": 5, **settings}
    return BatchTopKSAE(D, F, K, generator=torch.Generator().manual_seed(0), **settings)


def train(sae: BatchTopKSAE, steps: int = 20, out_dir=None, **settings):
    config = TrainConfig(
        **{"total_tokens": steps * BATCH, "batch_size": BATCH, "lr": 3e-3, "log_every": 1}
        | settings
    )
    trainer = Trainer(sae, TensorSource(activations(), BATCH), config, quiet=True, out_dir=out_dir)
    return trainer, trainer.run()


def test_a_batch_keeps_its_strongest_activations() -> None:
    sae, x = make_sae(), activations(50)
    codes = sae.select(x)
    h = (x - sae.b_dec) @ sae.w_enc.T + sae.b_enc
    best = h.flatten().topk(int(K * 50))
    expected = torch.zeros(50 * F).scatter(0, best.indices, best.values.relu()).view(50, F)
    torch.testing.assert_close(codes.to_dense(), expected)
    acts, dense_codes = sae.dense_acts(h, K)
    torch.testing.assert_close(acts, expected)
    torch.testing.assert_close(dense_codes.to_dense(), expected)
    assert codes.l0().min() < K < codes.l0().max()
    assert sae.select(x.view(5, 10, D), k=2).l0().sum() == 100


@pytest.mark.parametrize("loss", ["mse", "fvu"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_three_steps_agree(loss, accumulation) -> None:
    runs = {}
    for step in ("fused", "autograd", "dense"):
        sae = make_sae(loss=loss)
        _, history = train(
            sae, step=step, accumulation=accumulation, total_tokens=20 * BATCH * accumulation,
            k_start=8, k_anneal_steps=6,
        )  # fmt: skip
        runs[step] = sae, history
    sae, fused = runs["fused"]
    assert max(fused.column("aux_loss")) > 0
    assert fused.rows[-1]["l0"] <= K and fused.column("fvu")[-1] < fused.column("fvu")[0]
    for other, history in (runs["autograd"], runs["dense"]):
        for name in ("loss", "mse", "fvu", "aux_loss", "l0", "dead_fraction"):
            for steps, rel in ((1, 5e-7), (5, 5e-6), (20, 1e-2)):
                expected = pytest.approx(history.column(name)[:steps], rel=rel, abs=1e-7)
                assert fused.column(name)[:steps] == expected, (name, steps)
        torch.testing.assert_close(other.threshold, sae.threshold, rtol=1e-2, atol=0)


def test_the_threshold_is_the_running_mean_of_the_smallest_activation() -> None:
    sae = make_sae(threshold_rate=0.25)
    assert sae.threshold == 0
    expected = 0.0
    for number in range(3):
        codes = sae.select(activations(200)[50 * number : 50 * number + 50])
        sae.track_(codes)
        smallest = float(codes.values[codes.values > 0].min())
        expected = smallest if number == 0 else 0.75 * expected + 0.25 * smallest
        assert float(sae.threshold) == pytest.approx(expected, rel=1e-6)
    sae.track_(codes.detach()[:0])
    assert float(sae.threshold) == pytest.approx(expected, rel=1e-6)
    assert sae.to(torch.bfloat16).threshold.dtype == torch.float32
    assert float(sae.threshold) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (40,), (5, 8)])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1e9])
def test_in_use_a_token_does_not_depend_on_its_batch(shape, threshold) -> None:
    sae, x = make_sae().eval(), activations(40)[: math.prod(shape)].reshape(*shape, D)
    sae.threshold.fill_(threshold)
    codes = sae.encode(x)
    h = (x - sae.b_dec) @ sae.w_enc.T + sae.b_enc
    torch.testing.assert_close(codes.to_dense(), h.where(h > threshold, 0).relu())
    out = sae(x)
    assert out.reconstruction.shape == x.shape
    out.loss.backward()
    assert sae.w_enc.grad is not None and sae.w_enc.grad.isfinite().all()


def test_no_tokens_by_features_matrix_is_made_in_training() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sae = BatchTopKSAE(8, 4096, 4)
    x, sizes = randn(512, 8), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        sae.terms(Batch(x), 4.0, None, 1.0, Scratch())
    assert max(sizes) < 512 * 4096 / 8, max(sizes)


def test_checkpoints_hold_it_whole(tmp_path) -> None:
    trainer, history = train(make_sae(), out_dir=tmp_path / "whole")
    loaded = load_sae(tmp_path / "whole" / "checkpoint-20")
    assert isinstance(loaded, BatchTopKSAE) and loaded.config == trainer.sae.config
    for name, t in trainer.sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], t), name
    half, _ = train(make_sae(), steps=20, out_dir=tmp_path / "half", checkpoint_every=8)
    import shutil

    shutil.rmtree(tmp_path / "half" / "checkpoint-20")
    config = half.config
    again = Trainer(
        make_sae(), TensorSource(activations(), BATCH), config, quiet=True,
        out_dir=tmp_path / "half",
    )  # fmt: skip
    assert again.resume() == 16
    again.run()
    for name, t in trainer.sae.state_dict().items():
        assert torch.equal(again.sae.state_dict()[name], t), name


def test_saelens_format(tmp_path) -> None:
    sae = make_sae()
    with pytest.raises(ValueError, match="threshold must be above 0, got 0.0; train the SAE"):
        export_sae(sae, tmp_path / "never")
    train(sae)
    export_sae(sae.eval(), tmp_path / "sae")
    loaded = load_saelens(tmp_path / "sae")
    x = activations(50)
    assert isinstance(loaded, BatchTopKSAE) and loaded.config.k == K
    assert torch.equal(loaded.encode(x).to_dense(), sae.encode(x).to_dense())
    with pytest.raises(ValueError, match="k must be above 0 and at most 96"):
        load_saelens(tmp_path / "sae", k=97)


def test_the_real_saelens_reads_it(tmp_path) -> None:
    sae_lens = pytest.importorskip("sae_lens", exc_type=ImportError)
    sae = make_sae()
    train(sae)
    export_sae(sae.eval(), tmp_path / "sae", model_name="m", hook_name="h")
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "sae"))
    x = activations(50)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode(x).to_dense(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs(x), sae(x).reconstruction, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0.0}, "k must be above 0, at most 96, got 0.0"),
        ({"k": 97}, "k must be above 0, at most 96, got 97"),
        ({"k": True}, "k must be a number, got True"),
        ({"k": 4, "threshold_rate": 0}, "threshold_rate must be above 0, at most 1, got 0"),
        ({"k": 4, "colour": 1}, r"settings must be among .*, got \['colour'\]"),
        ({"k": 4, "d": 0}, "d must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message) -> None:
    with pytest.raises((TypeError, ValueError), match=f"BatchTopKSAE: {message}"):
        BatchTopKSAE(**{"d": D, "n_features": F, **settings})


def test_a_short_run_forgets_the_threshold_of_its_beginning() -> None:
    trainer, _ = train(make_sae(), steps=60)
    assert trainer.sae.config.threshold_rate == 20 / 60
    assert trainer.open["threshold_rate"]
    trainer, _ = train(make_sae(threshold_rate=0.5), steps=3)
    assert trainer.sae.config.threshold_rate == 0.5
    assert make_sae().rate == 0.01
    sae = make_sae().eval()
    _, history = train(sae, steps=100)
    l0 = float(sae.encode(activations(500)).l0().double().mean())
    assert l0 == pytest.approx(K, rel=0.3)
