# SPDX-License-Identifier: Apache-2.0
"""What a target makes of logits, and what it refuses before and after the model runs."""

import pytest
import torch
from decoder_cases import IDS, letters, tiny, words_tokenizer
from oracle import randn

from mikernels.circuits import gradient_components
from mikernels.circuits.targets import read_target, token_id, vocabulary
from mikernels.models.decoder import find_decoder

LOGITS = randn(3, 4, 50, dtype=torch.float64)
LAST = LOGITS[:, -1]


def of(target, kept=None, **options):
    return read_target("f", target, 3, 50, **options)(LOGITS, kept)


def lse(row, tokens):
    return LAST[row, tokens].exp().sum().log()


@pytest.mark.parametrize(
    "target, expected",
    [
        (7, lambda b: LAST[b, 7]),
        (torch.tensor(7), lambda b: LAST[b, 7]),
        (torch.tensor([7, 8, 9]), lambda b: LAST[b, 7 + b]),
        ([7, 8, 9], lambda b: LAST[b, 7 + b]),
        ((7, 8), lambda b: LAST[b, 7] - LAST[b, 8]),
        ([(7, 1), (8, 2), (9, 3)], lambda b: LAST[b, 7 + b] - LAST[b, 1 + b]),
        (torch.tensor([[7, 1], [8, 2], [9, 3]]), lambda b: LAST[b, 7 + b] - LAST[b, 1 + b]),
        ((torch.tensor([7, 8, 9]), 1), lambda b: LAST[b, 7 + b] - LAST[b, 1]),
        ({3, 4, 5}, lambda b: LAST[b].softmax(-1)[3:6].sum().log()),
        (({3, 4}, 9), lambda b: lse(b, [3, 4]) - LAST[b, 9]),
        ([{3}, {4, 5}, {6}], lambda b: lse(b, [[3], [4, 5], [6]][b]) - LAST[b].logsumexp(-1)),
        (lambda logits: logits[:, 0].mean(-1), lambda b: LOGITS[b, 0].mean()),
        (None, lambda b: LAST[b].max()),
        ("g", lambda b: LAST[b, 7]),
        (("g", 8), lambda b: LAST[b, 7] - LAST[b, 8]),
    ],
)
def test_what_a_target_is(target, expected):
    found = of(target, tokenizer=letters())
    torch.testing.assert_close(found, torch.stack([expected(b) for b in range(3)]))


def test_it_is_of_the_last_token_that_is_kept():
    kept = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 0]]) == 1
    assert of(7, kept).tolist() == [LOGITS[b, p, 7].item() for b, p in ((0, 1), (1, 3), (2, 2))]


def test_gradients_are_those_of_the_targets_number():
    model = tiny("gpt2")
    one, other = (gradient_components(model, IDS, t) for t in (torch.tensor([7, 7]), 11))
    pair = gradient_components(model, IDS, ("g", "k"), tokenizer=letters())
    own = gradient_components(model, IDS, lambda logits: logits[:, -1, 7] - logits[:, -1, 11])
    for name, grad in pair.items():
        torch.testing.assert_close(grad, one[name] - other[name])
        assert torch.equal(own[name], grad)


def test_a_text_must_be_one_token():
    class Pieces:
        """Words of at most four letters; a space before them belongs to them."""

        unk_token_id = None

        def __call__(self, text, **options):
            start = 4 + text.startswith(" ")
            pieces = [text[:start], text[start:]] if len(text) > start else [text]
            return {"input_ids": [sum(map(ord, piece)) for piece in pieces]}

        def decode(self, ids):
            return {ord("M") + 9: "?"}.get(ids[0], f"<{ids[0]}>")

    assert token_id("f", " Mary", Pieces()) == sum(map(ord, " Mary"))
    with pytest.raises(ValueError, match=r"f: target ' Marian' must be one token, got 2: '<\d+>' "):
        token_id("f", " Marian", Pieces())
    # what is one token nearby is named
    spaced = words_tokenizer(["Mary"])
    with pytest.raises(ValueError, match=r"target 'mary' .* got none: .*write ' Mary' or 'Mary'"):
        token_id("f", "mary", spaced)


@pytest.mark.parametrize(
    "target, message",
    [
        (50, r"in 0..49 \(vocabulary\), got 50"),
        ((1, 1), "a pair of different tokens, got 'a' on both sides"),
        (({1, 2}, {2, 3}), "different tokens, got 'b' on both sides"),
        (("a", 1), "got 'a' on both sides"),
        (set(), "a set of tokens, got an empty one"),
        ((set(), 3), "got an empty one"),
        ((1, 2, 3), "got a tuple of 3"),
        ([1, 2], r"one per prompt \(3\), got 2; a pair is a tuple"),
        ([1, (2, 3), 4], "of one form for all prompts"),
        (torch.zeros(3, 3, dtype=torch.int64), r"\[3, 2\], got torch.int64 \[3, 3\]"),
        (True, "got True"),
        (None, None),
    ],
)
def test_bad_targets_are_refused_before_the_model_runs(target, message):
    if message is None:
        with pytest.raises(TypeError, match="target 'a' must be a token id without a tokenizer"):
            read_target("f", "a", 3, 50)
        return
    with pytest.raises(ValueError, match=f"f: target must be .*{message}"):
        read_target("f", target, 3, 50, letters())


@pytest.mark.parametrize(
    "metric, message",
    [
        (lambda logits: logits.mean(), r"return a scalar for each prompt, \[3\], .* got \[\]"),
        (lambda logits: logits[:, -1], r".* got \[3, 50\]"),
        (lambda logits: 1.0, ".* got float"),
        (lambda logits: logits[:, -1, 0] / 0, "return finite numbers"),
        (lambda logits: logits[:, -1].argmax(-1), "return finite numbers, got torch.int64"),
        (lambda logits: logits.detach()[:, -1, 0], "depend on the logits"),
    ],
)
def test_a_callable_must_give_a_number_for_each_prompt(metric, message):
    metric.__name__ = "my_metric"
    with pytest.raises(ValueError, match=f"f: target my_metric must {message}"):
        read_target("f", metric, 3)(LOGITS.clone().requires_grad_(), None)


def test_the_vocabulary_is_that_of_the_logits():
    model = tiny("llama")
    assert vocabulary(find_decoder(model, "f", "")) == 50
    model.lm_head = torch.nn.Linear(24, 60, bias=False)
    assert vocabulary(find_decoder(model, "f", "")) == 60
