# SPDX-License-Identifier: Apache-2.0
"""Several places of a model in one forward pass, and targets beside activations: each is what a
hook by hand sees, rows stay together, and what is not what it is called is refused."""

import json

import pytest
import torch
from decoder_cases import IDS, Characters, hooks_of, tiny
from oracle import identical
from safetensors.torch import save_file

from mikernels.activations import (
    ModelSource,
    ShardSource,
    Site,
    SourceExhausted,
    TensorSource,
    write_shards,
)
from mikernels.models.sites import PLACES, Recorder, read_sites
from mikernels.nn import TopKSAE
from mikernels.training import TrainConfig, Trainer
from mikernels.values.batch import Batch

TEXTS = ["the quick brown fox jumps over the lazy dog. " * 8, "second document\n" * 12]
D = 24
# in each block: the MLP, and what adds to the residual stream for attention and MLP
KINDS = {
    "llama": ("mlp", "self_attn", "mlp"),
    "gpt2": ("mlp", "attn", "mlp"),
    "gpt_neox": ("mlp", "attention", "mlp"),
    "gemma2": ("mlp", "post_attention_layernorm", "post_feedforward_layernorm"),
    "opt": ("fc1", "self_attn", "fc2"),
}


def made(kind, dtype=torch.float32):
    options = {"ffn_dim": 40, "word_embed_proj_dim": 24} if kind == "opt" else {}
    return tiny(kind, dtype, **options)


def blocks_of(model):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


def model_source(layer, model=None, batch_size=40, texts=TEXTS, **options):
    options = {"context": 32, "buffer_rows": 100, "windows_per_forward": 3} | options
    model = made("llama") if model is None else model
    return ModelSource(model, Characters(), layer, texts, batch_size, **options)


def by_hand(kind, model, ids):
    """Site -> what hooks on the modules of Hugging Face see, and the hidden states."""
    reader, attention, mlp = KINDS[kind]
    seen, handles = {}, []

    def after(module, name):
        def hook(module, args, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).clone()

        handles.append(module.register_forward_hook(hook))

    def before(module, name):
        def hook(module, args):
            seen[name] = args[0].clone()

        handles.append(module.register_forward_pre_hook(hook))

    for layer, block in enumerate(blocks_of(model)):
        before(getattr(block, reader), f"{layer}.mlp_in")
        after(getattr(block, attention), f"{layer}.attn_out")
        after(getattr(block, mlp), f"{layer}.mlp_out")
        after(block, f"{layer}.residual")
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for handle in handles:
        handle.remove()
    return {name: x.view(*ids.shape, -1) for name, x in seen.items()}, hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_site_is_what_a_hook_by_hand_sees(kind, dtype):
    model = made(kind, dtype)
    expected, hidden = by_hand(kind, model, IDS)
    hooks = hooks_of(model)  # transformers keeps its own
    names = [f"{layer}.{place}" for layer in range(3) for place in PLACES]
    together = Recorder(model, read_sites("test", "layer", names), "test").record(IDS, check=True)
    assert list(together) == names
    for name in names:
        alone = Recorder(model, read_sites("test", "layer", name), "test").record(IDS)
        assert identical(together[name], expected[name]), name
        assert identical(alone[name], expected[name]), name
    for layer in (0, 1):  # after the last, transformers shows what the final norm made of it
        assert identical(together[f"{layer}.residual"], hidden[layer + 1])
    assert hooks_of(model) == hooks


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sites_of_a_sequential_block_add_up(kind):
    """A test that is not made of the hooks: the stream by layer, and its differences."""
    model = made(kind, torch.float64)
    _, hidden = by_hand(kind, model, IDS)
    names = ["1.attn_out", "1.mlp_out"]
    found = Recorder(model, read_sites("test", "layer", names), "test").record(IDS)
    rest = hidden[2] - hidden[1] - found["1.attn_out"]
    torch.testing.assert_close(found["1.mlp_out"], rest, rtol=1e-11, atol=1e-12)
    assert rest.abs().max() > 0.1


