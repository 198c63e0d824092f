# SPDX-License-Identifier: Apache-2.0
"""RowAdam against torch.optim.Adam with projection, clipping and renormalisation by hand."""

import copy
import io
import json
import pickle

import pytest
import torch
from oracle import assert_accurate, identical, randn
from torch import nn

from mikernels.optim import RowAdam

SHAPES = {"w_dec": (130, 24), "w_enc": (130, 24), "b_enc": (130,), "b_dec": (24,), "w": (3, 4, 5)}
STEPS = 6
LR, BETAS, EPS = 3e-3, (0.8, 0.99), 1e-3  # eps: no update is a sign of rounding noise


def parameters(dtype=torch.float32) -> dict[str, nn.Parameter]:
    start = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    start["w_dec"] /= torch.linalg.vector_norm(start["w_dec"], dim=-1, keepdim=True)
    return {name: nn.Parameter(t.to(dtype)) for name, t in start.items()}


def gradient(name: str, step: int, scale: float) -> torch.Tensor:
    return scale * randn(*SHAPES[name], seed=100 * step + list(SHAPES).index(name))


def row_adam(params: dict[str, nn.Parameter], **settings) -> RowAdam:
    groups = [
        {"params": [params["w_dec"]], "project": True, "unit_norm": True},
        {"params": [p for name, p in params.items() if name != "w_dec"]},
    ]
    return RowAdam(groups, **{"lr": LR, "betas": BETAS, "eps": EPS, **settings})


def by_hand(dtype, clip_norm, scale, stored=None) -> list[torch.Tensor]:
    """Parameters, then exp_avg, then exp_avg_sq; `stored` rounds the weights after every step."""
    params = {name: nn.Parameter(p.detach().to(dtype)) for name, p in parameters(stored).items()}
    optimizer = torch.optim.Adam(params.values(), lr=LR, betas=BETAS, eps=EPS)
    for step in range(STEPS):
        for name, p in params.items():
            p.grad = gradient(name, step, scale).to(dtype)
        with torch.no_grad():
            w = params["w_dec"]
            w.grad -= (w.grad * w).sum(-1, keepdim=True) * w
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(params.values(), clip_norm)
            optimizer.step()
            w /= torch.linalg.vector_norm(w, dim=-1, keepdim=True)
            for p in params.values():
                p.copy_(p.to(stored))
    states = [optimizer.state[p] for p in params.values()]
    moments = [state[name] for name in ("exp_avg", "exp_avg_sq") for state in states]
    return [*(p.detach() for p in params.values()), *moments]


@pytest.mark.parametrize("clip_norm", [None, 1.0, 1e6])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_row_adam_is_adam_with_the_constraint_by_hand(clip_norm, scale) -> None:
    params = parameters()
    optimizer = row_adam(params, clip_norm=clip_norm)
    for step in range(STEPS):
        for name, p in params.items():
            p.grad = gradient(name, step, scale)
        optimizer.step()
    states = [optimizer.state[p] for p in params.values()]
    moments = [state[name] for name in ("exp_avg", "exp_avg_sq") for state in states]
    ours = [*(p.detach() for p in params.values()), *moments]
    oracles = by_hand(torch.float64, clip_norm, scale, torch.float64)
    eagers = by_hand(torch.float32, clip_norm, scale, torch.float32)
    for actual, oracle, eager in zip(ours, oracles, eagers, strict=True):
        assert_accurate(actual, oracle, eager)
    norms = torch.linalg.vector_norm(params["w_dec"], dim=-1)
    torch.testing.assert_close(norms, torch.ones(SHAPES["w_dec"][0]))


