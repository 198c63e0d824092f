# SPDX-License-Identifier: Apache-2.0
"""Libraries' methods that rewrite an SAE, or encode twice, between an encode and a look at it."""

import copy
import warnings
from collections.abc import Iterator

import accelerate_dictionary_learning as dictionaries
import pytest
import torch
from accelerate_saelens import INFERENCE, batches, library, make

from mikernels import accelerate
from mikernels.integrations.lazy import Lazy

pytestmark = pytest.mark.peers
pytest.importorskip("sae_lens", reason="sae-lens is not installed")

X = batches(1)[0]


@pytest.fixture(autouse=True)
def looks_are_wanted() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* needs the dense", RuntimeWarning)
        # of error terms that are set on an SAE itself
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


FOLDS = {
    "fold_W_dec_norm": (),
    "fold_activation_norm_scaling_factor": (2.0,),
}


def _folded(name, inference, fold):
    """What an SAE encodes before and after it is folded, first looked at after that."""
    plain = make(name, inference=inference)
    faster = copy.deepcopy(plain)
    with accelerate(faster) as report:
        results = []
        for sae in (plain, faster):
            first, firing = sae.encode(X), sae.encode(X) > 0
            try:
                getattr(sae, fold)(*FOLDS[fold])
            except NotImplementedError:
                pytest.skip(f"{name} cannot be folded")
            second = sae.encode(X)
            results.append((first.to_dense() + 0, firing.to_dense(), second.to_dense() + 0))
    # a gated one has two a pass
    assert report.calls in (3, 6)
    return results


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("name", INFERENCE)
def test_folded_saes_gave_what_they_were(name, fold):
    for wanted, found in zip(*_folded(name, True, fold), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("name", ["topk, norms kept", "batchtopk", "jumprelu", "gated", "standard"])
def test_folded_training_saes_gave_what_they_were(name, fold):
    for wanted, found in zip(*_folded(name, False, fold), strict=True):
        torch.testing.assert_close(found, wanted)


def test_folding_makes_nothing_dense():
    sae = make("standard", inference=True)
    with accelerate(sae) as report:
        acts = sae.encode(X)
        sae.fold_activation_norm_scaling_factor(2.0)
        assert isinstance(acts, Lazy) and not report.dense
        # one that is gone is not kept in memory
        assert len(report.unread) > 0
        del acts
        assert not report.unread


@pytest.mark.parametrize("name", ["AutoEncoder", "GatedAutoEncoder", "JumpReluAutoEncoder"])
@pytest.mark.parametrize("method", ["scale_biases", "normalize_decoder"])
def test_scaled_dictionaries_gave_what_they_were(name, method):
    kind = getattr(dictionaries.library("dictionary_learning.dictionary"), name)
    torch.manual_seed(0)
    plain = kind(16, 64)
    if not hasattr(plain, method):
        pytest.skip(f"{name} has no {method}")
    dictionaries.sparse(plain)
    faster = copy.deepcopy(plain)
    with accelerate(faster) as report, torch.no_grad():
        results = []
        for ae in (plain, faster):
            first = ae.encode(X)
            getattr(ae, method)(*[2.0] if method == "scale_biases" else [])
            results.append((first + 0, ae.encode(X) + 0))
    assert report.calls >= 2
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def _looks(acts, hook):
    assert acts.sin().isfinite().all()


# name -> at which point, which way, what, and how many tensors are made dense
HOOKS = {
    "none": None,
    "looks": ("hook_sae_acts_post", "fwd", _looks, 1),
    "replaces": ("hook_sae_acts_post", "fwd", lambda acts, hook: acts.flip(0).flip(0), 2),
    "gradients": ("hook_sae_acts_post", "bwd", lambda grad, hook: None, 2),
    "gradients before": ("hook_sae_acts_pre", "bwd", lambda grad, hook: None, 2),
}


def _of_itself(sae):
    sae.use_error_term = True
    return sae(X)


def _of_what_holds_it(sae):
    out = sae.decode(sae.encode(X))
    with torch.no_grad(), library("sae_lens.saes.sae")._disable_hooks(sae):
        return out + (X - sae.decode(sae.encode(X)))


@pytest.mark.parametrize("way", [_of_itself, _of_what_holds_it])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["topk", "jumprelu", "standard"])
def test_error_terms_cancel_to_two_roundings(name, hook, way):
    # with sums of many numbers
    sae = make(name, inference=True, crowded=True)
    rest = (X - sae(X)).abs()
    dense = 0
    if HOOKS[hook] is not None:
        point, direction, function, dense = HOOKS[hook]
        sae.add_hook(point, function, direction)
    with accelerate(sae) as report:
        report.crowded_from = 1.0
        found = way(sae)
        # of the encoder with hooks and of the one without
        assert sum(report.dense.values()) == dense
    bound = torch.finfo(X.dtype).eps / 2 * (rest + X.abs())
    assert ((found - X).abs() <= 1.01 * bound).all()