def rows_of(source):
    parts = list(source.read())
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_several_layers_are_joined_in_the_order_given():
    model = made("gpt2")
    joined = model_source([2, 0, Site(1, "mlp_out")], model)
    assert joined.sites == ("2.residual", "0.residual", "1.mlp_out")
    assert (joined.n_layers, joined.d, joined.d_out) == (3, 3 * D, 3 * D)
    rows = rows_of(joined)
    for at, site in enumerate((2, 0, "1.mlp_out")):
        alone = rows_of(model_source(site, model))
        assert identical(rows["activations"][:, at * D : (at + 1) * D], alone["activations"])
        assert identical(rows["token_ids"], alone["token_ids"])
    windows = list(joined.token_windows())
    with torch.no_grad():
        hidden = model(torch.stack(windows[:3]), output_hidden_states=True).hidden_states
    first = rows["windows"] < 3
    place = rows["windows"][first], rows["positions"][first]
    assert identical(rows["activations"][first, D : 2 * D], hidden[1][place])


@pytest.mark.parametrize("kind", KINDS)
def test_targets_stay_with_their_inputs_when_rows_are_shuffled(kind):
    model = made(kind)
    source = model_source("1.mlp_in", model, target=["1.mlp_out", "2.mlp_out"], outlier_norm=None)
    assert (source.d, source.d_out, source.n_layers) == (D, 2 * D, 1)
    assert source.target_sites == ("1.mlp_out", "2.mlp_out")
    windows = list(source.token_windows())
    for _ in range(4):
        rows = source.next_rows()
        assert rows["activations"].shape == (40, D) and rows["targets"].shape == (40, 2 * D)
        for i in range(0, 40, 13):
            window, position = int(rows["windows"][i]), int(rows["positions"][i])
            assert rows["token_ids"][i] == windows[window][position]
            # the windows that were read at once, since rounding depends on their number
            start = window - (window % 3)
            held = [w for w in windows[start : start + 3] if len(w) == len(windows[window])]
            expected, _ = by_hand(kind, model, torch.stack(held))
            at = window - start, position
            torch.testing.assert_close(rows["activations"][i], expected["1.mlp_in"][at])
            both = torch.cat([expected[f"{layer}.mlp_out"][at] for layer in (1, 2)])
            torch.testing.assert_close(rows["targets"][i], both)


def test_what_a_batch_is():
    model = made("llama")
    plain = model_source(1, model)
    assert isinstance(plain.next_batch(), torch.Tensor) and plain.d_out == plain.d == D
    for one in ("1.residual", [1], Site(1)):
        assert identical(model_source(one, model).next_batch(), model_source(1, model).next_batch())
        assert model_source(one, model).state_dict() == model_source(1, model).state_dict()
    batch = model_source([0, 1], model).next_batch()
    assert isinstance(batch, Batch) and batch.input.shape == (40, 2 * D) and batch.target is None
    batch = model_source(0, model, target=2).next_batch()
    assert batch.input.shape == batch.target.shape == (40, D)
    assert identical(batch.input, model_source(0, model).next_batch())
    assert identical(batch.target, model_source(2, model).next_batch())


def test_positions_of_one_layer_are_saved_as_ever():
    assert model_source(1).state_dict()["identity"] == {
        "source": "ModelSource", "seed": 0, "d": D, "layer": 1, "context": 32,
        "windows_per_block": 3, "max_tokens": None,
    }  # fmt: skip
    named = model_source("model.layers.1.mlp").state_dict()["identity"]
    assert named["layer"] == "model.layers.1.mlp"


CLT = {"layer": ["0.mlp_in", "1.mlp_in"], "target": ["0.mlp_out", "1.mlp_out"]}


