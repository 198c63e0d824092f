# SPDX-License-Identifier: Apache-2.0
"""Activation sources: every row once an epoch, exact resume, bad data refused by name."""

import json

import pytest
import torch
from decoder_cases import Characters, saved_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import identical
from safetensors.torch import load_file, save_file

from mikernels.activations import (
    ModelSource,
    ShardSource,
    SourceExhausted,
    TensorSource,
    TextFiles,
    write_shards,
)
from mikernels.activations.shards import open_shards, read_index, remove_shards
from mikernels.files import sealed
from mikernels.models.load import load_model
from mikernels.owning import LOCK, owned
from mikernels.tensor_files import write_tensors

D = 6


def numbered(n, d=D):
    """Rows that say their own number in every column."""
    return torch.arange(n, dtype=torch.float32)[:, None].expand(n, d).contiguous()


def shards(folder, n=1000, rows_per_shard=384, **options):
    parts = ({"activations": numbered(n)[i : i + 70]} for i in range(0, n, 70))
    write_shards(folder, parts, rows_per_shard=rows_per_shard, **options)
    return folder


def row_numbers(source, batches):
    return torch.cat([source.next_batch()[:, 0] for _ in range(batches)]).long()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 90), st.integers(1, 200), st.integers(0, 2**40))
def test_tensor_source_gives_every_row_once_an_epoch(n, batch_size, seed):
    source = TensorSource(numbered(n), batch_size, seed)
    epochs = 3
    seen = row_numbers(source, -(-epochs * n // batch_size))[: epochs * n].view(epochs, n)
    assert torch.equal(seen.sort().values, torch.arange(n).expand(epochs, n))


def test_tensor_source_order_changes_with_epoch_and_seed():
    first, second = row_numbers(TensorSource(numbered(500), 500, 0), 2).view(2, 500)
    other = row_numbers(TensorSource(numbered(500), 500, 1), 1)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not torch.equal(first, torch.arange(500))


def test_tensor_source_keeps_extra_rows_beside_activations():
    source = TensorSource(numbered(50), 20, labels=torch.arange(50) * 10)
    rows = source.next_rows()
    assert torch.equal(rows["activations"][:, 0].long() * 10, rows["labels"])


@pytest.mark.parametrize("window_rows", [None, 256, 512])
def test_shard_source_gives_every_row_once_an_epoch(tmp_path, window_rows):
    source = ShardSource(shards(tmp_path), 100, window_rows=window_rows)
    assert source.d == D
    assert source.n_rows == 1000
    seen = row_numbers(source, 20).view(2, 1000)
    assert torch.equal(seen.sort().values, torch.arange(1000).expand(2, 1000))
    assert not torch.equal(seen[0], seen[1])


def test_shard_source_window_bounds_what_is_read(tmp_path):
    source = ShardSource(shards(tmp_path, n=4096, rows_per_shard=1024), 32, window_rows=512)
    # two chunks of 256 rows are in memory, from anywhere in the folder
    chunks = (row_numbers(source, 16) // 256).unique()
    assert len(chunks) == 2


def test_shard_source_reads_low_precision_and_extra_tensors(tmp_path):
    rows = {"activations": numbered(200), "token_ids": torch.arange(200)}
    write_shards(tmp_path, [rows], dtype=torch.bfloat16, metadata={"layer": 3})
    got = ShardSource(tmp_path, 200).next_rows()
    assert got["activations"].dtype == torch.bfloat16
    assert torch.equal(got["activations"][:, 0], got["token_ids"].bfloat16())
    assert ShardSource(tmp_path, 200).next_batch().dtype == torch.float32
    assert read_index(tmp_path)["metadata"] == {"layer": 3}


def test_shard_source_reads_in_the_order_of_the_files(tmp_path):
    source = ShardSource(shards(tmp_path, 1000), 10)
    parts = list(source.read(300))
    assert [len(part["activations"]) for part in parts] == [300, 84, 300, 84, 232]
    x = torch.cat([part["activations"] for part in parts])
    assert torch.equal(x, numbered(1000))
    with pytest.raises(ValueError, match="ShardSource: rows must be at least 1, got 0"):
        next(source.read(0))


def test_shard_source_takes_one_file_whatever_its_tensor_is_called(tmp_path):
    save_file({"resid": numbered(30), "mean": torch.zeros(D)}, tmp_path / "x.safetensors")
    source = ShardSource(tmp_path / "x.safetensors", 30)
    assert row_numbers(source, 1).sort().values.tolist() == list(range(30))


def check_resume(make, batches=12, interruptions=None):
    """Interrupt after every number of batches, or the given ones: the rest is the same."""
    whole = make()
    expected = [whole.next_batch() for _ in range(batches)]
    for done in range(batches) if interruptions is None else interruptions:
        first = make()
        for _ in range(done):
            first.next_batch()
        state = json.loads(json.dumps(first.state_dict()))
        second = make()
        second.load_state_dict(state)
        for batch in expected[done:]:
            assert torch.equal(second.next_batch(), batch)


def test_tensor_source_resumes_exactly():
    check_resume(lambda: TensorSource(numbered(100), 30, 7))


def test_shard_source_resumes_exactly(tmp_path):
    shards(tmp_path)
    check_resume(lambda: ShardSource(tmp_path, 130, 7, window_rows=256), 20)


def test_a_position_of_other_data_is_refused():
    state = TensorSource(numbered(100), 10, seed=1).state_dict()
    with pytest.raises(ValueError, match=r"shape \[100, 6\], expected \[90, 6\]"):
        TensorSource(numbered(90), 10, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="seed 1, expected 2"):
        TensorSource(numbered(100), 10, seed=2).load_state_dict(state)


def test_tensor_source_refuses_bad_tensors():
    with pytest.raises(ValueError, match=r"must be \[rows, d\], got \[3, 4, 5\]"):
        TensorSource(torch.zeros(3, 4, 5), 2)
    with pytest.raises(TypeError, match="must be floating, got torch.int64"):
        TensorSource(torch.zeros(3, 4, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="at least one row"):
        TensorSource(torch.zeros(0, 4), 2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TensorSource(torch.zeros(3, 4), 0)
    with pytest.raises(ValueError, match="labels must have 3 rows"):
        TensorSource(torch.zeros(3, 4), 2, labels=torch.zeros(5))


def test_shard_source_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ShardSource(tmp_path / "nowhere", 10)
    with pytest.raises(FileNotFoundError, match=r"must hold \*.safetensors files"):
        ShardSource(tmp_path, 10)
    shards(tmp_path)
    (tmp_path / "activations-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="activations-00001.safetensors is listed"):
        ShardSource(tmp_path, 10)


@pytest.mark.parametrize("keep", [0, 4, 40, 0.5])
def test_shard_source_names_a_truncated_shard(tmp_path, keep):
    bad = shards(tmp_path) / "activations-00002.safetensors"
    content = bad.read_bytes()
    bad.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError, match="activations-00002.safetensors must be a complete"):
        ShardSource(tmp_path, 10)


def test_shard_source_names_a_foreign_shard(tmp_path):
    shards(tmp_path)
    save_file({"activations": numbered(10)}, tmp_path / "zebra.safetensors")
    with pytest.raises(ValueError, match="zebra.safetensors is not listed"):
        ShardSource(tmp_path, 10)
    (tmp_path / "index.json").unlink()
    assert ShardSource(tmp_path, 10).n_rows == 1010
    save_file({"activations": numbered(10, d=7)}, tmp_path / "zebra.safetensors")
    with pytest.raises(ValueError, match=r"zebra.safetensors must be \[rows, 6\]"):
        ShardSource(tmp_path, 10)
    save_file({"a": numbered(10), "b": numbered(10)}, tmp_path / "zebra.safetensors")
    with pytest.raises(ValueError, match="zebra.safetensors must hold a tensor 'activations'"):
        ShardSource(tmp_path, 10)
    save_file({"activations": numbered(10).long()}, tmp_path / "zebra.safetensors")
    with pytest.raises(TypeError, match="must be floating, got torch.int64"):
        ShardSource(tmp_path, 10)


def test_shard_source_names_a_shard_that_disagrees_with_the_index(tmp_path):
    shards(tmp_path)
    save_file({"activations": numbered(10)}, tmp_path / "activations-00000.safetensors")
    with pytest.raises(ValueError, match="must have 384 rows by index.json, got 10"):
        ShardSource(tmp_path, 10)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="must be an index written by write_shards"):
        ShardSource(tmp_path, 10)


def test_write_shards_cuts_and_refuses(tmp_path):
    shards(tmp_path / "a")
    assert [shard.rows for shard in open_shards(tmp_path / "a")] == [384, 384, 232]
    with pytest.raises(FileExistsError, match="must hold no shards yet"):
        shards(tmp_path / "a")
    with pytest.raises(ValueError, match="at least one row"):
        write_shards(tmp_path / "b", [])


def test_write_shards_leaves_no_index_and_no_partial_file_on_failure(tmp_path):
    def broken():
        yield numbered(400)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, broken(), rows_per_shard=384)
    assert [path.name for path in tmp_path.iterdir()] == ["activations-00000.safetensors"]


def test_write_shards_says_which_file_a_full_disk_stopped(tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mikernels.tensor_files.write_all", full)
    with pytest.raises(OSError, match=r"activations-00000.*No space left.*free space"):
        shards(tmp_path)
    assert not list(tmp_path.iterdir())


class WithBos(Characters):
    bos_token_id = 0

    def __call__(self, text, add_special_tokens=True, **options):
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}


def tiny(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=100, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    return transformers.LlamaForCausalLM(config).eval()


TEXTS = ["the quick brown fox jumps over the lazy dog. " * 8, "second document\n" * 12]


def model_source(model=None, tokenizer=None, layer=2, texts=TEXTS, batch_size=40, **options):
    options = {"context": 32, "buffer_rows": 100, "windows_per_forward": 3} | options
    tokenizer = tokenizer or Characters()
    model = tiny("llama") if model is None else model
    return ModelSource(model, tokenizer, layer, texts, batch_size, **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("layer", [0, 2])
def test_model_source_gives_the_residual_stream_after_the_layer(kind, layer):
    model = tiny(kind)
    source = model_source(model, layer=layer)
    windows = list(source.token_windows())
    rows = {name: torch.cat([part[name] for part in source.read()]) for name in next(source.read())}
    for number in (0, 3, len(windows) - 1):
        with torch.no_grad():
            hidden = model(windows[number][None], output_hidden_states=True).hidden_states
        mine = rows["windows"] == number
        expected = hidden[layer + 1][0, rows["positions"][mine]]
        assert torch.allclose(rows["activations"][mine], expected, atol=1e-5)
        assert torch.equal(rows["token_ids"][mine], windows[number][rows["positions"][mine]])


def test_model_source_never_runs_later_layers():
    model = tiny("llama")
    later = []
    model.model.layers[3].register_forward_hook(lambda *_: later.append(1))
    model.lm_head.register_forward_hook(lambda *_: later.append(1))
    model_source(model).next_batch()
    assert not later
    assert not model.model.layers[2]._forward_hooks


def test_model_source_takes_a_module_by_name():
    assert model_source(layer="model.layers.1.mlp").next_batch().shape == (40, 32)


def test_model_source_batches_hold_every_read_row_once():
    source = model_source(batch_size=7)
    read = torch.cat([rows["activations"] for rows in source.read()])
    n = read.shape[0]
    batches = -(-n // 7)
    got = torch.cat([source.next_batch() for _ in range(batches)])[:n]
    assert torch.allclose(got.sum(1).sort().values, read.sum(1).sort().values, atol=1e-5)


def test_model_source_drops_first_position_and_special_tokens():
    source = model_source(skip_first=2)
    rows = {name: torch.cat([part[name] for part in source.read()]) for name in next(source.read())}
    assert rows["positions"].min() == 2
    assert not (rows["token_ids"] == 0).any()
    kept = model_source(skip_first=0, drop_special=False)
    tokens = sum(window.numel() for window in kept.token_windows())
    assert sum(part["activations"].shape[0] for part in kept.read()) == tokens
    assert any((part["token_ids"] == 0).any() for part in kept.read())


def test_model_source_begins_windows_as_the_tokeniser_does():
    assert all(window[0] == 0 for window in model_source(tokenizer=WithBos()).token_windows())
    plain = model_source(tokenizer=WithBos(), bos=False)
    assert not all(window[0] == 0 for window in plain.token_windows())
    with pytest.raises(ValueError, match="bos=True needs a tokeniser with one"):
        model_source(bos=True)


def test_model_source_drops_outliers():
    model = tiny("llama")
    source = model_source(model, outlier_norm=None)
    norms = torch.cat([part["activations"].norm(dim=-1) for part in source.read()])
    limit = float(norms.max() / norms.median()) * 0.9
    fewer = model_source(model, outlier_norm=limit)
    kept = torch.cat([part["activations"].norm(dim=-1) for part in fewer.read()])
    assert 0 < kept.numel() < norms.numel()
    assert kept.max() < norms.max()


class Broken(torch.nn.Module):
    """Adds NaN, or inf, to the activations of one token id."""

    def __init__(self, layer, token, value):
        super().__init__()
        self.layer, self.token, self.value = layer, token, value
        self.tokens = None

    def forward(self, hidden_states, *args, **kwargs):
        output = self.layer(hidden_states, *args, **kwargs)
        bad = (self.tokens == self.token)[..., None] & (torch.arange(32) == 3)
        return output.masked_fill(bad, self.value)


Q = 1 + ord("q") % 90


def broken(value):
    model = tiny("llama")
    layer = model.model.layers[2] = Broken(model.model.layers[2], Q, value)

    def tell(module, args, kwargs):
        layer.tokens = kwargs["input_ids"]

    model.register_forward_pre_hook(tell, with_kwargs=True)
    return model


def rows_of(source):
    parts = list(source.read())
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("outlier_norm", [None, 10.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_model_source_drops_tokens_that_are_not_finite_singly(value, outlier_norm):
    options = {"outlier_norm": outlier_norm, "texts": [TEXTS[0] * 2]}
    expected = rows_of(model_source(**options))
    source = model_source(broken(value), max_nonfinite=0.1, **options)
    with pytest.warns(
        RuntimeWarning, match=r"in \d+ of \d+ tokens \(first in window 0, .*counts"
    ) as seen:
        found = rows_of(source)
    assert len(seen) == 1
    kept = expected["token_ids"] != Q
    assert kept.sum() == len(kept) - 15
    assert all(torch.equal(found[name], expected[name][kept]) for name in expected)
    windows = list(source.token_windows())
    special = sum(int((window[1:] == 0).sum()) for window in windows)
    assert source.dropped == {
        "skipped": len(windows), "special": special, "nonfinite": 15, "outlier": 0,
    }  # fmt: skip
    assert source.read_tokens == len(found["positions"]) + sum(source.dropped.values())


def test_model_source_refuses_more_than_a_share_that_is_not_finite():
    texts = [TEXTS[0] * 2]
    message = (
        r"finite in all but 1.000% of tokens \(max_nonfinite\), got NaN or inf at layer 2 in 3 of"
    )
    with pytest.raises(ValueError, match=message):
        model_source(broken(float("nan")), texts=texts).next_batch()
    with pytest.raises(ValueError, match=message):
        list(model_source(broken(float("nan")), texts=texts).read())
    with pytest.raises(ValueError, match="max_nonfinite must be in 0..1, got nan"):
        model_source(max_nonfinite=float("nan"))
    with pytest.raises(ValueError, match="outlier_norm must be above 0, got nan"):
        model_source(outlier_norm=float("nan"))


@pytest.mark.parametrize("per_forward", [1, 8])
def test_model_source_judges_a_share_on_more_than_the_first_windows(per_forward):
    """1 of 15 tokens of the first window, and 1 of the text's 2,500."""
    texts = ["q" + "a" * 2500]
    source = model_source(
        broken(float("nan")),
        texts=texts,
        context=16,
        windows_per_forward=per_forward,
        buffer_rows=1000,
        skip_first=0,
    )
    with pytest.warns(
        RuntimeWarning, match=r"in 1 of \d+ tokens \(first in window 0, position [01],"
    ):
        found = rows_of(source)
    assert source.dropped["nonfinite"] == 1 and len(found["positions"]) > 2400
    # and what is at fault altogether is known before the block is full
    forwards = []
    bad = broken(float("nan"))
    bad.register_forward_pre_hook(lambda *_: forwards.append(1))
    source = model_source(
        bad, texts=["q" * 5000], context=16, windows_per_forward=1, buffer_rows=1600, skip_first=0
    )
    forwards.clear()
    with (
        pytest.warns(RuntimeWarning, match="in 16 of 16"),
        pytest.raises(ValueError, match="32 of 32"),
    ):
        source.next_batch()
    assert len(forwards) == 2  # 16 of 1,600 are 1 %


def test_model_source_counts_outliers_beside_tokens_that_are_not_finite():
    model = broken(float("nan"))
    # the median is that of the finite norms; just below the largest of these, one token is dropped
    norms = rows_of(model_source(tiny("llama"), outlier_norm=None, context=400))
    finite = norms["activations"][norms["token_ids"] != Q].norm(dim=-1)
    limit = float(finite.max() / finite.median()) * 0.9
    source = model_source(model, context=400, max_nonfinite=0.1, outlier_norm=limit)
    with pytest.warns(RuntimeWarning, match="dropped"):
        kept = rows_of(source)["activations"].norm(dim=-1)
    assert source.dropped["outlier"] > 0 and kept.isfinite().all()
    assert kept.numel() > 0.8 * finite.numel()


def in_place(model):
    model.compile(backend="eager")
    return model


def a_layer(model):
    model.model.layers[2].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "compile",
    [lambda m: torch.compile(m, backend="eager"), in_place, a_layer],
    ids=["whole", "in_place", "a_layer"],
)
def test_model_source_of_compiled_models(compile):
    torch.compiler.reset()
    expected = rows_of(model_source(tiny("llama")))
    model = compile(tiny("llama"))
    with torch.no_grad():
        for length in (32, 7):
            model(input_ids=torch.ones(3, length, dtype=torch.int64), use_cache=False)
    source = model_source(model)
    found = rows_of(source)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert model_source(model, layer="model.layers.1.mlp").next_batch().shape == (40, 32)


def test_model_source_refuses_layers_whose_hooks_never_fire():
    model = tiny("llama")
    model.spare = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match="got 'spare', whose hooks never fire; code compiled by"):
        model_source(model, layer="spare")
    traced = torch.jit.trace(torch.nn.Sequential(torch.nn.Linear(32, 32)), torch.ones(2, 32))
    model.model.layers[1].mlp = traced
    with pytest.raises(ValueError, match=r"ModelSource: .* got a scripted model.layers.1.mlp with"):
        model_source(model, layer="model.layers.1.mlp.0")
    assert model_source(model, layer="model.layers.1.mlp").d == 32


def test_model_source_stops_at_max_tokens():
    windows = list(model_source(max_tokens=70).token_windows())
    assert [window.numel() for window in windows] == [32, 32, 6]


def test_model_source_resumes_exactly():
    model = tiny("llama")
    # an epoch is 13 batches: at its start, inside a block, after it, in the second epoch
    check_resume(lambda: model_source(model), 16, (0, 4, 14))
    check_resume(lambda: model_source(model, texts=iter(TEXTS)), 9, (5,))


def test_model_source_collects_no_more_than_is_trained_on():
    model = tiny("llama")
    short, long = (model_source(model, buffer_rows=10_000) for _ in "ab")
    told = []
    short.on_progress = lambda *tokens: told.append(tokens)
    short.expect(80)
    short.next_batch()
    # 80 rows and a sixteenth more are three windows of 31, in one pass
    assert short.read_tokens == 96 and told == [(0, 96), (96, 96)]
    # a longer run goes on with blocks of that size, to the same rows; a smaller buffer does not
    long.expect(5000)
    long.load_state_dict(json.loads(json.dumps(short.state_dict())))
    for _ in range(4):
        assert torch.equal(long.next_batch(), short.next_batch())
    small = model_source(model, buffer_rows=32)
    with pytest.raises(ValueError, match="got windows_per_block 3, expected 1; resume"):
        small.load_state_dict(short.state_dict())
    assert small.state_dict()["identity"]["windows_per_block"] == 1


def test_model_source_says_when_an_iterator_has_ended():
    source = model_source(texts=iter(TEXTS))
    with pytest.raises(SourceExhausted, match="has ended"):
        for _ in range(100):
            source.next_batch()


@pytest.mark.parametrize("texts", [[], [""], ["a"]])
def test_model_source_refuses_text_without_a_usable_token(texts):
    with pytest.raises(ValueError, match="at least one row, got none"):
        model_source(texts=texts).next_batch()


def test_model_source_refuses_bad_arguments():
    with pytest.raises(IndexError, match=r"layer must be in 0..3 .*got 4"):
        model_source(layer=4)
    with pytest.raises(ValueError, match="tokenizer must be the model's tokeniser, got None"):
        ModelSource(tiny("llama"), None, 0, TEXTS, 10)
    with pytest.raises(TypeError, match="got one str"):
        model_source(texts="hello")
    with pytest.raises(ValueError, match=r"skip_first must be in 0..31"):
        model_source(skip_first=32)
    refused = r"^ModelSource: model must be a Hugging Face decoder .*got Llama.*; pass the module"
    model = tiny("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match=refused):
        model_source(model=model)


def test_text_files_stream_and_refuse(tmp_path):
    good, empty, binary = (tmp_path / name for name in ("good", "empty", "binary"))
    good.write_text("line é\n" * 400_000, encoding="utf-8")
    empty.touch()
    binary.write_bytes(b"\xff\xfe\x00" * 10)
    files = TextFiles([good])
    assert "".join(files) == "".join(files) == good.read_text(encoding="utf-8")
    assert len(list(files)) > 1
    assert all(part.endswith("\n") for part in files)
    with pytest.raises(FileNotFoundError, match="absent"):
        TextFiles([tmp_path / "absent"])
    with pytest.raises(ValueError, match="empty"):
        TextFiles([empty])
    with pytest.raises(ValueError, match=r"binary must be UTF-8"):
        list(TextFiles([binary]))
    with pytest.raises(ValueError, match="at least one text file"):
        TextFiles([])


def test_load_model_refuses_folders_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be an existing model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config.json or one \*.gguf file, got neither"):
        load_model(tmp_path)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(FileNotFoundError, match="must be one of .*'a.gguf'.*got 'b.gguf'"):
        load_model(tmp_path, "b.gguf")


def test_load_model_says_that_the_tokeniser_is_missing(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a tokeniser"):
        load_model(tmp_path)


@pytest.fixture
def silent(monkeypatch):
    """Nothing is asked on the terminal, whatever the answer would be."""
    asked = []

    def ask(*question):
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", ask)
    yield
    assert not asked


OWN_CODE = """
open({marker!r}, "w").close()
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("part", ["config", "tokenizer_config"])
def test_load_model_runs_no_code_of_the_folder(tmp_path, silent, part):
    tiny("llama").save_pretrained(tmp_path)
    saved_tokenizer(tmp_path)
    (tmp_path / "own.py").write_text(OWN_CODE.format(marker=str(tmp_path / "ran")))
    path = tmp_path / f"{part}.json"
    config = json.loads(path.read_text())
    if part == "config":
        config |= {
            "model_type": "own",
            "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"},
        }
    else:
        config |= {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]},
        }
    path.write_text(json.dumps(config))
    refused = (
        rf"load_model: .*/{part}.json must not need Python code .*'own\..*never run here; load"
    )
    with pytest.raises(ValueError, match=refused):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_load_model_takes_its_own_class_where_the_folder_brings_another(tmp_path, silent):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    saved_tokenizer(tmp_path)
    (tmp_path / "own.py").write_text(OWN_CODE.format(marker=str(tmp_path / "ran")))
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, _ = load_model(tmp_path)
    assert type(loaded).__name__ == "LlamaModel"
    assert torch.equal(loaded.norm.weight, model.model.norm.weight)
    assert not (tmp_path / "ran").exists()


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_load_model_unpickles_tensors_only(tmp_path, silent):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    saved_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = {name: part.contiguous() for name, part in model.state_dict().items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert torch.equal(load_model(tmp_path)[0].norm.weight, model.model.norm.weight)
    weights["extra"] = Touch(str(tmp_path / "ran"))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold a model that transformers reads, got"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "paged|kernels-community/flash-attn"},
        {"text_config": {"_attn_implementation": "own/attention:kernel"}},
    ],
)
def test_load_model_fetches_no_kernels(tmp_path, change):
    tiny("llama").save_pretrained(tmp_path)
    saved_tokenizer(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused = f"load_model: {path} must not name code of a repository, got _?attn_implementation = "
    with pytest.raises(ValueError, match=refused):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"hidden_size": -4}),
        ("config.json", {"num_hidden_layers": "2"}),
        ("config.json", {"num_attention_heads": 0}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
    ],
)
def test_load_model_names_the_folder_whatever_transformers_raises(tmp_path, file, change):
    tiny("llama").save_pretrained(tmp_path)
    saved_tokenizer(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"load_model: {tmp_path} must hold a"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "every weight of LlamaModel, got none for layers.0.mlp.up_proj.weight .1 in"),
        ("NaN", "finite weights, got NaN or inf in layers.0.mlp.up_proj.weight; restore"),
        ("transposed", "a model that transformers reads, got RuntimeError"),
    ],
)
def test_load_model_takes_every_weight_from_the_folder(tmp_path, change, said):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    saved_tokenizer(tmp_path)
    assert load_model(tmp_path)[0] is not None
    path, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    weights = load_file(path)
    weight = weights.pop(name)
    if change == "NaN":
        weight[3, 5] = torch.nan
    if change != "missing":
        weights[name] = weight.T.contiguous() if change == "transposed" else weight
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"load_model: {tmp_path} must hold {said}"):
        load_model(tmp_path)


def test_load_model_says_that_the_weights_are_truncated(tmp_path):
    saved_tokenizer(tmp_path)
    tiny("llama").save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert ModelSource(model, tokenizer, 1, ["a b c d e f g h"], 3, context=8).d == 32
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="must hold a model that transformers reads"):
        load_model(tmp_path)


def test_a_flipped_bit_is_seen_when_its_rows_are_read(tmp_path):
    path = shards(tmp_path) / "activations-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-384 * 4 * D + 300 * 4 * D] ^= 1  # row 300 of 384, in the second chunk
    path.write_bytes(data)
    first, second = open_shards(tmp_path)[:2]
    assert identical(first.read(0, 384)["activations"], numbered(1000)[:384])
    assert identical(second.read(3, 250)["activations"], numbered(1000)[387:634])
    said = f"{path} must hold rows 256 to 383 as they were written, got another checksum"
    for start, stop in ((0, 384), (256, 257), (250, 260), (383, 400)):
        with pytest.raises(ValueError, match=said):
            second.read(start, stop)
    source = ShardSource(tmp_path, 100)
    with pytest.raises(ValueError, match=said):
        row_numbers(source, 10)


def test_checksums_cover_what_goes_with_the_rows(tmp_path):
    rows = {"activations": numbered(300), "token_ids": torch.arange(300)}
    write_shards(tmp_path, [rows])
    path = tmp_path / "activations-00000.safetensors"
    rows["token_ids"][290] = 5
    write_tensors(path, rows)
    (shard,) = open_shards(tmp_path)
    assert torch.equal(shard.read(10, 256)["token_ids"], torch.arange(10, 256))
    with pytest.raises(ValueError, match="rows 256 to 299"):
        shard.read(290, 291)


def test_reads_that_no_chunk_begins_are_the_same_rows(tmp_path):
    (shard, *_) = open_shards(shards(tmp_path, rows_per_shard=700))
    for start, stop in ((0, 0), (0, 1), (255, 257), (511, 700), (512, 999), (699, 700), (300, 300)):
        got = shard.read(start, stop)["activations"]
        assert identical(got, numbered(1000)[start : min(stop, 700)])


def edit_index(folder, change, seal=True):
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    if seal and "sha256" in index:
        del index["sha256"]
        index = sealed(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda i: i.pop("shards"), "shards"),
        (lambda i: i.update(shards=[]), "shards"),
        (lambda i: i.update(metadata=None), "metadata"),
        (lambda i: i["shards"][0].update(rows=True), "shards.0.rows"),
        (lambda i: i["shards"][0].update(rows=-3), "shards.0.rows"),
        (lambda i: i["shards"][0].update(rows=384.0), "shards.0.rows"),
        (lambda i: i["shards"][1].update(file="../secret.safetensors"), "shards.1.file"),
        (lambda i: i["shards"][1].update(crc32=[1]), "shards.1.crc32"),
        (lambda i: i["shards"][1].update(crc32=["a", "b"]), "shards.1.crc32.0"),
        (lambda i: i["shards"][1].pop("crc32"), "shards.1.crc32"),
        (lambda i: i["shards"].append(i["shards"][0]), "every shard once"),
        (lambda i: i.update(sha256={"self": "0" * 64}), "sha256.self"),
    ],
)
def test_every_field_of_an_index_is_checked(tmp_path, change, field):
    edit_index(shards(tmp_path), change, seal="sha256" not in field)
    for read in (read_index, open_shards):
        with pytest.raises(ValueError, match=f"{tmp_path / 'index.json'} must .*{field}"):
            read(tmp_path)


def test_huge_rows_are_compared_with_the_file_and_not_asked_for(tmp_path):
    def change(index):
        index["shards"][0].update(rows=2**52, crc32=[1] * 3)

    edit_index(shards(tmp_path), change)
    with pytest.raises(ValueError, match="shards.0.crc32 of 17592186044416 checksums, got 3"):
        ShardSource(tmp_path, 10)


def test_an_index_from_before_checksums_is_read_and_said(tmp_path):
    def change(index):
        del index["sha256"]
        for shard in index["shards"]:
            del shard["crc32"]

    edit_index(shards(tmp_path), change)
    with pytest.warns(UserWarning, match="from before checksums: a bit that flipped"):
        source = ShardSource(tmp_path, 100)
    assert row_numbers(source, 10).sort().values.tolist() == list(range(1000))


def test_relative_paths_are_those_that_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.txt").write_text("text")
    texts = TextFiles(["a.txt"])

    def move():
        monkeypatch.chdir(tmp_path / "elsewhere")
        yield numbered(10)

    assert write_shards("shards", move()) == 10
    assert ShardSource(tmp_path / "shards", 10).n_rows == 10
    assert list(texts) == ["text"]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_write_shards_has_one_writer(tmp_path):
    def batches():
        yield numbered(400)
        with pytest.raises(BlockingIOError, match="beside write_shards of process"):
            write_shards(tmp_path, [numbered(10)])

    assert write_shards(tmp_path, batches(), rows_per_shard=384) == 400
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "activations-00000.safetensors",
        "activations-00001.safetensors",
        "index.json",
    ]


@pytest.mark.parametrize("lost", ["folder", "shard", "replaced"])
def test_write_shards_sees_that_shards_are_lost(tmp_path, lost):
    folder = tmp_path / "shards"

    def batches():
        yield numbered(400)
        if lost == "shard":
            (folder / "activations-00000.safetensors").unlink()
        else:
            folder.rename(tmp_path / "away")
        if lost == "replaced":
            folder.mkdir()
        yield numbered(400)

    with pytest.raises(FileNotFoundError, match=f"write_shards: {folder}.* must stay"):
        write_shards(folder, batches(), rows_per_shard=384)
    assert not (folder / "index.json").exists()


def test_write_shards_refuses_metadata_before_it_writes(tmp_path):
    for metadata, error in (({"x": torch.zeros(1)}, TypeError), ({"x": float("nan")}, ValueError)):
        with pytest.raises(error, match="write_shards: metadata.x must be"):
            write_shards(tmp_path / "new", [numbered(3)], metadata=metadata)
    assert not (tmp_path / "new").exists()


def test_remove_shards_removes_its_own_and_nothing_else(tmp_path):
    ours = ("activations-00000.safetensors", ".activations-00001.safetensors.partial")
    for name in (*ours, "notes.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(FileExistsError, match="nothing else .* got .*notes.txt"):
        remove_shards(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "notes.txt").rename(tmp_path / "activations-.safetensors")
    with pytest.raises(FileExistsError):
        remove_shards(tmp_path)
    (tmp_path / "activations-.safetensors").unlink()
    (tmp_path / LOCK).write_text("of a writer that was killed")
    with owned(tmp_path, "another"), pytest.raises(BlockingIOError, match="beside another"):
        remove_shards(tmp_path)
    remove_shards(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(FileExistsError, match="link"):
        remove_shards(tmp_path / "link")


POSITIONS = {"epoch": 0, "block": 0, "offset": 0}


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in POSITIONS for value in (-1, True, 0.5, "1", None, 10**18)),
        {"block": 2},
        {"offset": 1000},
        {"block": 1, "offset": 1},
        {"identity": None},
        {"identity": {"source": "TensorSource", "seed": False, "shape": [1000, 6]}},
        {"extra": 1},
    ],
)
@pytest.mark.parametrize("kind", ["tensor", "shards", "model"])
def test_a_position_beyond_the_data_is_refused_and_changes_nothing(tmp_path, change, kind):
    if kind == "tensor":
        source = TensorSource(numbered(1000), 40)
    elif kind == "shards":
        source = ShardSource(shards(tmp_path), 40, window_rows=10_000)
    else:
        source = model_source(buffer_rows=10_000)
    source.next_batch()
    saved = source.state_dict()
    twin = source.state_dict()
    with pytest.raises(ValueError, match="saved position"):
        source.load_state_dict({**saved, **change})
    assert source.state_dict() == twin
    expected = type(source).next_rows(source)["activations"]
    source.load_state_dict(saved)
    assert identical(source.next_rows()["activations"], expected)
