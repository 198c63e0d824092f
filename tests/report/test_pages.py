# SPDX-License-Identifier: Apache-2.0
"""The report's folder: what is in it, and that it is whole, absent, or somebody else's."""

import base64
import json
import os
from itertools import islice

import numpy as np
import pytest
from full_disk import largest_file
from made_features import HOSTILE, MadeUp, read

from mikernels.report import write_report
from mikernels.report.chunks import PER_CHUNK, TOPS, Words, plain
from mikernels.report.folder import is_report

MADE = MadeUp(300)


def unpacked(text, kind):
    return np.frombuffer(base64.b64decode(text), kind).tolist()


def everything(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_every_feature_is_in_its_chunk_and_the_index_is_light(tmp_path):
    told = []
    page = write_report(MADE, tmp_path / "report", title="<b>\udce4</b>", progress=told.append)
    folder = tmp_path / "report"
    assert page == folder / "index.html" and sum(told) == 300
    text = page.read_text(encoding="utf-8")
    assert "<title>&lt;b&gt;?&lt;/b&gt;</title>" in text
    found = []
    for i in range(3):
        chunk = read(folder, f"features-{i:05d}")
        assert len(chunk["features"]) == min(PER_CHUNK, 300 - i * PER_CHUNK)
        words = Words({text: n for n, text in enumerate(chunk["words"])})
        views = MADE.views(i * PER_CHUNK, (i + 1) * PER_CHUNK)
        assert chunk["features"] == [plain(view, words) for view in views]
        assert len(words) == len(chunk["words"])
        found += [feature["number"] for feature in chunk["features"]]
    assert found == list(range(300))
    index = read(folder, "index")
    assert unpacked(index["numbers"], "<u4") == found
    assert unpacked(index["counts"], "<f8") == MADE.counts.tolist()
    assert unpacked(index["maxima"], "<f4") == MADE.maxima.tolist()
    tops = np.array(unpacked(index["tops"], "<u4")).reshape(300, TOPS)
    firsts = [index["words"][token] for token in tops[: len(HOSTILE), 0] if token != 0xFFFFFFFF]
    assert firsts == [text for i, text in enumerate(HOSTILE) if i % 8 != 7]
    assert unpacked(read(folder, "promoted")["tokens"], "<u4")[0] == index["words"].index(" up0x0")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert there == {*report["files"], "report.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_some_features(tmp_path):
    write_report(MADE, tmp_path / "few", numbers=[17, 5])
    assert [f["number"] for f in read(tmp_path / "few", "features-00000")["features"]] == [17, 5]
    for numbers, error in (([], ValueError), ([5, 5], ValueError), ([300], IndexError)):
        with pytest.raises(error, match="write_report: numbers must be"):
            write_report(MADE, tmp_path / "none", numbers=numbers)
    assert [p.name for p in tmp_path.iterdir()] == ["few"]


class Stopped(MadeUp):
    """Ends in the middle, as Ctrl-C does."""

    def views(self, start, stop):
        yield from islice(super().views(start, stop), 50)
        raise KeyboardInterrupt


def test_a_former_report_stays_until_the_new_one_is_whole(tmp_path):
    folder = tmp_path / "deep" / "report"
    with pytest.raises(KeyboardInterrupt):
        write_report(Stopped(300), folder)
    assert list(folder.parent.iterdir()) == []
    folder.mkdir()  # an empty folder is free
    write_report(MADE, folder)
    before = everything(folder)
    with pytest.raises(KeyboardInterrupt):
        write_report(Stopped(300), folder)
    with largest_file(1000), pytest.raises(OSError, match="write_report: a report must be written"):
        write_report(MADE, folder)
    assert everything(folder) == before and list(folder.parent.iterdir()) == [folder]
    # as a kill leaves it: between the two renames, and in the middle of writing
    partial, former = (folder.with_name(f".report.{end}") for end in ("partial", "former"))
    os.rename(folder, former)
    (partial / "data").mkdir(parents=True)
    (partial / "data" / "features-00000.js").write_text("reportD")
    with pytest.raises(KeyboardInterrupt):
        write_report(Stopped(300), folder)
    assert everything(folder) == before and list(folder.parent.iterdir()) == [folder]
    write_report(MadeUp(9), folder)
    assert is_report(folder, "test") and len(everything(folder)) == 6
    assert list(folder.parent.iterdir()) == [folder]


def test_what_is_not_a_report_is_never_touched(tmp_path):
    ours = tmp_path / "ours"
    write_report(MadeUp(9), ours)
    for number, make in enumerate(
        (
            lambda path: path.write_text("mine"),
            lambda path: path.symlink_to(ours),
            lambda path: (path.mkdir(), (path / "index.html").write_text("mine")),
            lambda path: (path.mkdir(), (path / "report.json").write_text('{"files": []}')),
            lambda path: (path.mkdir(), (path / "report.json").write_text("{")),
            lambda path: (write_report(MadeUp(9), path), (path / "notes.txt").write_text("mine")),
            lambda path: (write_report(MadeUp(9), path), (path / "data" / "more").mkdir()),
        )
    ):
        folder = tmp_path / f"theirs{number}"
        make(folder)
        before = everything(tmp_path)
        with pytest.raises(FileExistsError, match=f"{folder.name} must be absent, empty or a form"):
            write_report(MADE, folder)
        assert everything(tmp_path) == before and not is_report(folder, "test")
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="new.partial must be absent or what an interrupted"):
        write_report(MADE, tmp_path / "new")
    assert not (tmp_path / "new").exists() and (tmp_path / ".new.partial" / "mine.txt").exists()
