# SPDX-License-Identifier: Apache-2.0
"""The auxiliary loss of dead features (AuxK) in all the forms that trainers give it.

Of each of N tokens the k_aux best dead features reconstruct what the reconstruction x^ left of the
target t:

    y = sum_j values_j w_dec[indices_j] (+ b_dec),   r = t - x^ (+ b_dec)
    aux = share * sum_n weights_n |y_n - r_n|^2 / normaliser

`AuxKForm` says how libraries differ, `FORMS` what each of them does:

    form                 normaliser                                      share
    mikernels            V_r divided by V_t / N (mse) or by 1 (fvu)      1
    openai               V_r = sum |r - mean r|^2                        1
    dictionary_learning  V_r                                             1
    sparsify             V_t = sum |t - mean t|^2                        min(n_dead / k_aux, 1)
    saelens              N                                               min(n_dead / k_aux, 1)
    bussmann, goreg      N d                                             1

Sums over tokens, and means, count each by its weight, N included (mikernels/nn/losses.py). A
normaliser of 0 makes the loss 0, and so does n_dead = 0; NaN stays, where openai and
dictionary_learning make it 0.

Two fields say nothing of this loss but of the codes that go into it, for whoever makes them:
`acts`, and `encoder_gradient`, without which values are constants to the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from mikernels.nn import losses

ACTS = ("relu", "raw")
BIASES = ("none", "output", "both")
NORMALISERS = ("residual", "target", "mean", "sum", "unexplained")


@dataclass(frozen=True)
class AuxKForm:
    """How a library computes the auxiliary loss.

    Attributes:
        acts: whether the values of the k_aux best dead features are ReLU'd ("relu") or their
            pre-activations, which may be negative ("raw").
        bias: whether b_dec is added to nothing ("none"), to the auxiliary reconstruction alone
            ("output"), or as a constant to the residual too ("both"), which leaves its gradient.
        residual_gradient: whether the loss has a gradient at x^ through r, or r is a constant.
        normaliser: "residual" (V_r), "target" (V_t), "mean" (N d), "sum" (N: a sum over d, a mean
            over tokens) or "unexplained" (losses.aux_per_square, which goes by the main loss).
        scale_by_dead: times min(n_dead / k_aux, 1).
        encoder_gradient: whether the loss has a gradient at the values.

    Raises:
        ValueError: for other names, or a residual with a gradient in its own normaliser.
    """

    acts: str = "relu"
    bias: str = "none"
    residual_gradient: bool = False
    normaliser: str = "unexplained"
    scale_by_dead: bool = False
    encoder_gradient: bool = True

    def __post_init__(self) -> None:
        for name, known in (("acts", ACTS), ("bias", BIASES), ("normaliser", NORMALISERS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"AuxKForm: {name} must be one of {list(known)}, got {value!r}")
        if self.residual_gradient and self.normaliser in ("residual", "unexplained"):
            raise ValueError(
                f"AuxKForm: residual_gradient must be False with normaliser {self.normaliser!r}, "
                "which is a constant, got True; take 'target', 'mean' or 'sum'"
            )


FORMS = {
    "mikernels": AuxKForm(),
    # arXiv 2406.04093
    "openai": AuxKForm(bias="both", normaliser="residual"),
    # as of 1.3.3; earlier ones add b_dec to the output. Its encoder's backward drops the gradient
    "sparsify": AuxKForm(normaliser="target", scale_by_dead=True, encoder_gradient=False),
    # as of 6.36.2; earlier ones add b_dec to the output
    "saelens": AuxKForm(acts="raw", normaliser="sum", scale_by_dead=True),
    "dictionary_learning": AuxKForm(normaliser="residual"),
    "bussmann": AuxKForm(residual_gradient=True, normaliser="mean"),
    "goreg": AuxKForm(acts="raw", bias="output", residual_gradient=True, normaliser="mean"),
}


class AuxKGradient(NamedTuple):
    """The loss without autograd, and its gradients.

    Attributes:
        loss: 0-dim.
        d_reconstruction: `[N, d]`, at acts_reconstruction.
        d_b_dec: `[d]`, at b_dec as a bias of the auxiliary reconstruction; None where it is none.
        d_residual: `[N, d]`, at r, so minus that at x^; None where r is a constant.
    """

    loss: torch.Tensor
    d_reconstruction: torch.Tensor
    d_b_dec: torch.Tensor | None
    d_residual: torch.Tensor | None


def auxk_per_square(
    form: AuxKForm,
    measure: losses.Measure,
    residual_spread: torch.Tensor | None,
    d: int,
    n_dead: int | torch.Tensor,
    k_aux: int,
    loss: str = "mse",
) -> torch.Tensor:
    """0-dim: what `sum_n weights_n |y_n - r_n|^2` is multiplied by, share / normaliser.

    The gradient at y is twice that, times weights_n (y_n - r_n).

    Args:
        measure: of the target. residual_spread: V_r, for the normalisers "residual" and
            "unexplained"; others take None.
        d: width. n_dead, k_aux, loss: as for `auxk_loss`.
    """
    one = torch.ones_like(measure.variance)
    if form.normaliser in ("residual", "unexplained"):
        if residual_spread is None:
            raise ValueError(
                f"auxk_per_square: residual_spread must be given for normaliser "
                f"{form.normaliser!r}, got None; losses.spread(residual, weights) is it"
            )
        kind = "fvu" if form.normaliser == "residual" else loss
        inverse = losses.aux_per_square(kind, measure, residual_spread)
    elif form.normaliser == "target":
        inverse = losses.fvu(one, measure)
    else:
        inverse = losses.mse(one, measure)
        if form.normaliser == "mean":
            inverse = inverse / max(1, d)
    if isinstance(n_dead, torch.Tensor):
        share = (n_dead / k_aux if form.scale_by_dead else n_dead).clamp(max=1).to(one.dtype)
        return inverse * share
    return inverse * min(n_dead / k_aux if form.scale_by_dead else n_dead, 1)


def auxk_loss(
    form: AuxKForm,
    acts_reconstruction: torch.Tensor,
    residual: torch.Tensor,
    target: torch.Tensor,
    b_dec: torch.Tensor | None,
    n_dead: int | torch.Tensor,
    k_aux: int,
    weights: torch.Tensor | None = None,
    *,
    loss: str = "mse",
    measure: losses.Measure | None = None,
) -> torch.Tensor:
    """The auxiliary loss, 0-dim, under autograd.

    Args:
        acts_reconstruction: `[N, d]`, `sum_j values_j w_dec[indices_j]` of the codes of dead
            features, without a bias.
        residual: `[N, d]`, t - x^. Its gradient is cut here where the form has none.
        target: `[N, d]`, t.
        b_dec: `[d]`; None where the form adds none.
        n_dead: number of dead features, an int or a 0-dim tensor, which is not waited for.
        k_aux: how many a token would take; may be more than n_dead.
        weights: `[N]` or None.
        loss: the main loss, "mse" or "fvu", which "unexplained" goes by.
        measure: of target and weights, where it is known already.

    Raises:
        ValueError: for a form that adds b_dec, without it.
    """
    _check("auxk_loss", form, b_dec)
    residual = residual if form.residual_gradient else residual.detach()
    left = acts_reconstruction - residual
    if form.bias != "none":
        assert b_dec is not None
        left = left + (b_dec if form.bias == "output" else b_dec - b_dec.detach())
    total = losses.weighted(left.square().sum(-1), weights)
    factor = _factor(form, residual, target, n_dead, k_aux, weights, loss, measure)
    return total * factor


@torch.no_grad()
def auxk_gradient(
    form: AuxKForm,
    acts_reconstruction: torch.Tensor,
    residual: torch.Tensor,
    target: torch.Tensor,
    b_dec: torch.Tensor | None,
    n_dead: int | torch.Tensor,
    k_aux: int,
    weights: torch.Tensor | None = None,
    *,
    loss: str = "mse",
    measure: losses.Measure | None = None,
) -> AuxKGradient:
    """`auxk_loss` and its gradients in closed form; the arguments are those of `auxk_loss`."""
    _check("auxk_gradient", form, b_dec)
    left = acts_reconstruction - residual
    if form.bias == "output":
        assert b_dec is not None
        left += b_dec
    factor = _factor(form, residual, target, n_dead, k_aux, weights, loss, measure)
    value = losses.weighted(losses.squares(left), weights) * factor
    dy = left.mul_(2 * factor)
    if weights is not None:
        dy = dy.mul_(weights[:, None])
    return AuxKGradient(
        value,
        dy,
        None if form.bias == "none" else dy.sum(0),
        -dy if form.residual_gradient else None,
    )


def _check(function: str, form: AuxKForm, b_dec: torch.Tensor | None) -> None:
    if form.bias != "none" and b_dec is None:
        raise ValueError(
            f"{function}: b_dec must be given for a form with bias {form.bias!r}, got None; pass "
            "the SAE's"
        )


def _factor(form, residual, target, n_dead, k_aux, weights, loss, measure) -> torch.Tensor:
    """`auxk_per_square` with what it needs of the residual and the target, as a constant."""
    target, residual = target.detach(), residual.detach()
    if measure is None:
        count = float(len(target)) if weights is None else weights.sum()
        measure = losses.Measure(count, losses.spread(target, weights))
    spread = None
    if form.normaliser in ("residual", "unexplained"):
        spread = losses.spread(residual, weights)
    return auxk_per_square(form, measure, spread, target.shape[-1], n_dead, k_aux, loss)
