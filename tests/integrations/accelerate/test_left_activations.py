# SPDX-License-Identifier: Apache-2.0
"""Activations that are left: what somebody else may do with them gives what the dense ones give."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

from mikernels.integrations.lazy import Lazy, Ledger, leave_products

N, D, F = 9, 6, 20
# in fp64, so that sums agree to torch's own tolerance
FP64 = torch.float64
X = oracle.randn(N, D, seed=1, dtype=FP64)


class Coder(nn.Module):
    """`relu(x w + b)` and a decoder, as a library would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(oracle.randn(F, D, seed=2, dtype=FP64))
        self.b = nn.Parameter(oracle.randn(F, seed=3, dtype=FP64) - 1)
        self.out = nn.Parameter(oracle.randn(F, D, seed=4, dtype=FP64))

    def before(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w, self.b)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.before(x))


def pair() -> tuple[Coder, Coder, Ledger]:
    """A coder as it is, another of whose products are left."""
    plain, left, ledger = Coder(), Coder(), Ledger("test")
    ledger.crowded_from = 1.0
    for name in ("before", "encode"):
        setattr(left, name, leave_products(getattr(left, name), D, F, ledger))
    return plain, left, ledger


@pytest.fixture(autouse=True)
def looks_are_wanted() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "test: .* needs the dense", RuntimeWarning)
        yield


def gradients(coder: Coder) -> dict[str, Tensor | None]:
    return {n: p.grad for n, p in coder.named_parameters()}


def assert_same(use: Callable[[Coder], Any]) -> Ledger:
    """What `use` gives, and the gradients that it leaves, are those of dense activations."""
    plain, left, ledger = pair()
    wanted, found = use(plain), use(left)
    assert ledger.calls
    torch.testing.assert_close(found, wanted)
    for name, grad in gradients(plain).items():
        torch.testing.assert_close(gradients(left)[name], grad, msg=name)
    return ledger


def test_what_is_made_without_gradients_stays_so():
    def use(coder: Coder) -> Tensor:
        with torch.no_grad():
            acts = coder.encode(X)
        (acts @ coder.out).square().sum().backward()
        assert coder.w.grad is None
        return acts.sum()

    assert_same(use)


def test_a_look_without_gradients_takes_none_away():
    def use(coder: Coder) -> Tensor:
        acts = coder.encode(X)
        with torch.no_grad():
            seen = acts.exp()
        acts.exp().sum().backward()
        return seen

    assert_same(use)


@pytest.mark.parametrize("how", ["method", "attribute"])
def test_a_leaf_collects_its_gradient(how):
    def use(coder: Coder) -> Tensor:
        acts = coder.encode(X).detach()
        if how == "method":
            acts.requires_grad_()
        else:
            acts.requires_grad = True
        (acts @ coder.out).square().sum().backward()
        assert acts.grad is not None
        return acts.grad

    assert_same(use)


def test_a_leaf_that_was_looked_at_collects_its_gradient():
    def use(coder: Coder) -> Tensor:
        acts = coder.encode(X).detach()
        acts.exp()
        acts.requires_grad_()
        (acts @ coder.out).square().sum().backward()
        assert acts.grad is not None
        return acts.grad

    assert_same(use)


class _Thrice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.relu()

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


@pytest.mark.parametrize("method", ["before", "encode"])
def test_a_function_of_somebodys_keeps_its_own_gradient(method):
    def use(coder: Coder) -> Tensor:
        acts = _Thrice.apply(getattr(coder, method)(X))
        out = acts @ coder.out
        out.square().sum().backward()
        return out

    assert_same(use)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h * (h > 0.5)

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        return grad * (h > 0)


def test_a_function_whose_result_would_be_codes_keeps_its_own_gradient():
    def use(coder: Coder) -> Tensor:
        acts = _Gate.apply(coder.before(X))
        (acts @ coder.out).square().sum().backward()
        return acts.sum(0)

    assert_same(use)


def test_inference_mode_is_answered():
    def use(coder: Coder) -> list[Tensor]:
        with torch.inference_mode():
            acts, floor = coder.encode(X), torch.full((), 0.7, dtype=FP64)
            kept = coder.before(X) * (coder.before(X) > floor)
            return [
                t.clone() for t in (acts @ coder.out, acts.exp(), kept.sum(0), (acts > 0).sum())
            ]

    assert_same(use)


