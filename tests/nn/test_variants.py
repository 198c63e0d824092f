# SPDX-License-Identifier: Apache-2.0
"""Every variant: one loss in three steps, its gradients against fp64, checkpoints, memory."""

import shutil

import pytest
import torch
from oracle import assert_accurate, num_threads, randn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from variants import BATCH, VARIANTS, D, batch_of, make, source_of, train

from mikernels.nn import ARCHITECTURES
from mikernels.nn.auxk import FORMS
from mikernels.training import TrainConfig, Trainer, load_sae
from mikernels.training.state.metrics import Clock, History, Means
from mikernels.training.steps.autograd import dense_forward, sparse_forward
from mikernels.training.steps.fused import FusedStep, Scratch

CLT = "cross_layer_transcoder"


@pytest.fixture(autouse=True)
def one_thread():
    with num_threads(1):
        yield


def clock() -> Clock:
    return Clock(History().parts)


def started(name: str, **settings):
    """A variant as training starts it, with biases and a decoder that are nowhere 0."""
    sae = make(name, **settings)
    sae.prepare_(batch_of(sae), True)
    with torch.no_grad():
        for number, (key, p) in enumerate(sae.named_parameters()):
            if key != "threshold":
                p.add_(0.05 * randn(*p.shape, seed=20 + number))
        if sae.config.normalize_decoder:
            sae.normalize_decoder_()
    return sae


def scales(sae, batches, dead) -> dict[str, float]:
    """By parameter, the largest sum of what its gradient is a sum of, whatever the signs."""
    sums = {key: torch.zeros_like(p, dtype=torch.float64) for key, p in sae.named_parameters()}
    reach = torch.zeros_like(sae.b_enc, dtype=torch.float64)
    largest = 1.0
    for batch in batches:
        found = sae.terms(batch, sae.k, dead, 0.5, Scratch())
        for term in found.terms:
            codes = term.codes.to(torch.float64)
            dense, dy = codes.to_dense().abs(), term.dy.double().abs()
            if sae.config.auxk.residual_gradient and term is found.terms[0]:
                # of which the loss of dead features is a part, of the other sign
                dy = dy + sum(2 * other.dy.double().abs() for other in found.terms[1:])
            w_dec = sae.rows("w_dec", sae.w_dec, term.part).detach().double()
            level = torch.zeros(len(w_dec), dtype=torch.int64)
            level = level if term.levels is None else term.levels
            dy = dy if dy.dim() == 3 else dy[None]
            slots = codes.with_values(torch.ones_like(codes.values)).to_dense()
            per = torch.stack([(dy[p] @ w_dec.abs().T) for p in range(len(dy))])
            dh = per[level, :, torch.arange(len(w_dec))].T * slots
            if term.dh is not None:
                dh = torch.maximum(dh, codes.with_values(term.dh.double().abs()).to_dense())
            for p in range(len(dy)):
                mine = (level == p)[:, None]
                sae.rows("w_dec", sums["w_dec"], term.part).add_((dense.T @ dy[p]) * mine)
            sae.rows("w_enc", sums["w_enc"], term.part).add_(dh.T @ term.x.double().abs())
            sae.rows("b_enc", reach, term.part).add_(dh.sum(0))
            largest = max(largest, float(dense.max()))
            # of the layers that a part writes to, the last ones
            sums["b_dec"][-dy.shape[-1] :] += dy[0].sum(0)
    if sae.centred:
        sums["b_dec"] += reach @ sae.w_enc.detach().double().abs()
    sums["b_enc"] += reach
    found = {key: float(t.max()) for key, t in sums.items()}
    # what acts on single codes: their gradients, times the code or as far as an estimator sees
    width = getattr(sae.config, "bandwidth", 1.0)
    for key in found.keys() - {"w_dec", "w_enc", "b_enc", "b_dec", "w_skip"}:
        found[key] = float(reach.max()) * largest / width
    return found


