# SPDX-License-Identifier: Apache-2.0
"""The fused step as a CUDA graph, as far as that shows without CUDA: no synchronisation, when it
is recorded and when it runs eagerly, bad settings. Recording itself: tests/device/test_step.py."""

from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import identical, num_threads, randn
from torch.utils._python_dispatch import TorchDispatchMode

from mikernels.activations import TensorSource
from mikernels.nn import (
    BatchTopKSAE,
    Crosscoder,
    CrossLayerTranscoder,
    GatedSAE,
    JumpReLUSAE,
    LISTAMatryoshkaSAE,
    MatryoshkaSAE,
    ReLUSAE,
    SkipTranscoder,
    TopKSAE,
)
from mikernels.optim import RowAdam
from mikernels.training import TrainConfig, Trainer
from mikernels.training.optimizer import set_rate
from mikernels.training.state.metrics import Clock, History, Means
from mikernels.training.steps import graph
from mikernels.training.steps.fused import FusedStep
from mikernels.training.steps.graph import GraphedStep
from mikernels.values.batch import Batch

D, F, K, BATCH = 16, 96, 4, 32
NONE = torch.empty(0, dtype=torch.int64)
# what reads a device back, or gives a shape that depends on data
READS = {
    *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "bincount", "equal"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
    # and what is made of Python numbers, whose copy to a device is waited for
    "lift_fresh",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with num_threads(1):
        yield


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = kwargs.get("output_size") is not None
        assert known or func.overloadpacket.__name__ not in READS, f"{func} reads a device back"
        return func(*args, **kwargs)


def make_sae(**settings) -> TopKSAE:
    settings = {"dead_after": 10**6, "k_aux": 5, **settings}
    return TopKSAE(D, F, K, generator=torch.Generator().manual_seed(0), **settings)


def config(**settings) -> TrainConfig:
    return TrainConfig(**{"total_tokens": 10 * BATCH, "batch_size": BATCH, "lr": 3e-3, **settings})


def clock() -> Clock:
    return Clock(History().parts)


def batches(seed: int, count: int = 1, size: int = BATCH) -> list[Batch]:
    return [Batch(randn(size, D, seed=100 * seed + i) + 1) for i in range(count)]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["mse", "fvu"])
def test_a_fused_step_reads_nothing_back(loss, dtype, capturable) -> None:
    step = FusedStep(make_sae(loss=loss, dtype=dtype), config(cuda_graph=capturable))
    means = Means()
    with NoReads():
        with pytest.raises(AssertionError, match="reads a device back"):
            torch.ones(()).item()
        for number in range(3):
            set_rate(step.optimizer, 1e-3)
            step(batches(number, 2), K, NONE, means, clock())
    assert means.tokens == 6 * BATCH