CHANGES: dict[str, Callable[[Coder, Tensor], object]] = {
    "a parameter in place": lambda coder, x: _add(coder.b),
    "a parameter's data": lambda coder, x: setattr(coder.b, "data", coder.b.data + 1),
    "the input in place": lambda coder, x: x.zero_(),
}


def _add(parameter: Tensor) -> None:
    with torch.no_grad():
        parameter.add_(1)


@pytest.mark.parametrize("what", CHANGES)
def test_numbers_from_before_a_change_are_not_those_from_after(what):
    _, left, _ = pair()
    x = X.clone()
    for use in (Tensor.exp, Tensor.sum, lambda t: t @ left.out, lambda t: t.topk(3)):
        acts = left.encode(x)
        CHANGES[what](left, x)
        with pytest.raises(RuntimeError, match="was changed since"):
            use(acts)


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_asked_for_before_a_change_stays(what):
    def use(coder: Coder) -> list[Tensor]:
        x = X.clone()
        acts, looked = coder.encode(x), coder.encode(x)
        firing, dense = (acts @ coder.out).sum(), looked.exp()
        CHANGES[what](coder, x)
        with torch.no_grad():
            counts = acts.bool().float().sum(-1)
        return [firing, dense, counts, acts.sum(-1), acts.exp(), looked.sum(), looked.relu()]

    assert_same(use)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "detach": lambda acts: acts.detach()[:, :7].zero_(),
    "detach after a look": lambda acts: (acts.exp(), acts.detach()[:, :7].zero_()),
    "detach, then the tensor": lambda acts: acts.detach().exp() is None or acts[:, :7].zero_(),
    "setitem of a detached one": lambda acts: acts.detach().__setitem__((slice(None), 3), 2.0),
    "data": lambda acts: acts.data[:, :7].zero_(),
    "numpy": lambda acts: acts.numpy()[:, :7].fill(2),
    "a view": lambda acts: acts.view(-1)[:50].fill_(7.0),
    "columns": lambda acts: acts[:, 4:9].mul_(2),
    "columns to zero": lambda acts: acts.__setitem__((slice(None), slice(4, 9)), 0),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_change_in_place_is_seen(how):
    def use(coder: Coder) -> list[Tensor]:
        with torch.no_grad():
            acts = coder.encode(X)
            other = acts.detach()
            WRITES[how](acts)
        return [acts.sum(-1), acts @ coder.out, other.sum(-1), (other > 0).sum()]

    assert_same(use)


def test_a_change_without_gradients_is_none_of_the_gradient():
    def use(coder: Coder) -> Tensor:
        acts = coder.encode(X) * (coder.encode(X) > 0.2)
        with torch.no_grad():
            acts[:, :9] = 0
        out = acts @ coder.out
        out.square().sum().backward()
        return out

    assert_same(use)


@pytest.mark.parametrize("method", ["before", "encode"])
def test_topk_is_sorted_where_it_is_asked_to_be(method):
    def use(coder: Coder) -> list[Tensor]:
        h = getattr(coder, method)(X)
        values, indices = h.topk(3)
        codes = torch.zeros_like(h).scatter_(-1, indices, values)
        out = codes @ coder.out
        out.square().sum().backward()
        return [values, out, codes.sum(-1)]

    assert_same(use)


@pytest.mark.parametrize("sort", [True, False])
def test_the_best_of_a_batch_are_sorted_where_they_are_looked_at(sort):
    def use(coder: Coder) -> list[Tensor]:
        h = coder.encode(X)
        best = torch.topk(h.flatten(), 12, dim=-1, sorted=sort)
        found, loss = [], torch.zeros((), dtype=FP64)
        # as they are, then one of them looked at, then both
        for factor in (1, 2, 3):
            values = best.values if factor == 1 else best.values * factor
            if factor == 3:
                assert len(best.indices.tolist()) == 12
            flat = torch.zeros_like(h.flatten()).scatter(-1, best.indices, values)
            out = flat.reshape(h.shape) @ coder.out
            loss = loss + out.square().sum()
            found.append(out.detach())
        loss.backward()
        if sort:
            found += [best.values.detach(), best.values[-1], best.indices[:3].float()]
        return found

    assert not {"scatter", "zeros_like", "matmul"} & {*assert_same(use).dense}


def test_places_in_other_zeros_are_places_there():
    def use(coder: Coder) -> list[Tensor]:
        values, indices = coder.encode(X).flatten().topk(12)
        h = coder.encode(X[:5])
        taken = indices < h.numel()
        here = torch.zeros_like(h.flatten()).scatter(-1, indices[taken], values[taken])
        return [here.reshape(h.shape) @ coder.out]

    assert_same(use)


