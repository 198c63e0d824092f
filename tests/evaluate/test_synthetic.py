# SPDX-License-Identifier: Apache-2.0
"""SAEs judged by SAELens' synthetic data: against the truth itself, and apart from its seeds."""

import pytest
import torch

from mikernels.evaluate import synthetic
from mikernels.nn import BatchTopKSAE, TopKSAE

F, D = synthetic.SIZES["small"].features, synthetic.SIZES["small"].d


def new(seed: int, k: int = 8) -> TopKSAE:
    return TopKSAE(D, F, k, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def small():
    pytest.importorskip("sae_lens.synthetic")
    return synthetic.world("small")


def test_settings_are_refused_before_anything_is_imported() -> None:
    with pytest.raises(ValueError, match=r"world: size must be one of .*, got 'huge'"):
        synthetic.world("huge")
    with pytest.raises(ValueError, match="judge: samples must be at least 1, got 0"):
        synthetic.judge(new(0), None, samples=0)


def test_a_view_is_the_sae() -> None:
    x = torch.randn(50, D)
    batch = BatchTopKSAE(D, F, 8, generator=torch.Generator().manual_seed(5))
    batch.threshold.fill_(1.0)
    for sae in (new(5), batch):
        view, codes = synthetic.DenseView(sae), sae.encode(x)
        assert torch.equal(view.encode(x), codes.to_dense())
        torch.testing.assert_close(view.decode(view.encode(x)), sae.decode(codes))
        assert torch.equal(view.W_dec, sae.w_dec)


@pytest.mark.peers
def test_the_truth_is_found_and_noise_is_not(small) -> None:
    truth = new(1)
    with torch.no_grad():
        truth.w_dec.copy_(small.feature_dict.feature_vectors)
        truth.w_enc.copy_(truth.w_dec)
        truth.b_dec.copy_(small.feature_dict.bias)
    found, noise = (synthetic.judge(sae, small, 4096) for sae in (truth, new(1)))
    assert found["mcc"] > 0.999 and found["uniqueness"] == 1.0
    assert found["f1"] > 5 * noise["f1"] and noise["mcc"] < 0.5
    assert 8 < found["true_l0"] < 10 and found["l0"] <= 8
    assert found["fvu"] < noise["fvu"]


@pytest.mark.peers
def test_a_decoder_of_the_worlds_own_seed_knows_the_features(small) -> None:
    # why the benchmark draws initial weights from other seeds
    from mikernels.bench.quality.contenders import INITIAL

    assert synthetic.judge(new(0), small, 512)["mcc"] > 0.999
    seeds = {size.seed for size in synthetic.SIZES.values()}
    for seed in range(5):
        assert INITIAL + seed not in seeds
        assert synthetic.judge(new(INITIAL + seed), small, 512)["mcc"] < 0.5


@pytest.mark.peers
def test_the_figures_are_those_of_the_reconstruction(small) -> None:
    sae = new(1000)
    before = torch.random.get_rng_state()
    found = synthetic.judge(sae, small, 3000, seed=7, batch_size=1024)
    assert torch.equal(before, torch.random.get_rng_state())
    assert found == synthetic.judge(sae, small, 3000, seed=7, batch_size=1024)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        x = torch.cat([small.sample(n) for n in (1024, 1024, 952)])
    y = sae.decode(sae.encode(x)).detach().double()
    fvu = (y - x).square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(float(fvu), rel=1e-4)
    fired = sae.encode(x).to_dense() != 0
    assert found["dead"] == pytest.approx(float((~fired.any(0)).double().mean()))
    assert found["l0"] == pytest.approx(float(fired.sum(-1).double().mean()))