def test_sources_with_targets_resume_exactly():
    model = made("llama")

    def make():
        return model_source(model=model, **CLT)

    whole = make()
    expected = [whole.next_batch() for _ in range(16)]
    for done in (0, 4, 14):  # at the start, inside of a block, in the second epoch
        first = make()
        for _ in range(done):
            first.next_batch()
        second = make()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for batch in expected[done:]:
            found = second.next_batch()
            assert identical(found.input, batch.input) and identical(found.target, batch.target)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"layer": ["1.mlp_in", "0.mlp_in"], "target": CLT["target"]}, "layer"),
        ({"layer": CLT["layer"], "target": ["1.mlp_out", "0.mlp_out"]}, "target"),
        ({"layer": CLT["layer"]}, "(target|d_out)"),
    ],
)
def test_positions_of_other_sites_are_refused(other, name):
    state = model_source(**CLT).state_dict()
    with pytest.raises(ValueError, match=f"must be of the same data, got {name} "):
        model_source(**other).load_state_dict(state)


class Marked(torch.nn.Module):
    """Changes what a module returns for one token id."""

    def __init__(self, module, token, change):
        super().__init__()
        self.module, self.token, self.change, self.tokens = module, token, change, None

    def forward(self, *args, **kwargs):
        output = self.module(*args, **kwargs)
        bad = (self.tokens == self.token)[..., None]
        return torch.where(bad, self.change(output), output)


def marked(changes):
    """A model of which MLP `layer` changes what it returns for the letter `changes[layer]`."""
    model = made("llama")
    parts = []
    for layer, (letter, change) in changes.items():
        block = blocks_of(model)[layer]
        block.mlp = Marked(block.mlp, 1 + ord(letter) % 90, change)
        parts.append(block.mlp)

    def tell(module, args, kwargs):
        for part in parts:
            part.tokens = kwargs["input_ids"]

    model.register_forward_pre_hook(tell, with_kwargs=True)
    return model


@pytest.mark.filterwarnings("ignore:ModelSource")
def test_tokens_are_dropped_at_all_sites_where_one_says_so():
    letters = {letter: 1 + ord(letter) % 90 for letter in "qj"}
    # at layer 1 a norm that is too large for its window, at layer 2 NaN
    changes = {1: ("q", lambda x: 1e4 * x), 2: ("j", lambda x: x * torch.nan)}
    options = {"max_nonfinite": 0.2, "texts": [TEXTS[0] * 2], "outlier_norm": 100.0}
    sites = {"layer": ["0.mlp_in", "1.mlp_out"], "target": "2.mlp_out"}
    source = model_source(model=marked(changes), **sites, **options)
    rows = rows_of(source)
    plain = rows_of(model_source(0, made("llama"), outlier_norm=None, texts=options["texts"]))
    kept = ~torch.isin(plain["token_ids"], torch.tensor(list(letters.values())))
    assert 0 < (~kept).sum() < len(kept) / 5
    for name in ("token_ids", "windows", "positions"):
        assert torch.equal(rows[name], plain[name][kept])
    assert len(rows["activations"]) == len(rows["targets"]) == int(kept.sum())
    assert rows["activations"].isfinite().all() and rows["targets"].isfinite().all()
    counts = {letter: int((plain["token_ids"] == i).sum()) for letter, i in letters.items()}
    assert source.dropped["nonfinite"] == counts["j"] > 0
    assert source.dropped["outlier"] == counts["q"] > 0
    assert source.read_tokens == len(rows["token_ids"]) + sum(source.dropped.values())
    # of the sites, none but the target has NaN
    assert (
        rows_of(model_source("1.mlp_out", marked(changes), **options))["token_ids"].shape[0]
        == len(kept) - counts["q"]
    )


def test_a_site_that_is_not_finite_is_named():
    model = marked({2: ("q", lambda x: x * torch.nan)})
    sites = {"layer": "1.mlp_in", "target": "2.mlp_out", "model": model}
    said = r"NaN or inf at a site in \d+ of \d+ tokens \(first in window 0, .*, at 2.mlp_out\)"
    with pytest.warns(RuntimeWarning, match=said):
        model_source(**sites, max_nonfinite=0.5).next_batch()
    with pytest.raises(ValueError, match=f"finite in all but 1.000% of tokens .* got {said}"):
        model_source(**sites).next_batch()