VARIANTS = {
    "batch_topk": lambda: BatchTopKSAE(D, F, K),
    "matryoshka": lambda: MatryoshkaSAE(D, F, K, by_frequency=True),
    "lista_matryoshka": lambda: LISTAMatryoshkaSAE(D, F, K),
    "skip_transcoder": lambda: SkipTranscoder(D, F, K, d_out=D),
    "crosscoder": lambda: Crosscoder(D, F, K, n_layers=2),
    "cross_layer_transcoder": lambda: CrossLayerTranscoder(D, F, K, n_layers=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_fused_step_of_a_variant_runs_where_nothing_can_be_read(name) -> None:
    """On the CPU, ragged codes' offsets are read once; a meta tensor has nothing to read."""
    sae = VARIANTS[name]().to("meta")
    step = FusedStep(sae, config(cuda_graph=True))
    given = [Batch(batch.input, batch.input + 1) for batch in batches(0, 2)]
    given = [batch.map(lambda t: t.to("meta")) for batch in given]
    if not sae.needs_target:
        given = [Batch(batch.input) for batch in given]
    for _ in range(2):
        with NoReads():
            step(given, sae.k, NONE.to("meta"), Means(), clock())
    assert all(state["step"].is_meta for state in step.optimizer.state.values())


def test_what_decides_its_own_shapes_is_not_recorded() -> None:
    source = TensorSource(batches(0, 1)[0].input, BATCH)
    for sae in (JumpReLUSAE(D, F, target_l0=K), GatedSAE(D, F), ReLUSAE(D, F)):
        with pytest.raises(ValueError, match=f"cuda_graph must be False for {sae.name}, whose"):
            Trainer(sae, source, config(cuda_graph=True), quiet=True)


def test_a_fused_step_runs_where_nothing_can_be_read() -> None:
    step = FusedStep(make_sae().to("meta"), config(cuda_graph=True))
    inputs = [Batch(batch.input.to("meta")) for batch in batches(0, 2)]
    for _ in range(2):
        step(inputs, K, NONE.to("meta"), Means(), clock())
    assert all(state["step"].is_meta for state in step.optimizer.state.values())


@pytest.fixture
def recorded(monkeypatch) -> list[int]:
    """Recording without CUDA: replaying is running again. Counts recordings and replays."""
    counts = [0, 0]

    def record(self: GraphedStep, work: Callable[[], None]) -> Callable[[], None]:
        counts[0] += 1

        def replay() -> None:
            counts[1] += 1
            work()

        return replay

    monkeypatch.setattr(graph, "check_device", lambda device: None)
    monkeypatch.setattr(GraphedStep, "_record", record)
    return counts


def test_what_is_recorded_and_what_runs_eagerly(recorded) -> None:
    settings = config(cuda_graph=True)
    eager, graphed = FusedStep(make_sae(), settings), FusedStep(make_sae(), settings)
    step = GraphedStep(graphed)
    sums = Means(), Means()
    dead = torch.tensor([3, 7])

    def run(seed, *, k=K, size=BATCH, count=1, dead=NONE) -> list[int]:
        recorded[:] = [0, 0]
        for one, means in ((eager, sums[0]), (step, sums[1])):
            set_rate(one.optimizer, 1e-3 / (seed + 1))
            one(batches(seed, count, size), k, dead, means, clock())
        pairs = zip(eager.sae.state_dict().values(), graphed.sae.state_dict().values(), strict=True)
        assert all(identical(a, b) for a, b in pairs)
        assert sums[0].read() == sums[1].read() and sums[0].tokens == sums[1].tokens
        return recorded

    assert run(0) == [0, 0]
    assert run(1) == [1, 1]
    assert run(2) == [0, 1]
    assert run(3, dead=dead) == [0, 0]
    assert run(4) == [0, 1]
    # another shape, k, number of micro-batches: eagerly once, then recorded
    for other in ({"size": BATCH // 2}, {"k": K + 1}, {"count": 2}):
        assert run(5, **other) == [0, 0]
        assert run(6, **other) == [1, 1]
        assert run(7, **other) == [0, 1]
    for one in (eager, graphed):
        one.optimizer.load_state_dict(one.optimizer.state_dict())
    assert run(8, count=2) == [0, 0]
    assert run(9, count=2) == [1, 1]
    for one in (eager, graphed):
        one.optimizer.clip_norm = 0.1
    assert run(10, count=2) == [0, 0]


def test_batches_are_copied_to_buffers_that_stay(recorded) -> None:
    step = GraphedStep(FusedStep(make_sae(), config(cuda_graph=True)))
    for number in range(3):
        (batch,) = batches(number)
        step([batch], K, NONE, Means(), clock())
        batch.input.fill_(torch.nan)
        buffer = step._inputs[0].input.data_ptr()
    assert step._inputs[0].input.data_ptr() == buffer and step._inputs[0].input.isfinite().all()


@pytest.mark.parametrize("dead_after", [10**6, 3 * BATCH])
def test_a_trainer_with_a_graph_computes_the_same(recorded, dead_after) -> None:
    runs = []
    for cuda_graph in (False, True):
        sae = make_sae(dead_after=dead_after)
        settings = config(cuda_graph=cuda_graph, decay="cosine", log_every=3)
        source = TensorSource(batches(0, size=10 * BATCH)[0].input, BATCH, seed=0)
        trainer = Trainer(sae, source, settings, quiet=True)
        rows = trainer.run().rows
        times = ("tokens_per_second", "waiting_seconds", "step_ms")
        runs.append([{n: v for n, v in row.items() if n not in times} for row in rows])
        runs[-1].extend(sae.state_dict().values())
        runs[-1].extend(trainer.optimizer.state_dict()["state"][0].values())
    assert recorded[0] == 1 and recorded[1] >= 1
    for plain, replayed in zip(*runs, strict=True):
        same = identical if isinstance(plain, torch.Tensor) else (lambda a, b: a == b)
        assert same(plain, replayed)


def test_a_run_is_resumed_with_or_without_a_graph(recorded, tmp_path) -> None:
    def trainer(cuda_graph: bool, tokens: int, folder) -> Trainer:
        settings = config(cuda_graph=cuda_graph, total_tokens=tokens)
        source = TensorSource(batches(0, size=10 * BATCH)[0].input, BATCH, seed=0)
        return Trainer(make_sae(), source, settings, quiet=True, out_dir=folder)

    whole = trainer(False, 10 * BATCH, tmp_path / "whole")
    whole.run()
    for first in (False, True):
        folder = tmp_path / str(first)
        trainer(first, 4 * BATCH, folder).run()
        second = trainer(not first, 10 * BATCH, folder)
        assert second.resume() == 4
        second.run()
        pairs = zip(whole.sae.parameters(), second.sae.parameters(), strict=True)
        assert all(identical(a, b) for a, b in pairs)


def test_bad_settings_are_refused() -> None:
    source = TensorSource(batches(0)[0].input, BATCH)
    with pytest.raises(ValueError, match=r"cuda_graph needs a CUDA device, got cpu; move the SAE"):
        Trainer(make_sae(), source, config(cuda_graph=True), quiet=True)
    with pytest.raises(ValueError, match="cuda_graph needs step='fused', got 'dense'"):
        config(cuda_graph=True, step="dense")
    with pytest.raises(ValueError, match="cuda_graph must be one of"):
        config(cuda_graph="yes")


def test_an_optimizer_that_is_not_capturable_is_refused(recorded) -> None:
    sae = make_sae()
    step = FusedStep(sae, config(cuda_graph=True), RowAdam(sae.parameters()))
    with pytest.raises(ValueError, match=r"needs a RowAdam\(..., capturable=True\)"):
        GraphedStep(step)
