# SPDX-License-Identifier: Apache-2.0
"""Each library's auxiliary loss against its formula, written out with dense tensors in fp64."""

import pytest
import torch
from oracle import randn

from mikernels import SparseCodes, sparse_decode
from mikernels.nn import losses
from mikernels.nn.auxk import (
    BIASES,
    FORMS,
    NORMALISERS,
    AuxKForm,
    auxk_gradient,
    auxk_loss,
    auxk_per_square,
)

N, D, F, K, K_AUX = 17, 12, 50, 4, 6
DEAD = {"fewer than k_aux": range(0, 50, 13), "more than k_aux": range(0, 50, 3)}


def model():
    """x, w_enc, b_enc, w_dec, b_dec in fp64, as leaves; many pre-activations are negative."""
    shapes = (N, D), (F, D), (F,), (F, D), (D,)
    return [randn(*s, seed=i).double().requires_grad_() for i, s in enumerate(shapes)]


def reconstruct(x, w_enc, b_enc, w_dec, b_dec):
    """Pre-activations `[N, F]` and the reconstruction, of a top-k SAE."""
    h = (x - b_dec) @ w_enc.T + b_enc
    kept = torch.zeros_like(h).scatter(1, h.topk(K).indices, 1)
    return h, (h * kept).relu() @ w_dec + b_dec


def best_dead(acts, dead, k):
    """`[N, F]` with the k best of the dead, zeros elsewhere."""
    masked = torch.full_like(acts, -torch.inf)
    masked[:, dead] = acts[:, dead]
    values, indices = masked.topk(k)
    return torch.zeros_like(acts).scatter(1, indices, values)


def openai(x, h, y, dead, w_dec, b_dec):
    only = torch.zeros_like(h)
    only[:, dead] = h[:, dead]
    acts = best_dead(only, dead, min(K_AUX, len(dead))).relu()
    target = x - y.detach() + b_dec.detach()
    error = (acts @ w_dec + b_dec - target).square().mean()
    return error / (target - target.mean(0)).square().mean()


def sparsify(x, h, y, dead, w_dec, b_dec):
    acts = best_dead(h.detach().relu(), dead, min(K_AUX, len(dead)))
    left = (acts @ w_dec - (x - y).detach()).square().sum()
    return min(len(dead) / K_AUX, 1) * left / (x - x.mean(0)).square().sum()


def saelens(x, h, y, dead, w_dec, b_dec):
    acts = best_dead(h, dead, min(K_AUX, len(dead)))
    left = (acts @ w_dec - (x - y).detach()).square().sum(-1).mean()
    return min(len(dead) / K_AUX, 1) * left


def dictionary_learning(x, h, y, dead, w_dec, b_dec):
    acts = best_dead(h.relu(), dead, min(K_AUX, len(dead)))
    e = (x - y).detach()
    left = (e - acts @ w_dec).square().sum(-1).mean()
    return left / (e - e.mean(0)).square().sum(-1).mean()


def bussmann(x, h, y, dead, w_dec, b_dec):
    values, places = h.relu()[:, dead].topk(min(K_AUX, len(dead)))
    acts = torch.zeros(N, len(dead), dtype=h.dtype).scatter(1, places, values)
    return (acts @ w_dec[dead] - (x - y)).square().mean()


def goreg(x, h, y, dead, w_dec, b_dec):
    acts = best_dead(h, dead, min(K_AUX, len(dead)))
    return (acts @ w_dec + b_dec - (x - y)).square().mean()


def mikernels(x, h, y, dead, w_dec, b_dec):
    unexplained = dictionary_learning(x, h, y, dead, w_dec, b_dec)
    return unexplained * (x - x.mean(0)).square().sum(-1).mean()


FORMULAS = {
    "mikernels": mikernels,
    "openai": openai,
    "sparsify": sparsify,
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "bussmann": bussmann,
    "goreg": goreg,
}


def codes_of(form, h, dead):
    """The codes that go into a form's loss."""
    values, places = h[:, dead].topk(min(K_AUX, len(dead)))
    values = values.relu() if form.acts == "relu" else values
    return SparseCodes(
        values if form.encoder_gradient else values.detach(), torch.tensor([*dead])[places], F
    )


def test_every_form_has_its_formula():
    assert FORMS.keys() == FORMULAS.keys()
    assert len({*FORMS.values()}) == len(FORMS)


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_its_librarys_formula(name, dead):
    form, dead = FORMS[name], [*DEAD[dead]]
    leaves = model()
    x, w_dec, b_dec = leaves[0].detach(), *leaves[3:]

    def found():
        h, y = reconstruct(x, *leaves[1:])
        made = sparse_decode(codes_of(form, h, dead), w_dec)
        return auxk_loss(form, made, x - y, x, b_dec, len(dead), K_AUX)

    def expected():
        h, y = reconstruct(x, *leaves[1:])
        return FORMULAS[name](x, h, y, dead, w_dec, b_dec)

    torch.testing.assert_close(found(), expected())
    for a, b in zip(
        *(torch.autograd.grad(f(), leaves[1:], allow_unused=True) for f in (found, expected)),
        strict=True,
    ):
        assert (a is None or not a.any()) == (b is None or not b.any())
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