def test_one_pass_reaches_all_sites_and_nothing_behind():
    model = made("llama")
    source = model_source(["0.mlp_in", "1.attn_out"], model, target="0.mlp_out", texts=TEXTS)
    source.next_batch()  # what is checked in the first windows is behind
    ran = []
    blocks = blocks_of(model)
    for name, module in (("embed", model.model.embed_tokens), ("mlp 1", blocks[1].mlp),
                         ("block 2", blocks[2]), ("head", model.lm_head)):  # fmt: skip
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    read = source.read_tokens
    list(source.read())
    assert ran and set(ran) == {"embed"}
    assert source.read_tokens > read
    hooks = hooks_of(model)
    source.next_batch()
    assert hooks_of(model) == hooks == 4


def test_what_the_model_changes_in_place_is_recorded_as_it_was():
    model = made("llama")
    names = ["1.mlp_in", "2.residual"]
    expected = Recorder(model, read_sites("test", "layer", names), "test").record(IDS)
    mlp = blocks_of(model)[1].mlp
    inner = mlp.forward

    def forward(x):
        output = inner(x)
        x.mul_(3)
        return output

    mlp.forward = forward
    found = Recorder(model, read_sites("test", "layer", names), "test").record(IDS)
    assert all(identical(found[name], expected[name]) for name in names)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("site", ["1.mlp_out", "1.attn_out"])