def test_bfloat16_weights_have_float32_state_and_take_float32_gradients() -> None:
    params = parameters(torch.bfloat16)
    optimizer = row_adam(params, clip_norm=1.0)
    for step in range(STEPS):
        optimizer.apply_gradients({p: gradient(name, step, 1.0) for name, p in params.items()})
    fp32 = by_hand(torch.float32, 1.0, 1.0, torch.bfloat16)
    fp64 = by_hand(torch.float64, 1.0, 1.0, torch.bfloat16)
    for p, oracle, eager in zip(params.values(), fp64, fp32, strict=False):
        assert_accurate(p.detach(), oracle, eager)
        assert {optimizer.state[p][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {
            torch.float32
        }
    # a gradient in the weights' own dtype, as autograd gives it
    params["w_enc"].grad = randn(*SHAPES["w_enc"], dtype=torch.bfloat16)
    before = params["w_enc"].detach().clone()
    optimizer.step()
    assert not torch.equal(before, params["w_enc"])


def test_clipping_is_of_all_gradients_together_after_the_projection() -> None:
    params = parameters()
    # along its rows only, so that nothing of it is left
    params["w_dec"].grad = 10 * params["w_dec"].detach().clone()
    params["b_dec"].grad = torch.full((24,), 3.0)
    params["b_enc"].grad = torch.full((130,), 4.0)
    optimizer = row_adam(params, clip_norm=1.0, betas=(0.0, 0.0))
    optimizer.step()
    norm = (24 * 9 + 130 * 16) ** 0.5
    moved = optimizer.state[params["b_dec"]]["exp_avg"]
    torch.testing.assert_close(moved, torch.full((24,), 3 / norm), rtol=1e-5, atol=0)
    left = optimizer.state[params["w_dec"]]["exp_avg"]
    assert left.abs().max() < 1e-5 * 10 / norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_continues_with_the_same_bits(dtype) -> None:
    params = parameters(dtype)
    optimizer = row_adam(params, clip_norm=1.0)
    for step in range(3):
        optimizer.apply_gradients({p: gradient(name, step, 1.0) for name, p in params.items()})
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    other = row_adam(copies, clip_norm=1.0, lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == LR and other.param_groups[0]["project"]
    for step in range(3, 6):
        for o, ps in ((optimizer, params), (other, copies)):
            o.apply_gradients({p: gradient(name, step, 1.0) for name, p in ps.items()})
    for name in SHAPES:
        assert identical(params[name], copies[name])
        for moment in ("exp_avg", "exp_avg_sq"):
            a, b = optimizer.state[params[name]][moment], other.state[copies[name]][moment]
            assert a.data_ptr() != b.data_ptr() and identical(a, b)


def test_capturable_computes_the_same_bits() -> None:
    runs = []
    for capturable in (False, True):
        params = parameters()
        optimizer = row_adam(params, clip_norm=1.0, capturable=capturable)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        for step in range(STEPS):
            for name, p in params.items():
                p.grad = gradient(name, step, 1.0)
            optimizer.step()
            schedule.step()
        runs.append(params.values())
    assert all(identical(a, b) for a, b in zip(*runs, strict=True))
    for group in optimizer.param_groups:
        assert group["lr"].dim() == 0 and group["lr"].item() == pytest.approx(LR * 0.9**STEPS)
    assert all(state["step"].equal(torch.tensor(STEPS)) for state in optimizer.state.values())


def test_capturable_reads_and_counts_in_place() -> None:
    p = nn.Parameter(torch.zeros(4))
    rate = torch.tensor(0.5)
    optimizer = RowAdam([p], lr=rate, capturable=True)
    optimizer.apply_gradients({p: torch.ones(4)})
    torch.testing.assert_close(p.detach(), torch.full((4,), -0.5))
    state = {name: t.data_ptr() for name, t in optimizer.state[p].items()}
    rate.fill_(0.25)
    optimizer.apply_gradients({p: torch.ones(4)})
    torch.testing.assert_close(p.detach(), torch.full((4,), -0.75))
    assert state == {name: t.data_ptr() for name, t in optimizer.state[p].items()}
    assert optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("target", [False, True])
def test_states_are_exchanged_between_capturable_and_not(source, target) -> None:
    params = parameters()
    optimizer = row_adam(params, clip_norm=1.0, capturable=source)
    for step in range(3):
        optimizer.apply_gradients({p: gradient(name, step, 1.0) for name, p in params.items()})
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    other = row_adam(copies, clip_norm=1.0, lr=1.0, capturable=target)
    rates = [group["lr"] for group in other.param_groups]
    saved = copy.deepcopy(optimizer.state_dict())
    assert all(type(state["step"]) is int for state in saved["state"].values())
    json.dumps(saved["param_groups"])
    other.load_state_dict(saved)
    if target:
        assert all(a is g["lr"] for a, g in zip(rates, other.param_groups, strict=True))
    for o, ps in ((optimizer, params), (other, copies)):
        o.apply_gradients({p: gradient(name, 3, 1.0) for name, p in ps.items()})
        assert all(int(state["step"]) == 4 for state in o.state.values())
    assert all(identical(params[name], copies[name]) for name in SHAPES)


def test_a_torch_state_with_tensor_steps_is_taken() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = RowAdam([p])
    optimizer.apply_gradients({p: torch.ones(4)})
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = torch.tensor(7.0)
    saved["param_groups"][0]["lr"] = torch.tensor(0.5)
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["step"] == 7 and type(optimizer.state[p]["step"]) is int
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_it_is_a_torch_optimizer() -> None:
    p, idle = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = RowAdam([p, idle], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    # Adam's first step is lr long
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.9))
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert torch.equal(idle, torch.ones(4)) and idle not in optimizer.state


def test_a_converted_parameter_is_refused_before_anything_moves() -> None:
    p = nn.Parameter(randn(4, 3))
    optimizer = RowAdam([p])
    optimizer.apply_gradients({p: torch.ones(4, 3)})
    p.data = p.data.double()
    before = p.detach().clone()
    with pytest.raises(ValueError, match="torch.float64 on cpu for moments of torch.float32"):
        optimizer.apply_gradients({p: torch.ones(4, 3, dtype=torch.float64)})
    assert torch.equal(p, before) and optimizer.state[p]["step"] == 1
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.apply_gradients({p: torch.ones(4, 3, dtype=torch.float64)})
    assert optimizer.state[p]["step"] == 2 and not torch.equal(p, before)


def test_bad_settings_parameters_and_gradients_are_refused() -> None:
    p = nn.Parameter(torch.ones(4, 3))
    for settings, message in (
        ({"lr": -1.0}, "lr and eps must be finite and at least 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0 or None, got 0.0"),
    ):
        with pytest.raises(ValueError, match=f"RowAdam: {message}"):
            RowAdam([p], **settings)
    with pytest.raises(ValueError, match=r"need matrices .* got shape \[4\]"):
        RowAdam([{"params": [nn.Parameter(torch.ones(4))], "project": True}])
    with pytest.raises(ValueError, match="must be contiguous"):
        RowAdam([nn.Parameter(torch.ones(4, 3).T)])
    with pytest.raises(TypeError, match="must be one of"):
        RowAdam([nn.Parameter(torch.ones(4, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="lr must be a number, got a tensor; pass lr.item"):
        RowAdam([p], lr=torch.tensor(0.1))
    for lr in (torch.tensor([0.1]), torch.tensor(0.1).half()):
        with pytest.raises(ValueError, match="must be 0-dim float32 or float64 on cpu, got"):
            RowAdam([p], lr=lr, capturable=True)
    optimizer = RowAdam([p])
    with pytest.raises(ValueError, match=r"must have its parameter's shape \[4, 3\]"):
        optimizer.apply_gradients({p: torch.ones(3, 4)})
    with pytest.raises(TypeError, match="must be dense"):
        optimizer.apply_gradients({p: torch.ones(4, 3).to_sparse()})
    assert torch.equal(p, torch.ones(4, 3))


def trained(dtype=torch.float32, **settings) -> tuple[dict[str, nn.Parameter], RowAdam]:
    params = parameters(dtype)
    optimizer = row_adam(params, **{"clip_norm": 1.0, **settings})
    for step in range(3):
        optimizer.apply_gradients({p: gradient(name, step, 1.0) for name, p in params.items()})
    return params, optimizer


@pytest.mark.parametrize("how", ["deepcopy", "copy of a copy", "pickle", "torch.save"])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_takes_the_same_steps(how, capturable, dtype) -> None:
    params, optimizer = trained(dtype, capturable=capturable)
    pair = [list(params.values()), optimizer]
    if how == "pickle":
        theirs, other = pickle.loads(pickle.dumps(pair))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(pair, file)
        file.seek(0)
        theirs, other = torch.load(file, weights_only=False)
    else:
        theirs, other = copy.deepcopy(pair)
        if how != "deepcopy":
            theirs, other = copy.deepcopy([theirs, other])
    assert (other.clip_norm, other.capturable) == (1.0, capturable)
    for step in range(3, 6):
        for o, ps in ((optimizer, params.values()), (other, theirs)):
            gradients = (gradient(name, step, 1.0) for name in SHAPES)
            o.apply_gradients(dict(zip(ps, gradients, strict=True)))
    for p, q in zip(params.values(), theirs, strict=True):
        assert p is not q and identical(p, q)
        assert all(identical(optimizer.state[p][m], other.state[q][m]) for m in ("exp_avg",))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_state_of_torchs_adam_is_continued(kind, capturable) -> None:
    """RowAdam goes on as torch's Adam would have, but for rounding."""
    free = {"project": False, "unit_norm": False}
    params = parameters()
    theirs = kind(params.values(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    for step in range(3):
        for name, p in params.items():
            p.grad = gradient(name, step, 1.0)
        theirs.step()
    for name, p in params.items():
        copies[name].data.copy_(p.detach())
    mine = RowAdam(copies.values(), lr=1.0, capturable=capturable)
    mine.load_state_dict(theirs.state_dict())
    assert mine.param_groups[0]["lr"] == LR and mine.param_groups[0]["betas"] == BETAS
    assert {name: mine.param_groups[0][name] for name in free} == free
    assert all(int(state["step"]) == 3 for state in mine.state.values())
    for name in SHAPES:
        p = params[name]
        p.grad = gradient(name, 3, 1.0)
        copies[name].grad = p.grad.clone()
    exact = {n: p.detach().double() for n, p in params.items()}
    double = kind([nn.Parameter(t) for t in exact.values()], lr=LR, weight_decay=0.0)
    double.load_state_dict(theirs.state_dict())
    for p, name in zip(double.param_groups[0]["params"], SHAPES, strict=True):
        p.grad = gradient(name, 3, 1.0).double()
    for o in (theirs, mine, double):
        o.step()
    for name, oracle in zip(SHAPES, double.param_groups[0]["params"], strict=True):
        assert_accurate(copies[name].detach(), oracle.detach(), params[name].detach())


def test_torchs_adam_continues_a_state_of_ours() -> None:
    params = parameters()
    mine = RowAdam(params.values(), lr=LR, betas=BETAS, eps=EPS)
    for step in range(3):
        mine.apply_gradients({p: gradient(name, step, 1.0) for name, p in params.items()})
    copies = [nn.Parameter(p.detach().clone()) for p in params.values()]
    theirs = torch.optim.Adam(copies)
    theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    for p, name in zip(copies, SHAPES, strict=True):
        p.grad = gradient(name, 3, 1.0)
    theirs.step()
    mine.apply_gradients({p: gradient(name, 3, 1.0) for name, p in params.items()})
    for p, q in zip(params.values(), copies, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert theirs.state[q]["step"] == 4 and int(mine.state[p]["step"]) == 4


def broken(change) -> dict:
    state = copy.deepcopy(trained()[1].state_dict())
    change(state)
    return state


def _set(path: tuple, value):
    def change(state):
        for name in path[:-1]:
            state = state[name]
        if value is None:
            del state[path[-1]]
        else:
            state[path[-1]] = value

    return change


GROUP = ("param_groups", 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set((*GROUP, "weight_decay"), 0.01), "weight_decay must be 0 or False, got 0.01"),
        (_set((*GROUP, "amsgrad"), True), "amsgrad must be 0 or False"),
        (_set((*GROUP, "maximize"), True), "maximize must be 0 or False"),
        (_set((*GROUP, "betas"), None), r"got none of \['betas'\]"),
        (_set((*GROUP, "betas"), (0.9, 1.0)), "betas must be two numbers"),
        (_set((*GROUP, "betas"), 0.9), "betas must be two numbers"),
        (_set((*GROUP, "lr"), -1.0), "lr must be finite and at least 0, got -1.0"),
        (_set((*GROUP, "lr"), True), "lr must be finite"),
        (_set((*GROUP, "eps"), float("nan")), "eps must be finite"),
        (_set((*GROUP, "project"), 1), "project must be a bool, got 1"),
        (_set(("param_groups", 1, "unit_norm"), True), "unit_norm needs matrices"),
        (_set(GROUP, None), r"groups with \[1, 4\] parameters, got \[4\]"),
        (_set((*GROUP, "params"), [1]), "must name 5 parameters once each"),
        (_set(("state", 9), {}), "must name 5 parameters once each"),
        (_set(("state", 0, "exp_avg"), None), "state.0 must have step, exp_avg, exp_avg_sq, got"),
        (_set(("state", 0, "momentum_buffer"), torch.zeros(130, 24)), "must have step, exp_avg"),
        (_set(("state", 0, "max_exp_avg_sq"), torch.zeros(130, 24)), "or of amsgrad"),
        (
            _set(("state", 0, "exp_avg"), torch.zeros(24, 130)),
            r"\[130, 24\], got \[24, 130\]",
        ),
        (_set(("state", 0, "exp_avg"), torch.zeros(130, 24).long()), "dense and floating"),
        (_set(("state", 0, "exp_avg"), 0.5), "must be a tensor of shape"),
        (_set(("state", 2, "exp_avg"), torch.full((130,), float("inf"))), "must be finite"),
        (_set(("state", 2, "exp_avg_sq"), torch.full((130,), -1.0)), "must be at least 0"),
        (_set(("state", 1, "step"), -1), "step must be a whole number of at least 0, got -1"),
        (_set(("state", 1, "step"), 1.5), "step must be a whole number"),
        (_set(("state", 1, "step"), float("nan")), "step must be a whole number"),
        (_set(("state", 1, "step"), torch.ones(2)), "step must be a whole number"),
        (_set(("state",), None), "must be a dict of state and param_groups"),
    ],
)
@pytest.mark.parametrize("capturable", [False, True])
def test_other_states_are_refused_and_nothing_is_changed(change, said, capturable) -> None:
    params, optimizer = trained(capturable=capturable)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((TypeError, ValueError), match=f"RowAdam: .*{said}"):
        optimizer.load_state_dict(broken(change))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert state["step"] == after["state"][index]["step"]
        assert all(identical(state[m], after["state"][index][m]) for m in ("exp_avg", "exp_avg_sq"))
    optimizer.apply_gradients({p: gradient(name, 3, 1.0) for name, p in params.items()})


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.AdamW])
def test_states_of_other_optimizers_are_refused(kind) -> None:
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    theirs = kind([p], lr=0.1)
    p.grad = torch.ones(4)
    theirs.step()
    with pytest.raises(ValueError, match="RowAdam: param_groups.0"):
        RowAdam([q]).load_state_dict(theirs.state_dict())


def test_a_long_vector_is_stepped_as_a_matrix_would_be() -> None:
    from mikernels import optim

    values, gradient = randn(1 << 20, seed=1), randn(1 << 20, seed=2)
    stepped = []
    for shape in ((1 << 20,), (1 << 10, 1 << 10)):
        p = torch.nn.Parameter(values.reshape(shape).clone())
        p.grad = gradient.reshape(shape).clone()
        RowAdam([p], lr=0.1).step()
        stepped.append(p.detach().reshape(-1))
    assert torch.equal(*stepped)
    assert optim._rows(values).shape[0] > 1 and optim._rows(values[:-1]).shape[0] == 1