def parts(weighted=False):
    made, residual, target = (randn(N, D, seed=i).double() for i in range(3))
    weights = randn(N, seed=4).double().abs() if weighted else None
    return made, residual, target, randn(D, seed=3).double(), weights


COMBINATIONS = [
    AuxKForm(bias=bias, residual_gradient=through, normaliser=normaliser, scale_by_dead=scaled)
    for bias in BIASES
    for normaliser in NORMALISERS
    for through in (False, True)
    for scaled in (False, True)
    if not (through and normaliser in ("residual", "unexplained"))
]


@pytest.mark.parametrize("loss", ["mse", "fvu"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", COMBINATIONS, ids=str)
def test_the_closed_form_is_autograds(form, weighted, loss):
    *tensors, weights = parts(weighted)
    made, residual, target, b_dec = (t.requires_grad_() for t in tensors)
    arguments = made, residual, target, b_dec, 3, K_AUX, weights
    value = auxk_loss(form, *arguments, loss=loss)
    expected = torch.autograd.grad(value, (made, b_dec, residual, target), allow_unused=True)
    gradient = auxk_gradient(form, *arguments, loss=loss)
    torch.testing.assert_close(gradient.loss, value.detach())
    assert expected[3] is None
    for a, b in zip(gradient[1:], expected[:3], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    assert (gradient.d_b_dec is None) == (form.bias == "none")
    assert (gradient.d_residual is None) == (not form.residual_gradient)


@pytest.mark.parametrize("name", FORMS)
def test_a_token_of_weight_2_is_two_tokens(name):
    made, residual, target, b_dec, _ = parts()
    twice = torch.arange(N) % 3 + 1
    repeated = [t.repeat_interleave(twice, 0) for t in (made, residual, target)]
    found = auxk_loss(FORMS[name], made, residual, target, b_dec, 9, K_AUX, twice.double())
    torch.testing.assert_close(found, auxk_loss(FORMS[name], *repeated, b_dec, 9, K_AUX))


@pytest.mark.parametrize("name", FORMS)
def test_counts_may_stay_on_the_device_and_the_measure_may_be_known(name):
    made, residual, target, b_dec, _ = parts()
    measure = losses.Measure(float(N), losses.spread(target))
    for n_dead in (0, 1, 5, K_AUX, 40):
        expected = auxk_loss(FORMS[name], made, residual, target, b_dec, n_dead, K_AUX)
        counted = torch.tensor(n_dead)
        for given in (None, measure):
            found = auxk_loss(
                FORMS[name], made, residual, target, b_dec, counted, K_AUX, measure=given
            )
            torch.testing.assert_close(found, expected)
        assert (expected == 0) == (n_dead == 0)


def test_unexplained_is_the_loss_of_our_saes():
    made, residual, target, _, weights = parts(weighted=True)
    measure = losses.Measure(weights.sum(), losses.spread(target, weights))
    for loss in losses.LOSSES:
        found = auxk_loss(
            FORMS["mikernels"], made, residual, target, None, 1, K_AUX, weights, loss=loss
        )
        left = losses.weighted((made - residual).square().sum(-1), weights)
        by = losses.aux_per_square(loss, measure, losses.spread(residual, weights))
        torch.testing.assert_close(found, left * by)


@pytest.mark.parametrize("name", FORMS)
def test_tokens_that_are_the_same_have_no_infinite_loss(name):
    made, residual, target, b_dec, _ = (None if t is None else t[:1] for t in parts())
    b_dec = b_dec.expand(D)
    made.requires_grad_()
    value = auxk_loss(FORMS[name], made, residual, target, b_dec, 9, K_AUX)
    (gradient,) = torch.autograd.grad(value, made)
    assert value.isfinite() and gradient.isfinite().all()
    assert (value == 0) == (FORMS[name].normaliser in ("residual", "target", "unexplained"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"acts": "gelu"}, r"acts must be one of \['relu', 'raw'\], got 'gelu'"),
        ({"bias": True}, r"bias must be one of \['none', 'output', 'both'\], got True"),
        ({"normaliser": "fvu"}, r"normaliser must be one of \['residual', .*\], got 'fvu'"),
        (
            {"residual_gradient": True},
            "residual_gradient must be False with normaliser 'unexplained', .*, got True; take",
        ),
    ],
)
def test_forms_that_are_none_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^AuxKForm: {message}"):
        AuxKForm(**settings)


def test_what_is_missing_is_asked_for():
    made, residual, target, _, _ = parts()
    for f in (auxk_loss, auxk_gradient):
        with pytest.raises(ValueError, match=f"{f.__name__}: b_dec must be given .* got None"):
            f(FORMS["openai"], made, residual, target, None, 9, K_AUX)
    measure = losses.Measure(1.0, torch.ones(()))
    with pytest.raises(ValueError, match="residual_spread must be given for .* got None"):
        auxk_per_square(FORMS["openai"], measure, None, D, 9, K_AUX)