@pytest.mark.parametrize("flat", [False, True])
def test_indices_that_somebody_changed_are_taken_as_they_are(flat):
    def use(coder: Coder) -> Tensor:
        h = coder.before(X)
        given = h.flatten() if flat else h
        values, indices = given.topk(3, sorted=False)
        indices[:] = torch.tensor([5, 2, 3])
        with torch.no_grad():
            ordered = values.abs().sort(-1).values
            return torch.zeros_like(given).scatter(-1, indices, ordered).reshape(N, F) @ coder.out

    assert_same(use)


def test_every_floor_has_its_own_pairs():
    def use(coder: Coder) -> list[Tensor]:
        h, threshold = coder.before(X), torch.full((F,), 0.1, dtype=FP64)
        found = [(h * (h > floor)).sum() for floor in (0.1, 0.5, 0.9, 0.1)]
        for _ in range(3):
            found.append((h * (h > threshold)).sum())
            threshold.data.mul_(3)  # which no version counts
        return found

    assert_same(use)


def test_tokens_are_chosen_by_a_mask():
    mask = torch.arange(N) % 3 > 0

    def use(coder: Coder) -> list[Tensor]:
        h = coder.before(X)
        values, indices = h.topk(3, sorted=False)
        best = torch.zeros_like(h).scatter_(-1, indices, values.relu())
        found = [acts[mask] @ coder.out for acts in (h.relu(), best)]
        found += [(best[mask] != 0).sum(-1), best[~mask].abs().sum(0)]
        sum(t.sum() for t in found[:2]).backward()
        return [t.detach() for t in found]

    assert not assert_same(use).dense


def test_copies_are_dense_and_their_own():
    _, left, _ = pair()
    with torch.no_grad():
        acts = left.encode(X)
        made = copy.deepcopy(acts)
        assert not isinstance(made, Lazy)
        made.zero_()
        torch.testing.assert_close(acts.sum(), Coder().encode(X).sum())


def test_a_number_is_compared_in_the_dtype_of_the_activations():
    def use(coder: Coder) -> Tensor:
        h = coder.before(X)
        # between the number and what fp32 makes of it
        floor = float(h.detach().max()) - 1e-12
        return (h * (h > floor)).sum(-1)

    assert_same(use)


def test_parts_of_a_flat_tensor_are_not_features():
    def use(coder: Coder) -> list[Tensor]:
        h = coder.before(X)
        values, indices = h.flatten().topk(12, sorted=False)
        flat = torch.zeros_like(h.flatten()).scatter_(-1, indices, values)
        part = flat[..., 30:70].sum()
        with torch.no_grad():
            flat = flat.detach()
            flat[..., 30:] = 0
        return [part, flat.sum(), coder.encode(X).flatten()[..., 3:9], h.flatten()[..., 7:50]]

    assert_same(use)


def test_what_torch_does_not_multiply_is_not_multiplied():
    for coder in pair()[:2]:
        with pytest.raises(RuntimeError, match="dtype"):
            coder.encode(X.float())
        acts = coder.encode(X).float()
        with pytest.raises(RuntimeError, match="dtype"):
            _ = acts @ coder.out


def test_autocast_leaves_fp64_as_it_is():
    def use(coder: Coder) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            acts = coder.encode(X)
            out = acts @ coder.out
            out.square().sum().backward()
        return [out, acts.sum(-1)]

    assert_same(use)


def test_operands_with_more_axes_broadcast():
    def use(coder: Coder) -> list[Tensor]:
        acts, h = coder.encode(X[0]), coder.before(X[0])
        row = torch.arange(1.0, F + 1, dtype=FP64)[None]
        return [acts * row, h * row, h + row, acts / row, h > row, acts.bool().double() * row]

    assert_same(use)


def test_conversions_are_answered():
    def use(coder: Coder) -> list[Tensor]:
        acts = coder.encode(X.reshape(3, 3, D))
        rows = torch.flatten(acts, start_dim=0, end_dim=-2).to(dtype=torch.float32)
        return [rows.sum(0), acts.to(FP64).sum(-1), acts.float().sum(-1)]

    assert not assert_same(use).dense


def test_bits_are_those_of_the_dense_tensor():
    assert assert_same(lambda coder: coder.encode(X.reshape(3, 3, D)).view(torch.int64)).dense
