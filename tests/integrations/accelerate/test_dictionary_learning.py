# SPDX-License-Identifier: Apache-2.0
"""dictionary_learning accelerated: its own code gives what it gives without."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate_cases import assert_as_accurate, assert_same, rms, snapshot
from accelerate_dictionary_learning import (
    COMMON,
    SELECTING,
    STEPS,
    TRAINERS,
    D,
    F,
    K,
    N,
    Run,
    assert_same_training,
    batches,
    exactly,
    in_double,
    library,
    make,
    sparse,
    train,
    unaccelerated,
)
from oracle import assert_accurate, randn

from mikernels.integrations.accelerate import Report, accelerate, check

pytestmark = pytest.mark.peers


def accelerated(obj: Any, **settings: Any) -> Report:
    """Codes however many features are active, as at sizes for which they are meant."""
    report = accelerate(obj, **settings)
    report.crowded_from = 1.0
    return report


def dense(acts: torch.Tensor) -> torch.Tensor:
    """Somebody's look at all activations."""
    return acts + 0


@pytest.fixture
def looks() -> Iterator[None]:
    """Looks at dense activations are wanted, and not warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "accelerate: .* needs the dense", RuntimeWarning)
        yield


# ---- training


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TRAINERS)
def test_20_steps_are_the_librarys(name, autocast):
    data = batches(torch.bfloat16 if autocast else torch.float32)
    exact, eager = exactly(name, autocast=autocast), train(make(name), data, autocast=autocast)
    for optimizer in (False, True) if name in ("TopKTrainer", "StandardTrainer") else (True,):
        trainer = make(name)
        report = accelerated(trainer, optimizer=optimizer)
        assert_same_training(train(trainer, data, autocast=autocast), exact, eager, low=autocast)
        assert not report.dense and not report.crowded
        assert report.calls == STEPS
        assert report.library == f"dictionary_learning {library().__version__}"
        constrained = type(trainer.optimizer).__name__ == "ConstrainedAdam"
        assert bool(report.kept) == (optimizer and constrained)
    if name in SELECTING:
        # AuxK and the threshold's update were there
        assert sum(said["dead_features"] > 0 for said in exact.said) > STEPS // 2
        assert eager.numbers["threshold"] > 0


def _k_by_writing(step: int, trainer: Any) -> None:
    if step % 5 == 0:
        trainer.ae.k.fill_(7 - step // 5)


def _k_by_replacing(step: int, trainer: Any) -> None:
    if step % 5 == 0:
        trainer.ae.k = torch.tensor(2 + step // 5, dtype=torch.int)


def _fewer_groups(step: int, trainer: Any) -> None:
    trainer.ae.active_groups = 3 if step < 8 else 2


CHANGES: dict[str, tuple[tuple[str, ...], Callable[[int, Any], object]]] = {
    "k written": (SELECTING, _k_by_writing),
    "k replaced": (SELECTING, _k_by_replacing),
    "fewer groups": (("MatryoshkaBatchTopKTrainer",), _fewer_groups),
}


@pytest.mark.parametrize(
    "how, name", [(how, n) for how, (names, _) in CHANGES.items() for n in names]
)
def test_what_changes_between_steps_is_followed(how, name):
    each = CHANGES[how][1]
    trainer = make(name)
    report = accelerated(trainer, optimizer=True)
    found = train(trainer, batches(), each=each)
    assert_same_training(found, exactly(name, each=each), train(make(name), batches(), each=each))
    assert not report.dense


def test_activations_of_zero_move_a_threshold_that_is_near():
    """The gradient of its L0 is taken of activations, of which those of 0 are in its window."""
    name, settings = "JumpReluTrainer", dict(bandwidth=3.0)
    trainer = make(name, **settings)
    report = accelerated(trainer)
    eager = train(make(name, **settings), batches())
    assert_same_training(train(trainer, batches()), exactly(name, **settings), eager)
    assert not report.dense
    # fp64's are other ones without
    near = unaccelerated(name)[0].numbers["threshold"]
    assert rms(eager.numbers["threshold"] - near) > 1e-3


@pytest.mark.parametrize("name", ["StandardTrainer", "PAnnealTrainer"])
def test_dead_features_are_resampled_as_without(name):
    settings = dict(resample_steps=6)
    trainer, eager = make(name, **settings), make(name, **settings)
    report = accelerated(trainer)
    wanted = train(eager, batches())
    assert_same_training(
        train(
            trainer,
            batches(),
        ),
        exactly(name, **settings),
        wanted,
    )
    assert not report.dense
    # there were some
    assert (wanted.counts[:15] > 3).any()


@pytest.mark.parametrize("name", ["TopKTrainer", "BatchTopKTrainer", "JumpReluTrainer"])
def test_strided_activations_are_taken(name):
    trainer = make(name)
    report = accelerated(trainer)
    found = train(trainer, batches(strided=True))
    assert_same_training(found, exactly(name), train(make(name), batches(strided=True)))
    assert not report.dense


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize(
    "name, crowded_from", [*((name, 0.0) for name in TRAINERS), ("JumpReluTrainer", 0.06)]
)
def test_many_active_features_are_dense_and_right(name, crowded_from):
    trainer = make(name)
    report = accelerate(trainer)
    report.crowded_from = crowded_from
    assert_same_training(train(trainer, batches()), *unaccelerated(name))
    # top-k is a number of pairs that is known
    assert bool(report.crowded) == (name not in SELECTING)
    assert bool(report.dense) == bool(report.crowded)


@pytest.mark.parametrize("name", TRAINERS)
def test_gradients_accumulate_over_halves(name):
    def gradients(trainer: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for part in x.chunk(2):
            (trainer.loss(part, step=4) / 2).backward()
        return {n: p.grad for n, p in trainer.ae.named_parameters() if p.grad is not None}

    trainer, exact = make(name), make(name)
    exact.ae.double()
    report = accelerated(trainer)
    found = gradients(trainer, batches()[0])
    with in_double():
        wanted = gradients(exact, batches(torch.float64)[0])
    assert_as_accurate(found, wanted, gradients(make(name), batches()[0]))
    assert report.calls == 2 and not report.dense


def test_no_step_warns():
    trainer = make("TopKTrainer", seed=0)
    accelerate(trainer, optimizer=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(trainer, batches()[:4])


# ---- what is logged


@pytest.mark.parametrize("name", TRAINERS)
def test_what_is_logged_is_the_librarys(name):
    def logged(trainer: Any, data: list[torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
        said: list[dict[str, torch.Tensor]] = []
        last: list[torch.Tensor] = []

        def each(step: int, trainer: Any) -> None:
            _, x_hat, f, losses = trainer.loss(data[step], step=step, logging=True)
            numbers = {k: torch.tensor(float(v)) for k, v in losses.items() if v is not None}
            l0 = (f != 0).float().sum(dim=-1).mean()
            said.append(numbers | {"x_hat": x_hat.detach(), "l0": l0})
            last[:] = [f]

        train(trainer, data[:8], each=each)
        both = said[0].keys() & said[-1].keys()
        return {k: torch.stack([numbers[k] for numbers in said]) for k in both}, last[0]

    trainer, exact = make(name), make(name)
    exact.ae.double()
    report = accelerated(trainer)
    found, f = logged(trainer, batches())
    assert not report.dense
    with in_double():
        wanted, wanted_f = logged(exact, batches(torch.float64))
    eager, eager_f = logged(make(name), batches())
    assert_as_accurate(found, wanted, eager)
    with pytest.warns(RuntimeWarning, match="needs the dense"):
        acts = dense(f)
    assert_as_accurate({"f": acts}, {"f": wanted_f}, {"f": eager_f})
    assert report.dense == {"add": 1}


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("name", ["TopKTrainer", "GatedSAETrainer", "StandardTrainer"])
@pytest.mark.parametrize("what", ["encoder", "decoder"])
def test_hooks_of_some_steps_see_the_dense_tensor(name, what):
    def with_hook(trainer: Any, write: bool) -> tuple[Callable[[int, Any], object], list[Any]]:
        seen: list[torch.Tensor] = []
        handles: list[Any] = []

        def hook(module: Any, inputs: Any, output: torch.Tensor) -> Any:
            acts = output if what == "encoder" else inputs[0]
            seen.append(dense(acts.detach()))
            return output * 0.5 if write else None

        def each(step: int, trainer: Any) -> None:
            if step == 5:
                handles.append(getattr(trainer.ae, what).register_forward_hook(hook))
            if step == 12:
                handles[0].remove()

        return each, seen

    for write in (False, True) if name == "TopKTrainer" else (False,):
        trainers = [make(name), make(name), make(name)]
        report = accelerated(trainers[0])
        trainers[1].ae.double()
        hooks = [with_hook(trainer, write) for trainer in trainers]
        found = train(trainers[0], batches(), each=hooks[0][0])
        with in_double():
            exact = train(trainers[1], batches(torch.float64), each=hooks[1][0])
        eager = train(trainers[2], batches(), each=hooks[2][0])
        assert_same_training(found, exact, eager)
        assert report.dense
        # AuxK decodes too
        assert len(hooks[0][1]) == len(hooks[2][1]) >= 7
        for mine, true, theirs in zip(*(seen for _, seen in hooks), strict=True):
            assert type(mine) is torch.Tensor
            assert_accurate(mine, true, theirs)
        # nobody looks any more
        before = report.dense.total()
        trainers[0].update(STEPS, batches()[0])
        assert report.dense.total() == before


# ---- saving and loading


def _state(trainer: Any) -> dict[str, Any]:
    """All that a run goes on from."""
    names = ("num_tokens_since_fired", "steps_since_active", "p", "next_p", "p_step_count")
    names += ("sparsity_coeff", "sparsity_queue")
    return {
        "ae": trainer.ae.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "rest": {n: getattr(trainer, n) for n in names if hasattr(trainer, n)},
    }


def _load(trainer: Any, state: dict[str, Any]) -> None:
    trainer.ae.load_state_dict(state["ae"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    for name, value in state["rest"].items():
        setattr(trainer, name, value)


@pytest.mark.parametrize(
    "name, optimizer", [*((name, True) for name in TRAINERS), ("TopKTrainer", False)]
)
@pytest.mark.parametrize("first", ["plain", "accelerated", "both"])
def test_a_run_goes_on_in_either_direction(name, first, optimizer, tmp_path):
    half = STEPS // 2
    trainer = make(name)
    if first != "plain":
        accelerated(trainer, optimizer=optimizer)
    begun = train(trainer, batches()[:half])
    torch.save(_state(trainer), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=False)
    for key, weight in make(name).ae.state_dict().items():
        # as safetensors wants it, or as the library has it
        assert state["ae"][key].is_contiguous() or state["ae"][key].stride() == weight.stride()
    other = make(name)
    if first != "accelerated":
        accelerated(other, optimizer=optimizer)
    _load(other, state)
    ended = train(other, batches(), first=half)
    losses = torch.cat([begun.numbers["losses"], ended.numbers["losses"]])
    found = Run(ended.numbers | {"losses": losses}, torch.cat([begun.counts, ended.counts]), [])
    assert_same_training(found, *unaccelerated(name))


@pytest.mark.parametrize("name", TRAINERS)
def test_weights_load_as_the_librarys_own(name, tmp_path):
    trainer = make(name)
    accelerated(trainer)
    train(trainer, batches()[:3])
    with torch.no_grad():
        trainer.ae.scale_biases(1.5)
        if hasattr(trainer.ae, "k"):
            assert trainer.ae.threshold < 0
    torch.save(trainer.ae.state_dict(), tmp_path / "ae.pt")
    loaded = type(trainer.ae).from_pretrained(tmp_path / "ae.pt")
    for key, value in trainer.ae.state_dict().items():
        if name not in ("StandardTrainerAprilUpdate",):
            assert torch.equal(loaded.state_dict()[key], value), key
    plain, x = make(name).ae, batches()[4]
    plain.load_state_dict(trainer.ae.state_dict())
    with torch.no_grad():
        assert_accurate(trainer.ae(x), copy.deepcopy(plain).double()(x.double()), plain(x))


# ---- dictionaries by themselves


def _dictionaries() -> dict[str, Callable[[], Any]]:
    def of(name: str) -> Callable[[], Any]:
        return lambda: make(name).ae

    def new() -> Any:
        torch.manual_seed(1)
        ae = library("dictionary_learning.dictionary").AutoEncoderNew(D, F)
        sparse(ae)
        return ae

    names = {
        "AutoEncoderTopK": "TopKTrainer",
        "BatchTopKSAE": "BatchTopKTrainer",
        "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
        "JumpReluAutoEncoder": "JumpReluTrainer",
        "GatedAutoEncoder": "GatedSAETrainer",
        "AutoEncoder": "StandardTrainer",
    }
    return {**{kind: of(name) for kind, name in names.items()}, "AutoEncoderNew": new}


DICTIONARIES = _dictionaries()
HELD = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
GATED = ("GatedAutoEncoder",)
Use = Callable[[Any, torch.Tensor], Any]
# name -> (classes that have it, what is called)
USES: dict[str, tuple[tuple[str, ...], Use]] = {
    "forward": (tuple(DICTIONARIES), lambda ae, x: ae(x)),
    "features": (tuple(DICTIONARIES), lambda ae, x: ae(x, output_features=True)),
    "encode": (tuple(DICTIONARIES), lambda ae, x: ae.encode(x)),
    "decode": (tuple(DICTIONARIES), lambda ae, x: ae.decode(ae.encode(x))),
    "threshold": (HELD, lambda ae, x: ae.encode(x, use_threshold=True)),
    "selection": (HELD, lambda ae, x: ae.encode(x, use_threshold=False)),
    "active": (HELD[1:], lambda ae, x: ae.encode(x, return_active=True, use_threshold=False)),
    "active, threshold": (HELD[1:], lambda ae, x: ae.encode(x, return_active=True)),
    "pre-jump": (("JumpReluAutoEncoder",), lambda ae, x: ae.encode(x, output_pre_jump=True)),
    "gate": (GATED, lambda ae, x: ae.encode(x, return_gate=True)),
    "normalised": (GATED, lambda ae, x: ae(x, output_features=True, normalize_decoder=True)),
    "normalised twice": (
        GATED,
        lambda ae, x: ae.decode(ae.encode(x, normalize_decoder=True), normalize_decoder=True),
    ),
    "ghosts": (("AutoEncoder",), lambda ae, x: ae(x, True, ghost_mask=torch.arange(F) % 2 == 0)),
}
INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "rows": lambda: randn(N, D, seed=21),
    "strided": lambda: randn(D, N, seed=21).T,
    "every other": lambda: randn(N, 2 * D, seed=21)[:, ::2],
    "sequences": lambda: randn(3, 5, D, seed=22),
    "one": lambda: randn(D, seed=23),
    "none": lambda: randn(0, D),
}


def _prepared(kind: str) -> Any:
    ae = DICTIONARIES[kind]()
    with torch.no_grad():
        if hasattr(ae, "k"):
            ae.threshold.fill_(0.9)
        if kind == "JumpReluAutoEncoder":
            ae.apply_b_dec_to_input = True
            ae.b_dec.copy_(randn(D, seed=24) / 4)
        if kind == "GatedAutoEncoder":
            ae.decoder.weight.mul_(1 + randn(F, seed=25).abs())
    return ae


def _summed(ae: Any, x: torch.Tensor) -> float:
    """How large the numbers are whose sums and differences a dictionary rounds."""
    w = ae.encoder.weight if hasattr(ae, "encoder") else ae.W_enc.T
    return float((x.abs() @ w.detach().abs().T).max()) if x.numel() else 0.0


def _flat(found: Any) -> list[torch.Tensor]:
    return list(found) if isinstance(found, tuple | list) else [found]


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("use, kind", [(u, k) for u, (kinds, _) in USES.items() for k in kinds])
def test_a_dictionary_gives_what_it_gives(use, kind):
    call, taken = USES[use][1], []
    plain, ae = _prepared(kind), _prepared(kind)
    exact = copy.deepcopy(plain).double()
    report = accelerated(ae)
    for inputs, given in INPUTS.items():
        x = given()
        try:
            eager = _flat(call(plain, x))
        except Exception as error:
            # as much of an input as the library takes
            with pytest.raises(type(error)):
                call(ae, x)
            continue
        taken.append(inputs)
        wanted, found = _flat(call(exact, x.double())), _flat(call(ae, x))
        assert len(found) == len(eager), inputs
        for mine, true, theirs in zip(found, wanted, eager, strict=True):
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, inputs
            if theirs.dtype.is_floating_point:
                assert_accurate(dense(mine), true, theirs, scale=_summed(plain, x))
            else:
                assert torch.equal(mine, theirs), inputs
    assert {"rows", "strided", "every other", "none"} <= {*taken} and report.calls


@pytest.mark.parametrize("kind", DICTIONARIES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_makes_nothing_dense(kind, mode):
    plain, ae, x = _prepared(kind), _prepared(kind), randn(N, D, seed=21)
    report = accelerated(ae)
    with mode():
        out, acts = ae(x, output_features=True)
        l0 = (acts != 0).float().sum(-1)
        assert not report.dense
        eager, eager_acts = plain(x, output_features=True)
        exact = copy.deepcopy(plain).double()(x.double())
        assert_accurate(out.clone(), exact.clone(), eager.clone(), scale=_summed(plain, x))
        assert torch.equal(l0, (eager_acts != 0).float().sum(-1))


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_gradients_reach_the_input(kind):
    def gradient(ae: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.requires_grad_()
        ae(x).square().sum().backward()
        return {"x": x.grad, **{n: p.grad for n, p in ae.named_parameters() if p.grad is not None}}

    ae = _prepared(kind)
    report = accelerated(ae)
    found = gradient(ae, randn(N, D, seed=21))
    exact = gradient(_prepared(kind).double(), randn(N, D, seed=21).double())
    assert_as_accurate(found, exact, gradient(_prepared(kind), randn(N, D, seed=21)))
    assert not report.dense


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("inputs", ["rows", "sequences"])
@pytest.mark.parametrize("kind", DICTIONARIES)
def test_codes_are_the_dense_ones(kind, inputs):
    plain, ae, x = _prepared(kind), _prepared(kind), INPUTS[inputs]()
    report = accelerated(ae)
    codes = report.codes(x)
    found = codes.to_dense()
    eager, wanted = plain.encode(x), copy.deepcopy(plain).double().encode(x.double())
    assert_accurate(found.reshape(eager.shape), wanted, eager, scale=_summed(plain, x))
    # of the groups that are off the library sets `[:, f:]` to 0, which of sequences are tokens
    assert not report.dense or (kind, inputs) == ("MatryoshkaBatchTopKSAE", "sequences")
    report.restore()
    with pytest.raises(RuntimeError, match="restored"):
        report.codes(x)


def test_codes_of_a_trainer_are_its_dictionarys():
    trainer = make("TopKTrainer")
    with accelerate(trainer) as report:
        codes = report.codes(batches()[0])
        assert codes.values.shape == (N, K) and codes.n_features == F


# ---- the library's own loops


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_its_evaluation_makes_nothing_dense(kind):
    evaluate = library("dictionary_learning.evaluation").evaluate

    def judged(ae: Any, dtype: torch.dtype) -> torch.Tensor:
        found = evaluate(ae, iter(batches(dtype)), n_batches=3)
        return torch.tensor(list(found.values()), dtype=torch.float64)

    ae = _prepared(kind)
    report = accelerated(ae)
    found = judged(ae, torch.float32)
    with in_double():
        exact = judged(_prepared(kind).double(), torch.float64)
    eager = judged(_prepared(kind), torch.float32)
    assert len(found) == 8 and found[2] > 0
    # each beside its size
    runs = [{"all": run / exact} for run in (found, exact, eager)]
    assert_as_accurate(*runs)
    assert not report.dense


@pytest.mark.parametrize("normalize", [False, True], ids=["as it is", "normalised"])
def test_its_training_loop_is_the_same(normalize, tmp_path, capsys):
    """Several trainers on the same activations, with logging, checkpoints and scaling."""
    loop = library("dictionary_learning.training").trainSAE
    names = ("TopKTrainer", "BatchTopKTrainer", "JumpReluTrainer", "StandardTrainer")

    def run(make_one: Callable[[str], Any], dtype: torch.dtype, folder: Any) -> list[Any]:
        made: list[Any] = []

        def maker(name: str) -> Callable[..., Any]:
            def build(**settings: Any) -> Any:
                made.append(make_one(name))
                return made[-1]

            return build

        class Data(list):  # type: ignore[type-arg]
            config = {"dtype": str(dtype)}

        loop(
            Data(batches(dtype)),
            [{"trainer": maker(name)} for name in names],
            steps=STEPS,
            save_steps=[7],
            save_dir=str(folder),
            log_steps=3,
            verbose=True,
            device="cpu",
            normalize_activations=normalize,
            autocast_dtype=dtype,
        )
        return made

    reports: list[Report] = []

    def mine(name: str) -> Any:
        trainer = make(name)
        reports.append(accelerated(trainer, optimizer=True))
        return trainer

    def double(name: str) -> Any:
        trainer = make(name)
        trainer.ae.double()
        return trainer

    run(mine, torch.float32, tmp_path / "mine")
    run(make, torch.float32, tmp_path / "eager")
    with in_double():
        run(double, torch.float64, tmp_path / "exact")
    capsys.readouterr()
    assert not any(report.dense for report in reports)
    assert all(report.calls > STEPS for report in reports)
    for i, _ in enumerate(names):
        for file in ("ae.pt", "checkpoints/ae_7.pt"):
            mine_, exact, eager = (
                torch.load(tmp_path / run / f"trainer_{i}" / file)
                for run in ("mine", "exact", "eager")
            )
            assert_as_accurate(mine_, exact, eager)


# ---- the way back, and copies


@pytest.mark.parametrize("name", TRAINERS)
def test_everything_is_put_back(name):
    plain, trainer = make(name), make(name)
    parts = [trainer, trainer.ae, trainer.optimizer]
    before = snapshot(*parts)
    report = accelerate(trainer, optimizer=True)
    assert report.replaced and "encode" in vars(trainer.ae)
    report.restore()
    assert_same(before, snapshot(*parts))
    report.restore()
    with torch.random.fork_rng():
        wanted, found = (train(t, batches()) for t in (plain, trainer))
    for key, value in wanted.numbers.items():
        assert torch.equal(found.numbers[key], value), key
    assert report.calls == 0


@pytest.mark.parametrize("name", ["TopKTrainer", "JumpReluTrainer", "GatedSAETrainer"])
def test_a_block_ends_where_it_began(name):
    trainer = make(name)
    half = STEPS // 2
    with accelerated(trainer, optimizer=True) as report:
        begun = train(trainer, batches()[:half])
    assert report.calls == half and "loss" not in vars(trainer)
    ended = train(trainer, batches(), first=half)
    assert report.calls == half
    for p, q in zip(trainer.ae.parameters(), make(name).ae.parameters(), strict=True):
        moment = trainer.optimizer.state[p]["exp_avg"]
        assert p.stride() == moment.stride() == q.stride()
    losses = torch.cat([begun.numbers["losses"], ended.numbers["losses"]])
    found = Run(ended.numbers | {"losses": losses}, torch.cat([begun.counts, ended.counts]), [])
    assert_same_training(found, *unaccelerated(name))


# what torch itself copies: others have losses with a graph, or an optimiser that loses a list
@pytest.mark.parametrize("name", ["JumpReluTrainer", "StandardTrainerAprilUpdate"])
def test_a_copied_trainer_trains_by_itself(name):
    trainer = make(name)
    report = accelerated(trainer)
    begun = train(trainer, batches()[:5])
    other = copy.deepcopy(trainer)
    before = {key: t.clone() for key, t in trainer.ae.state_dict().items()}
    ended = train(other, batches(), first=5)
    for key, value in trainer.ae.state_dict().items():
        assert torch.equal(value, before[key]), key
    losses = torch.cat([begun.numbers["losses"], ended.numbers["losses"]])
    found = Run(ended.numbers | {"losses": losses}, torch.cat([begun.counts, ended.counts]), [])
    assert_same_training(found, *unaccelerated(name))
    assert report.calls == STEPS and not report.dense


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_a_copied_dictionary_is_its_own(kind):
    def gradients(ae: Any) -> dict[str, torch.Tensor]:
        ae(randn(N, D, seed=21)).square().sum().backward()
        return {n: p.grad for n, p in ae.named_parameters() if p.grad is not None}

    ae = _prepared(kind)
    report = accelerated(ae)
    other = copy.deepcopy(ae)
    found = gradients(other)
    assert report.calls == 1 and all(p.grad is None for p in ae.parameters())
    eager = gradients(_prepared(kind))
    for name, grad in gradients(ae).items():
        assert torch.equal(found[name], grad)
    report.restore()
    other.zero_grad()
    for name, grad in gradients(other).items():
        assert torch.equal(found[name], grad)
    assert found.keys() == eager.keys()


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_a_pickled_dictionary_is_plain_and_can_be_accelerated(kind):
    ae, x = _prepared(kind), randn(N, D, seed=21)
    report = accelerated(ae)
    calls = report.calls
    loaded = pickle.loads(pickle.dumps(ae))
    assert torch.equal(loaded(x), _prepared(kind)(x))
    assert report.calls == calls
    with accelerated(loaded) as again:
        loaded(x)
    assert again.calls and report.calls == calls


def test_one_object_is_accelerated_and_no_other():
    one, other = make("TopKTrainer"), make("TopKTrainer")
    reports = accelerate(one), accelerate(other)
    one.update(1, batches()[0])
    assert [report.calls for report in reports] == [1, 0]
    third = make("TopKTrainer")
    third.update(1, batches()[0])
    assert [report.calls for report in reports] == [1, 0]
    assert "encode" not in vars(third.ae)


# ---- Adam by rows


def test_adam_that_is_set_otherwise_later_is_torchs():
    """Weight decay, or a learning rate that is a tensor, set by somebody between two steps."""

    def each(step: int, trainer: Any) -> None:
        group = trainer.optimizer.param_groups[0]
        if step == 6:
            group["weight_decay"] = 0.1
        if step == 11:
            group["weight_decay"] = 0

    trainer, name = make("TopKTrainer"), "TopKTrainer"
    accelerated(trainer, optimizer=True)
    found = train(trainer, batches(), each=each)
    eager = train(make(name), batches(), each=each)
    assert_same_training(found, exactly(name, each=each), eager)
    # it does something
    plain = unaccelerated(name)[1]
    assert rms(plain.numbers["encoder.weight"] - eager.numbers["encoder.weight"]) > 1e-3


def test_adam_keeps_moments_that_torch_knows():
    trainer = make("TopKTrainer")
    report = accelerated(trainer, optimizer=True)
    train(trainer, batches()[:3])
    eager = make("TopKTrainer")
    train(eager, batches()[:3])
    mine, theirs = (t.optimizer.state_dict() for t in (trainer, eager))
    assert mine["param_groups"] == theirs["param_groups"]
    for i, state in theirs["state"].items():
        assert mine["state"][i].keys() == state.keys()
        assert torch.equal(mine["state"][i]["step"], state["step"])
    assert "Adam.step" in report.methods


# ---- what is refused


def _refused(obj: Any, *parts: Any, match: str, kind: type[Exception] = ValueError) -> None:
    before = snapshot(obj, *parts)
    for ask in (accelerate, check):
        with pytest.raises(kind, match=match):
            ask(obj)
    assert_same(before, snapshot(obj, *parts))


@pytest.mark.parametrize("method", ["loss", "get_auxiliary_loss", "update_threshold"])
def test_a_trainer_that_overrides_is_refused(method):
    kind = type(make("TopKTrainer"))
    own = type("Mine", (kind,), {method: lambda self, *args, **kwargs: 0, "__module__": __name__})
    trainer = own(**COMMON, k=K)
    _refused(trainer, trainer.ae, trainer.optimizer, match=rf"TopKTrainer\.{method} .*\.Mine")


@pytest.mark.parametrize("method", ["encode", "decode", "forward"])
@pytest.mark.parametrize("kind", DICTIONARIES)
def test_a_dictionary_that_overrides_is_refused(kind, method):
    ae = DICTIONARIES[kind]()
    ae.__class__ = type("Mine", (type(ae),), {method: lambda self, x: x, "__module__": __name__})
    _refused(ae, match=rf"{kind}\.{method} .*\.Mine")


def test_a_subclass_that_overrides_nothing_is_accelerated():
    kind = type(make("TopKTrainer"))
    trainer = type("Mine", (kind,), {"more": 1, "__module__": __name__})(**COMMON, k=K)
    with accelerate(trainer) as report:
        trainer.update(1, batches()[0])
    assert report.calls == 1 and not report.dense


def test_a_trainer_of_a_dictionary_that_overrides_is_refused():
    top_k = library("dictionary_learning.trainers.top_k")
    own = type("Mine", (top_k.AutoEncoderTopK,), {"encode": lambda self, x: x})
    own.__module__ = __name__
    trainer = top_k.TopKTrainer(**COMMON, k=K, dict_class=own)
    _refused(trainer, trainer.ae, match=r"AutoEncoderTopK\.encode .*\.Mine")


def test_other_classes_of_the_library_are_refused():
    module = library("dictionary_learning.dictionary")
    _refused(module.IdentityDict(D), match="IdentityDict is not supported", kind=TypeError)
    trainer = library("dictionary_learning.trainers.trainer").SAETrainer()
    trainer.ae, trainer.loss = make("TopKTrainer").ae, None
    _refused(trainer, trainer.ae, match="SAETrainer is not supported", kind=TypeError)


@pytest.mark.parametrize("name", TRAINERS)
def test_what_is_accelerated_already_is_refused(name):
    trainer = make(name)
    accelerate(trainer)
    _refused(trainer, trainer.ae, trainer.optimizer, match="accelerated already")
    _refused(trainer.ae, match="accelerated already")


def test_as_many_features_as_activations_are_refused():
    trainer = make("TopKTrainer", dict_size=D)
    _refused(trainer, trainer.ae, match="more features")


@pytest.mark.parametrize("name", TRAINERS)
def test_a_version_that_computes_otherwise_is_refused(name, monkeypatch):
    """Another activation function, in a release that is not known."""
    trainer = make(name)
    for function in ("relu", "ReLU"):
        monkeypatch.setattr(
            torch.nn.functional if function == "relu" else torch.nn,
            function,
            torch.nn.functional.softplus if function == "relu" else torch.nn.Softplus,
        )
    if name == "JumpReluTrainer":
        module = library("dictionary_learning.trainers.jumprelu")
        monkeypatch.setattr(module, "JumpReLUFunction", type("Own", (), {"apply": _softly}))
    _refused(trainer, trainer.ae, trainer.optimizer, match="is not known")


def _softly(x: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
    return x * torch.sigmoid((x - threshold) / bandwidth)
