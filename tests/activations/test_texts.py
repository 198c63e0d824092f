# SPDX-License-Identifier: Apache-2.0
"""Texts of files: every kind gives its documents, and what is no text is named with its place."""

import gzip

import pytest

from mikernels.activations import TextFiles

RECORDS = (
    b'{"text": "a\\u00e9", "meta": {"title": "t", "n": 1}, "a.b": "dot", "a": {"b": "nest"}}\n'
)


def read(path, field="text"):
    return list(TextFiles([path], field))


@pytest.mark.parametrize(
    ("name", "data", "field", "documents"),
    [
        ("crlf.txt", "\ufeffone\r\ntwo\r".encode(), "text", ["one\ntwo\n"]),
        ("packed.txt.gz", gzip.compress(b"packed", mtime=0), "text", ["packed"]),
        ("long.txt", b"x" * (3 << 20), "text", ["x" * (2 << 20), "x" * (1 << 20)]),
        ("a.jsonl", RECORDS + b"\r\n\n" + RECORDS.rstrip(), "text", ["aé", "aé"]),
        ("a.jsonl", b"\xef\xbb\xbf" + RECORDS, "meta.title", ["t"]),
        ("a.ndjson", RECORDS, "a.b", ["dot"]),
        ("A.JSONL.GZ", gzip.compress(RECORDS, mtime=0), "text", ["aé"]),
        ("lines.json", RECORDS * 2, "text", ["aé", "aé"]),
    ],
)  # fmt: skip
def test_documents(tmp_path, name, data, field, documents):
    (tmp_path / name).write_bytes(data)
    texts = TextFiles([tmp_path / name], field)
    assert list(texts) == list(texts) == documents


@pytest.mark.parametrize(
    ("name", "data", "field", "message"),
    [
        ("mark.txt", b"\xef\xbb\xbf", "text", "mark.txt must hold text, got an empty file"),
        ("blank.jsonl", b"\n\r\n", "text", "blank.jsonl must hold text, got an empty file"),
        ("empty.json", b"", "text", "empty.json must hold text, got an empty file"),
        ("empty.txt.gz", gzip.compress(b"", mtime=0), "text", "must hold text, got an empty file"),
        ("wide.txt", "a".encode("utf-16"), "text", "must be UTF-8 text, got UTF-16, or a binary"),
        ("wide.txt", "a".encode("utf-16-le"), "text", "must be UTF-8 text, got a NUL byte"),
        (
            "cut.txt.gz",
            gzip.compress(b"x" * 99, mtime=0)[:-9],
            "text",
            "must be a complete gzip file, got",
        ),
        ("not.jsonl.gz", RECORDS, "text", "must be a complete gzip file, got Not a gzipped"),
        ("one.json", b'[\n{"text": "a"}]', "text", "text or JSON lines, got one JSON document"),
        (
            "cut.jsonl",
            RECORDS + b'{"text":\n',
            "text",
            "cut.jsonl line 2 must be a JSON obj",
        ),
        ("list.jsonl", b'["a"]\n', "text", "line 1 must be a JSON object, got list; write each"),
        ("deep.jsonl", b"[" * 99_999, "text", "line 1 must be a JSON object, got .*recursion"),
        ("bytes.jsonl", b'{"text": "\xff"}', "text", "line 1 must be a JSON object, got .*utf-8"),
        ("half.jsonl", b'{"text": "\\ud800"}', "text", "line 1 must be .* half of a surrogate"),
        (
            "null.jsonl",
            b'{"text": null}',
            "text",
            "line 1 must be a record with text in",
        ),
        ("a.jsonl", RECORDS, "body", r"field 'body', got \['text', 'meta.title', 'meta.n', 'a.b',"),
        ("a.jsonl", RECORDS, "text.x", r"with the field 'text.x', got \['text', 'meta"),
        ("a.jsonl", RECORDS, "meta", "record with text in 'meta', got dict"),
        ("a.jsonl", RECORDS, "meta.n", "text in 'meta.n', got int 1; name a field of texts with"),
        ("a.jsonl.zst", b"", "text", "must be plain or .gz, got .zst; unpack it, e.g. `unzstd a"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, data, field, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, field)


def test_the_first_record_is_read_at_once_and_later_ones_as_needed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(RECORDS * 3 + b'{"text": 5}\n')
    texts = iter(TextFiles([tmp_path / "a.jsonl"]))
    assert [next(texts) for _ in range(3)] == ["aé"] * 3
    with pytest.raises(ValueError, match="a.jsonl line 4 must be a record with text in 'text', go"):
        next(texts)
    with pytest.raises(TypeError, match="must be a list of files, got one path; pass"):
        TextFiles(str(tmp_path / "a.jsonl"))


def test_a_folder_is_its_files_by_name(tmp_path):
    with pytest.raises(ValueError, match="or hold files of one kind among .txt, .* got none; name"):
        read(tmp_path)
    for name in ("b.txt", "a.txt", "README.md"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt", "b.txt"]
    assert TextFiles([tmp_path]).most_tokens() == 10
    (tmp_path / "c.jsonl").write_bytes(RECORDS)
    with pytest.raises(ValueError, match="got .jsonl, .txt; name the files one by one"):
        read(tmp_path)


def test_tables(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({
        "text": [f"row {i}" for i in range(2500)],
        "meta": [{"title": "t"}] * 2500,
        "n": range(2500),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as file:
        file.write_table(table)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        assert read(tmp_path / name) == table["text"].to_pylist()
        assert read(tmp_path / name, "meta.title") == ["t"] * 2500
        with pytest.raises(ValueError, match=r"the column 'body', got \['text', 'meta.title', 'n'"):
            read(tmp_path / name, "body")
        with pytest.raises(ValueError, match="must have texts in 'n', got int64; name a column"):
            read(tmp_path / name, "n")
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"cut-{name} must be .*; write it again"):
            read(tmp_path / f"cut-{name}")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(ValueError, match="null.parquet row 1 must have text in 'text', got null"):
        read(tmp_path / "null.parquet")
    kinds = pa.table({"text": pa.array(["a", "a"]).dictionary_encode(), "empty": ["", ""]})
    pq.write_table(kinds, tmp_path / "kinds.parquet")
    assert read(tmp_path / "kinds.parquet") == ["a", "a"]
    pq.write_table(kinds[:0], tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="none.parquet must hold text, got an empty file"):
        read(tmp_path / "none.parquet")


def test_datasets_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "m": [{"t": "x"}] * 3})
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made.select([2, 0])}).save_to_disk(tmp_path / "dict")
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one") == ["a", "b", "c"]
    assert read(tmp_path / "one", "m.t") == ["x"] * 3
    # one split needs no name, and its rows are in its order
    assert read(tmp_path / "dict") == read(tmp_path / "dict" / "train") == ["c", "a"]
    with pytest.raises(ValueError, match=r"one split .* got the splits \['train', 'test'\]; name"):
        read(tmp_path / "two")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="one must be a dataset of save_to_disk, got KeyError"):
        read(tmp_path / "one")