def test_every_variant_is_here() -> None:
    assert {kind.architecture for kind, _ in VARIANTS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("loss", ["mse", "fvu"])
@pytest.mark.parametrize("n_dead", [0, 30])
def test_gradients_of_all_steps_are_those_of_the_dense_form_in_fp64(name, loss, n_dead) -> None:
    sae = started(name, loss=loss)
    total = sae.b_enc.shape[0]
    dead = torch.arange(n_dead) * 3 % total
    with torch.no_grad():
        sae.b_enc[dead] -= 0.5
    batches = [batch_of(sae, seed=1), batch_of(sae, n=40, seed=5)]
    # levels by frequency would change between the two
    sae.track_ = lambda codes: None
    share = [b.count / (BATCH + 40) for b in batches]

    def gradients(dtype, forward):
        sae.to(dtype).zero_grad()
        losses = []
        for batch, part in zip(batches, share, strict=True):
            given = sae.in_units(batch.to(torch.device("cpu"), dtype))
            out = forward(sae, given, sae.k, dead, clock())
            losses.append(float(out.loss.detach()))
            (out.loss * part).backward()
        found = {key: p.grad for key, p in sae.named_parameters()}
        return losses, {key: g for key, g in found.items() if g is not None}

    losses, exact = gradients(torch.float64, dense_forward)
    _, eager = gradients(torch.float32, dense_forward)
    mine, ours = gradients(torch.float32, sparse_forward)
    assert mine == pytest.approx(losses, rel=1e-5)

    step = FusedStep(sae, TrainConfig(total_tokens=100, batch_size=BATCH, clip_norm=None))
    step.optimizer.apply_gradients = lambda gradients: None  # type: ignore[method-assign]
    means = Means()
    step([sae.in_units(b) for b in batches], sae.k, dead, means, clock())
    expected = sum(loss * part for loss, part in zip(losses, share, strict=True))
    assert means.means()["loss"] == pytest.approx(float(expected), rel=1e-5)

    constrained = {id(p) for p in sae.constrained()}
    relative = scales(sae, [sae.in_units(b) for b in batches], dead)
    for key, p in sae.named_parameters():
        fused = step.gradients[p]
        if key not in exact:
            assert not fused.any(), key
            continue
        for found in (ours[key], fused):
            if id(p) in constrained:
                # the part along each row, which penalties on norms leave out, is projected away
                w = p.detach()
                parts = [g - (g * w).sum(-1, keepdim=True) * w for g in (found, eager[key])]
                w = w.double()
                whole = exact[key] - (exact[key] * w).sum(-1, keepdim=True) * w
                assert_accurate(parts[0], whole, parts[1], scale=relative[key])
            else:
                scale = relative[key] or None
                assert_accurate(found, exact[key], eager[key], scale=scale)


AUX = [
    (name, form)
    for name in ("topk", "matryoshka", "transcoder, unit", "jumprelu", "cross_layer_transcoder")
    for form in FORMS
    if name in ("topk", "transcoder, unit", "jumprelu")
    or not (FORMS[form].residual_gradient or (FORMS[form].bias, name) == ("both", CLT))
]


@pytest.mark.parametrize(("name", "form"), AUX)
def test_auxk_has_one_gradient_in_every_form(name, form) -> None:
    if name == CLT and form not in ("mikernels", "dictionary_learning", "saelens"):
        with pytest.raises(ValueError, match="aux_form must be one of a layer's residual alone"):
            make(name, aux_form=form)
        return
    sae = started(name, aux_form=form, aux_coefficient=0.1)
    dead = torch.arange(0, 24, 2)
    with torch.no_grad():
        sae.b_enc[dead] -= 0.3
    batch = sae.in_units(batch_of(sae, weighted=True))

    def gradients(dtype, forward):
        sae.to(dtype).zero_grad()
        given = batch.to(torch.device("cpu"), dtype)
        out = forward(sae, given, sae.k, dead, clock())
        assert out.aux_loss > 0
        out.loss.backward()
        return {key: p.grad for key, p in sae.named_parameters() if p.grad is not None}

    exact, eager = gradients(torch.float64, dense_forward), gradients(torch.float32, dense_forward)
    ours = gradients(torch.float32, sparse_forward)
    step = FusedStep(sae, TrainConfig(total_tokens=100, batch_size=BATCH, clip_norm=None))
    step.optimizer.apply_gradients = lambda gradients: None  # type: ignore[method-assign]
    step([batch], sae.k, dead, Means(), clock())
    relative = scales(sae, [batch], dead)
    for key, p in sae.named_parameters():
        for found in (ours[key], step.gradients[p]):
            assert_accurate(found, exact[key], eager[key], scale=relative[key] or None)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_three_steps_agree(name, accumulation) -> None:
    runs = {}
    for step in ("fused", "autograd", "dense"):
        sae = make(name)
        _, history = train(
            sae, step=step, accumulation=accumulation, total_tokens=20 * BATCH * accumulation,
            sparsity_warmup_steps=4,
        )  # fmt: skip
        runs[step] = sae, history
    sae, fused = runs["fused"]
    assert fused.column("fvu")[-1] < fused.column("fvu")[0]
    if sae.shaped:
        assert max(fused.column("sparsity")) > 0
    for _, history in (runs["autograd"], runs["dense"]):
        for column in ("loss", "mse", "fvu", "aux_loss", "sparsity", "l0", "dead_fraction"):
            for steps, rel in ((1, 1e-6), (5, 1e-4), (20, 2e-2)):
                expected = pytest.approx(history.column(column)[:steps], rel=rel, abs=1e-6)
                assert fused.column(column)[:steps] == expected, (column, steps)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_weight_is_how_often_a_token_counts(name) -> None:
    sae = started(name)
    plain = batch_of(sae)
    twice = plain.map(lambda t: torch.cat([t, t[:20]]))
    weights = torch.ones(BATCH)
    weights[:20] = 2
    dead = torch.arange(0, 30, 3)
    k = sae.k
    if k is not None and sae.architecture not in ("topk", "cross_layer_transcoder"):
        # of a batch: as many pairs of the same tokens
        k = float(sae.config.n_features)
    found = []
    for batch in (twice, plain.__class__(plain.input, plain.target, weights)):
        terms = sae.terms(sae.in_units(batch), k, dead, 1.0, Scratch())
        found.append({key: float(value) for key, value in terms.values.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_in_another_unit_it_is_the_same(name) -> None:
    sae = started(name).eval()
    for buffer in ("threshold", "earlier_thresholds"):
        if hasattr(sae, buffer) and not isinstance(getattr(sae, buffer), torch.nn.Parameter):
            getattr(sae, buffer).fill_(0.5)
    batch = batch_of(sae)
    before = sae(batch)
    sae.rescale_(4.0)
    after = sae(batch.scaled(4.0))
    torch.testing.assert_close(after.reconstruction, 4 * before.reconstruction)
    torch.testing.assert_close(after.codes.to_dense(), 4 * before.codes.to_dense())
    assert float(after.fvu) == pytest.approx(float(before.fvu), rel=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_checkpoints_hold_it_whole(name, tmp_path) -> None:
    settings = {"sparsity_warmup_steps": 3}
    trainer, _ = train(make(name), out_dir=tmp_path / "whole", **settings)
    loaded = load_sae(tmp_path / "whole" / "checkpoint-20")
    assert type(loaded) is type(trainer.sae) and loaded.config == trainer.sae.config
    for key, t in trainer.sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], t), key
    out = tmp_path / "half"
    half, _ = train(make(name), out_dir=out, checkpoint_every=8, **settings)
    shutil.rmtree(out / "checkpoint-20")
    sae = make(name)
    again = Trainer(sae, source_of(sae), half.config, quiet=True, out_dir=out)
    assert again.resume() == 16
    again.run()
    for key, t in trainer.sae.state_dict().items():
        assert torch.equal(again.sae.state_dict()[key], t), key


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_weights_train(name) -> None:
    sae = make(name, dtype=torch.bfloat16)
    _, history = train(sae, lr=1e-2)
    assert history.column("fvu")[-1] < history.column("fvu")[0]
    kept = {key for key, (_, dtype) in sae.tensors(sae.config).items() if dtype == torch.float32}
    for key, t in sae.state_dict().items():
        if t.is_floating_point():
            assert t.dtype == (torch.float32 if key in kept else torch.bfloat16), key


@pytest.mark.parametrize("name", VARIANTS)
def test_codes_in_use_have_any_leading_shape(name) -> None:
    sae = started(name).eval()
    x = batch_of(sae).input
    flat = sae.encode(x)
    for shape in ((), (3,), (4, 5), (0,)):
        count = int(torch.tensor(shape).prod()) if shape else 1
        codes = sae.encode(x[:count].reshape(*shape, D))
        dense = codes.to_dense()
        assert dense.shape == (*shape, sae.b_enc.shape[0])
        expected = flat.to_dense()[:count].reshape(dense.shape)
        torch.testing.assert_close(dense, expected)
        assert sae.decode(codes).shape == (*shape, sae.config.d_out)


class Watch(TorchDispatchMode):
    """The largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


@pytest.mark.parametrize("name", VARIANTS)
def test_no_tokens_by_features_matrix_is_made(name) -> None:
    import mikernels

    if not mikernels.supported_levels():
        pytest.skip("the references form tokens x features")
    kind, own = VARIANTS[name]
    n, d, f = 512, 8, 4096
    own = {**own, "widths": (256, 1024, 2048, f)} if "widths" in own else dict(own)
    own.pop("d_out", None)
    own |= {"n_layers": 2} if "n_layers" in own else {}
    sae = kind(d, f, **own)
    batch = sae.in_units(batch_of(sae).__class__(randn(n, d), randn(n, d, seed=1)))
    sae.prepare_(batch, True)
    dead = torch.arange(0, 200, 3)
    with Watch() as watch:
        sae.terms(batch, sae.k, dead, 1.0, Scratch())
        sae.run(batch, sae.k, dead).loss.backward()
    assert watch.largest < n * f / 8, watch.largest
