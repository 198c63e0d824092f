# SPDX-License-Identifier: Apache-2.0
"""Any stream of tensors as a source: its rows in order, exact resume, bad items by number."""

import json

import numpy as np
import pytest
import torch

from mikernels.activations import IterableSource, SourceExhausted
from mikernels.activations.streams import as_source
from mikernels.nn import TopKSAE, Transcoder
from mikernels.training import TrainConfig, Trainer
from mikernels.values.batch import Batch

D = 6
X = torch.randn(300, D, generator=torch.Generator().manual_seed(0))
Y = X.tanh()[:, :4]


def generator(size=37):
    yield from X.split(size)


class Again:
    """Iterated anew each time."""

    def __init__(self, make=generator):
        self.make = make

    def __iter__(self):
        return self.make()


def train(source, total=400, batch_size=50):
    sae = TopKSAE(D, 24, 3, generator=torch.Generator().manual_seed(0))
    return Trainer(sae, source, TrainConfig(total, batch_size, log_every=1), quiet=True).run()


def test_rows_come_in_order_and_a_stream_that_starts_again_does():
    for stream in (list(generator()), Again(), torch.utils.data.DataLoader(X, batch_size=37)):
        source = IterableSource(stream, 70)
        assert source.d == source.d_out == D
        got = torch.cat([source.next_batch() for _ in range(9)])
        assert torch.equal(got, torch.cat([X, X, X])[:630])
    source = IterableSource(generator(), 70)
    assert torch.equal(torch.cat([source.next_batch() for _ in range(4)]), X[:280])
    with pytest.raises(SourceExhausted, match="stream is an iterator and has ended"):
        source.next_batch()


@pytest.mark.parametrize(
    "item",
    [
        lambda x, y: Batch(x, y, x[:, 0].abs()),
        lambda x, y: (x, y),
        lambda x, y: [x.double().numpy(), y.numpy()],
        lambda x, y: {"activations": x, "targets": y, "labels": torch.arange(len(x))},
    ],
)
def test_items_with_targets(item):
    source = IterableSource(
        [item(X[:100], Y[:100]), item(X[:0], Y[:0]), item(X[100:], Y[100:])], 80
    )
    assert (source.d, source.d_out) == (D, 4)
    batches = [source.next_batch() for _ in range(3)]
    assert torch.equal(torch.cat([b.input for b in batches]), X[:240])
    assert torch.equal(torch.cat([b.target for b in batches]), Y[:240])
    weighted = isinstance(item(X, Y), Batch)
    weights = [b.weights for b in batches]
    assert torch.equal(torch.cat(weights), X[:240, 0].abs()) if weighted else weights == [None] * 3
    sae = Transcoder(D, n_features=24, k=3, d_out=4)
    Trainer(sae, source, TrainConfig(240, 80), quiet=True).run()


def test_what_a_trainer_takes():
    whole = train(IterableSource(list(generator()))).column("loss")
    assert len(whole) == 8
    # the batch size is the trainer's, or the same; anything that gives the rows is a source
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=37)
    for source in (IterableSource(list(generator()), 50), Again(), loader, list(X.numpy()[None])):
        assert train(source).column("loss") == whole
    by_rows = [train(source).column("loss") for source in (X, X.numpy(), as_source(X))]
    assert by_rows[0] == by_rows[1] == by_rows[2] != whole
    with pytest.raises(ValueError, match="batch_size must be config.batch_size = 50, got 40; say"):
        train(IterableSource(Again(), 40))
    # every row once, where there are settings
    sae = TopKSAE(D, 24, 3)
    assert Trainer(sae, X, quiet=True).config.total_tokens == 300
    with pytest.raises(ValueError, match="config must be given for a IterableSource, which does"):
        Trainer(sae, Again(), quiet=True)


def test_an_iterator_ends_the_run_and_keeps_what_it_learned(capfd):
    history = train(generator())
    # 300 rows are six batches
    assert history.column("tokens")[-1] == 300
    assert "the source ended after 300 of 400 tokens" in capfd.readouterr().err
    assert history.column("loss")[:6] == train(Again()).column("loss")[:6]