def test_a_stream_that_gets_something_else_is_refused_with_the_numbers(kind, site):
    model = made(kind)

    def steer(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        first = first + 0.01
        return (first, *output[1:]) if isinstance(output, tuple) else first

    steered = blocks_of(model)[1].register_forward_hook(steer)
    said = (
        r"^ModelSource: .*: block 1 must return input \+ attention \+ mlp: got .*, expected .* "
        r"within .* at \[0, 0, \d+\].*; remove what changes it, or pass the module's name as layer$"
    )
    with pytest.raises(ValueError, match=said):
        model_source(site, model)
    # what nothing is claimed about
    for other in ("1.mlp_in", "0.mlp_out", 1):
        assert model_source(other, model).d == D
    steered.remove()
    assert model_source(site, model).d == D


def test_a_model_with_a_factor_on_what_is_added_is_refused():
    model = tiny("granite", torch.float32, residual_multiplier=0.5)
    with pytest.raises(ValueError, match=r"block 0 must return input \+ attention \+ mlp: got"):
        model_source("0.mlp_out", model)
    assert model_source("model.layers.0.mlp", model).d == D


def test_the_first_windows_are_checked_and_not_only_a_token():
    model = made("llama")

    def steer(module, args, output):
        return output + 0.01 if output.shape[1] > 1 else output

    blocks_of(model)[1].register_forward_hook(steer)
    source = model_source("1.mlp_in", model, target="1.mlp_out")
    with pytest.raises(ValueError, match=r"block 1 must return input \+ attention \+ mlp: got"):
        source.next_batch()
    assert source.read_tokens == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_not_refused(kind, dtype):
    if kind == "gemma2" and dtype == torch.float64:
        pytest.skip("its own attention has no double precision")
    model = made(kind, dtype)
    assert len(rows_of(model_source("1.mlp_in", model, target="1.mlp_out"))["targets"])


def test_sites_in_inference_mode():
    model = made("llama")
    expected = model_source(**CLT, model=model).next_batch()
    with torch.inference_mode():
        found = model_source(**CLT, model=model).next_batch()
        assert torch.equal(found.target, expected.target)


def test_sites_of_compiled_models():
    torch.compiler.reset()
    expected = model_source(**CLT).next_batch()
    found = model_source(**CLT, model=torch.compile(made("llama"), backend="eager")).next_batch()
    assert torch.equal(found.input, expected.input)
    assert torch.equal(found.target, expected.target)


def twice():
    model = made("llama")
    mlp = blocks_of(model)[1].mlp
    inner = mlp.forward
    mlp.act_fn.register_forward_hook(lambda *_: None)
    mlp.forward = lambda x: inner(x) + 0 * mlp.down_proj(mlp.act_fn(mlp.up_proj(x)))
    return model


@pytest.mark.parametrize(
    ("layer", "options", "error", "said"),
    [
        ([], {}, ValueError, r"layer must name at least one site, and each once, got \[\]"),
        (0, {"target": []}, ValueError, "target must name at least one site"),
        ([0, "0.residual"], {}, ValueError, "each once, got .'0.residual', '0.residual'"),
        (1.5, {}, TypeError, "layer must be a layer's number, a Site or .*, got 1.5"),
        ([[0], [1]], {}, TypeError, r"a list of these, got \[0\]"),
        ("3.mlp_out", {}, IndexError, r"layer must be in 0..2 \(3 decoder layers\), got 3"),
        ([0, -1], {}, IndexError, r"layer must be in 0..2 \(3 decoder layers\), got -1"),
        ("1.mlp_output", {}, AttributeError, r"NUMBER.PLACE with one of .*got '1.mlp_output'"),
        (0, {"target": "wrong"}, AttributeError, "a submodule's name, got 'wrong'"),
        (
            [0, "model.layers.0.mlp.up_proj"], {}, ValueError,
            r"layer must be sites of one width.*got .*'0.residual': 24, .*up_proj': 40",
        ),
        (
            0, {"target": ["model.layers.0.mlp.up_proj", "0.mlp_out"]}, ValueError,
            "target must be sites of one width",
        ),
    ],
)  # fmt: skip
def test_sites_that_are_none_are_refused(layer, options, error, said):
    with pytest.raises(error, match=f"^ModelSource: .*{said}"):
        model_source(layer, **options)


def test_modules_that_give_other_shapes_are_refused():
    model = tiny("mixtral", torch.float32, num_key_value_heads=2, num_local_experts=4)
    said = r"layer 'model.layers.0.mlp.experts' must give \[1, 1, 24\] \(windows, tokens, d\), got"
    with pytest.raises(ValueError, match=f"^ModelSource: {said} "):
        model_source([0, "model.layers.0.mlp.experts"], model)
    assert model_source("1.mlp_in", model, target="1.mlp_out").d_out == D


def test_a_site_that_runs_never_or_twice_is_refused_before_it_is_read():
    model = made("llama")
    model.spare = torch.nn.Linear(D, D)
    with pytest.raises(ValueError, match="got 'spare', whose hooks never fire"):
        model_source([0, "spare"], model)
    model = twice()
    name = "model.layers.1.mlp.down_proj"
    with pytest.raises(ValueError, match=f"reaches once, got '{name}', which it reaches again"):
        model_source([0, name], model)
    assert hooks_of(model) == 1
    # the first of them, as ever
    assert model_source(name, model).d == D


def test_site_refuses_other_places():
    assert str(Site(14, "mlp_out")) == "14.mlp_out" and Site(3) == Site(3, "residual")
    with pytest.raises(ValueError, match="place must be one of .*got 'mlp'"):
        Site(3, "mlp")


def test_an_iterator_of_texts_ends_with_targets_too():
    source = model_source(**CLT, texts=iter(TEXTS))
    with pytest.raises(SourceExhausted, match="has ended"):
        for _ in range(100):
            source.next_batch()


def numbered(n, d):
    """Rows that say their own number in every column."""
    return torch.arange(n, dtype=torch.float32)[:, None].expand(n, d).contiguous()


def check_rows(source, n, d, d_out):
    """Every row once an epoch, with its own target and label."""
    assert (source.d, source.d_out) == (d, d_out)
    seen = []
    for _ in range(n // source.batch_size):
        batch = source.next_batch()
        assert batch.input.shape[1] == d and batch.target.shape[1] == d_out
        assert torch.equal(batch.target[:, 0], batch.input[:, 0] + 0.5)
        seen.append(batch.input[:, 0])
    assert torch.cat(seen).sort().values.tolist() == list(range(n))
    rows = source.next_rows()
    assert torch.equal(rows["targets"][:, 1], rows["activations"][:, 0] + 0.5)
    assert torch.equal(rows["labels"], rows["activations"][:, 0].long())


def with_targets(n=1000, d=6, d_out=4):
    x = numbered(n, d)
    return {"activations": x, "targets": numbered(n, d_out) + 0.5, "labels": x[:, 0].long()}


def test_tensor_source_has_targets():
    rows = with_targets()
    source = TensorSource(rows["activations"], 50, target=rows["targets"], labels=rows["labels"])
    check_rows(source, 1000, 6, 4)
    state = source.state_dict()
    with pytest.raises(ValueError, match="must be of the same data, got d_out 4, expected None"):
        TensorSource(rows["activations"], 50, labels=rows["labels"]).load_state_dict(state)
    plain = TensorSource(rows["activations"], 50, targets=rows["labels"])
    assert isinstance(plain.next_batch(), torch.Tensor)
    assert plain.state_dict()["identity"] == {
        "source": "TensorSource", "seed": 0, "shape": [1000, 6],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "error", "said"),
    [
        (torch.zeros(3, 4), ValueError, "targets must have 5 rows like tensor, got 3"),
        (torch.zeros(5), ValueError, r"target must be \[rows, d\], got \[5\]"),
        (torch.zeros(5, 2, dtype=torch.int64), TypeError, "target must be floating, got"),
        (torch.zeros(5, 0), ValueError, "target must hold at least one row and column"),
    ],
)
def test_tensor_source_refuses_bad_targets(target, error, said):
    with pytest.raises(error, match=f"TensorSource: {said}"):
        TensorSource(torch.ones(5, 3), 2, target=target)
    with pytest.raises(TypeError, match="got targets beside it"):
        TensorSource(torch.ones(5, 3), 2, target=torch.ones(5, 3), targets=torch.ones(5))


@pytest.mark.parametrize("window_rows", [None, 256])
def test_shards_hold_targets(tmp_path, window_rows):
    rows = with_targets()
    parts = ({name: t[i : i + 70] for name, t in rows.items()} for i in range(0, 1000, 70))
    write_shards(tmp_path, parts, rows_per_shard=384)
    check_rows(ShardSource(tmp_path, 50, window_rows=window_rows), 1000, 6, 4)
    source = ShardSource(tmp_path, 50, window_rows=window_rows)
    for _ in range(7):
        source.next_batch()
    twin = ShardSource(tmp_path, 50, window_rows=window_rows)
    twin.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert identical(source.next_batch().target, twin.next_batch().target)


def test_shards_are_read_without_their_targets_or_the_other_way_round(tmp_path):
    rows = with_targets()
    rows["other"] = rows["targets"] + 1
    write_shards(tmp_path, [rows])
    plain = ShardSource(tmp_path, 50, target=None)
    assert isinstance(plain.next_batch(), torch.Tensor) and plain.d_out == 6
    assert plain.next_rows().keys() == rows.keys()
    assert "d_out" not in plain.state_dict()["identity"]
    # and what is read by another name is verified by the checksums of its own
    batch = ShardSource(tmp_path, 1000, key="targets", target="activations").next_batch()
    assert torch.equal(batch.input[:, :1], batch.target[:, :1] + 0.5) and batch.target.shape[1] == 6
    batch = ShardSource(tmp_path, 1000, key="targets").next_batch()
    assert isinstance(batch, torch.Tensor) and batch.shape[1] == 4
    other = ShardSource(tmp_path, 1000, target="other")
    assert other.next_rows().keys() == {"activations", "targets", "labels"}
    batch = other.next_batch()
    assert torch.equal(batch.target[:, 0], batch.input[:, 0] + 1.5)
    with pytest.raises(ValueError, match=r"must hold a floating tensor 'absent' \[rows, d_out\]"):
        ShardSource(tmp_path, 50, target="absent")
    with pytest.raises(ValueError, match="must hold a floating tensor 'labels'"):
        ShardSource(tmp_path, 50, target="labels")


def test_checksums_cover_targets(tmp_path):
    rows = with_targets(300)
    write_shards(tmp_path, [rows])
    path = tmp_path / "activations-00000.safetensors"
    data = bytearray(path.read_bytes())
    at = data.index(rows["targets"][290].numpy().tobytes())
    data[at + 1] ^= 1
    path.write_bytes(data)
    for target in ("targets", None):
        with pytest.raises(ValueError, match="must hold rows 256 to 299 as they were written"):
            ShardSource(tmp_path, 300, target=target).next_rows()


def test_shards_without_targets_are_read_as_ever(tmp_path):
    """Also those in which something else has the name."""
    x = numbered(600, 6)
    write_shards(tmp_path / "a", [{"activations": x, "targets": x[:, 0].long()}])
    source = ShardSource(tmp_path / "a", 600)
    rows = source.next_rows()
    assert isinstance(source.next_batch(), torch.Tensor)
    assert torch.equal(rows["targets"], rows["activations"][:, 0].long())
    assert source.state_dict()["identity"] == {
        "source": "ShardSource", "seed": 0, "rows": 600, "d": 6,
        "window_chunks": (64 << 20) // 24 // 256,
    }  # fmt: skip
    # foreign files, whatever the tensor is called
    save_file({"resid": x, "targets": numbered(600, 4) + 0.5}, tmp_path / "b.safetensors")
    batch = ShardSource(tmp_path / "b.safetensors", 600).next_batch()
    assert batch.input.shape == (600, 6) and batch.target.shape == (600, 4)
    save_file({"targets": x, "mean": torch.zeros(())}, tmp_path / "c.safetensors")
    assert ShardSource(tmp_path / "c.safetensors", 600).next_batch().shape == (600, 6)


def test_shards_refuse_targets_that_do_not_fit(tmp_path):
    rows = with_targets(100)
    for name in ("targets", "labels"):
        bad = {**rows, name: rows[name][:90]}
        with pytest.raises(ValueError, match=f"write_shards: {name} must have 100 rows like act"):
            write_shards(tmp_path / "none", [bad])
    assert not list((tmp_path / "none").iterdir())
    folder = tmp_path / "shards"
    folder.mkdir()
    save_file({"activations": numbered(9, 3), "targets": numbered(9, 2)}, folder / "a.safetensors")
    save_file({"activations": numbered(9, 3), "targets": numbered(8, 2)}, folder / "b.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors must hold 'targets' \[9, d_out\] beside"):
        ShardSource(folder, 5)
    save_file({"activations": numbered(9, 3), "targets": numbered(9, 4)}, folder / "b.safetensors")
    said = (
        r"b.safetensors must be \[rows, 3\] with \[\] and targets \[rows, 2\] like a.safetensors, "
        r"got \[9, 3\] with \[\] and targets \[rows, 4\]"
    )
    with pytest.raises(ValueError, match=said):
        ShardSource(folder, 5)
    save_file({"activations": numbered(9, 3)}, folder / "b.safetensors")
    with pytest.raises(ValueError, match=r"got \[9, 3\] with \[\]; keep"):
        ShardSource(folder, 5)


def test_what_a_model_gives_is_cached_and_read_back(tmp_path):
    source = model_source(**CLT)
    rows = rows_of(source)
    write_shards(tmp_path, source.read(), dtype=torch.bfloat16, metadata={"sites": source.sites})
    found = ShardSource(tmp_path, len(rows["positions"]))
    assert (found.d, found.d_out) == (source.d, source.d_out) == (2 * D, 2 * D)
    read = found.next_rows()
    order = (read["windows"] * 1000 + read["positions"]).argsort()
    for name in ("activations", "targets"):
        assert read[name].dtype == torch.bfloat16
        assert identical(read[name][order], rows[name].bfloat16())
    assert torch.equal(read["token_ids"][order], rows["token_ids"])


def test_a_transcoder_is_trained_from_a_model_and_from_shards_alike(tmp_path):
    source = model_source("1.mlp_in", target="1.mlp_out", batch_size=50)
    write_shards(tmp_path, source.read())
    for made_source in (source, ShardSource(tmp_path, 50)):
        sae = TopKSAE(D, 96, k=8, generator=torch.Generator().manual_seed(0))
        config = TrainConfig(total_tokens=5000, batch_size=50, lr=0.01, log_every=10)
        rows = Trainer(sae, made_source, config, quiet=True).run().rows
        assert rows[-1]["fvu"] < 0.7 * rows[0]["fvu"]