def test_resume_reads_the_stream_again(tmp_path):
    for make, batches in ((lambda: IterableSource(Again(), 70), 9),
                          (lambda: IterableSource(generator(), 70), 4)):  # fmt: skip
        source = make()
        states = [json.loads(json.dumps(source.state_dict()))]
        expected = []
        for _ in range(batches):
            expected.append(source.next_batch())
            states.append(json.loads(json.dumps(source.state_dict())))
        for done in range(batches):
            source = make()
            source.load_state_dict(states[done])
            assert source.state_dict() == states[done]
            for batch in expected[done:]:
                assert torch.equal(source.next_batch(), batch)


def test_resume_refuses_what_is_not_the_same_stream():
    source = IterableSource(generator(), 70)
    source.next_batch()
    state = source.state_dict()
    source.next_batch()
    with pytest.raises(ValueError, match="iterated again to go back to item 1, got generator"):
        source.load_state_dict(state)
    other = IterableSource(Again(lambda: iter((X + 1).split(37))), 70)
    before = other.state_dict()
    with pytest.raises(ValueError, match="the same items in the same order to resume exactly, got"):
        other.load_state_dict(state)
    assert other.state_dict() == before
    assert torch.equal(other.next_batch(), X[:70] + 1)
    with pytest.raises(ValueError, match="saved position must be of the same data"):
        IterableSource([(X, Y)]).load_state_dict({**state, "identity": {"activations": 3}})
    with pytest.raises(ValueError, match="the saved position"):
        IterableSource(Again()).load_state_dict({"epoch": 1})


def test_what_a_stream_raises_is_passed_on_and_no_row_is_skipped():
    broken = [True]

    def raising():
        yield X[:37]
        if broken[0]:
            raise OSError("the disk went away")
        yield X[37:]

    source = IterableSource(Again(raising), 20)
    assert torch.equal(source.next_batch(), X[:20])
    for _ in range(2):
        with pytest.raises(OSError, match="went away"):
            source.next_batch()
    once = IterableSource(raising(), 37)
    once.next_batch()
    with pytest.raises(OSError, match="went away"):
        once.next_batch()
    with pytest.raises(ValueError, match="after it has raised, got generator; make it and the sou"):
        once.next_batch()
    broken[0] = False
    assert torch.equal(source.next_batch(), X[37:57])


@pytest.mark.parametrize(
    ("stream", "error", "message"),
    [
        ([], ValueError, "must give at least one tensor, got none"),
        (iter(()), ValueError, "must give at least one tensor, got none"),
        ({"activations": X}, TypeError, "give tensors .n, d. when it is iterated, got dict; pass"),
        (5, TypeError, "when it is iterated, got int; pass a list"),
        ([X[0]], ValueError, r"item 0 must have activations \[n, d\], got \[6\]; flatten"),
        ([X[None]], ValueError, r"item 0 must have activations \[n, d\], got \[1, 300, 6\]"),
        ([X[:, :0]], ValueError, r"item 0 must have activations \[n, d\], got \[300, 0\]"),
        ([X.long()], TypeError, "item 0 must have floating activations, got torch.int64; convert"),
        ([X, None], TypeError, "item 1 must be a tensor .*, got NoneType as its activations"),
        (["ab"], TypeError, "item 0 must be a tensor .*, got str as its activations; convert"),
        ([(X, Y, Y)], TypeError, "got tuple as its activations"),
        ([(X, Y[:3])], ValueError, r"item 0 must have 300 rows of targets .* got \[3, 4\]; give"),
        ([(X, Y[:, 0])], ValueError, r"item 0 must have targets \[n, d\], got \[300\]; flatten"),
        ([{"x": X}], ValueError, r"item 0 must have activations, got a dict of \['x'\]; name them"),
        ([X, X[:, :3]], ValueError, r"item 1 must have activations \[n, 6\] like item 0, got act"),
        ([X, (X, Y)], ValueError, r"item 1 must have .* got activations \[n, 6\], targets \[n, 4"),
        ([np.array(["a"])], TypeError, "item 0 must hold numbers that torch has, got <U1"),
    ],
)  # fmt: skip
def test_bad_items_are_named(stream, error, message):
    with pytest.raises(error, match=message):
        source = IterableSource(stream, 400)
        source.next_batch()
