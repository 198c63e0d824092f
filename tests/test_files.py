# SPDX-License-Identifier: Apache-2.0
"""Files: whole or absent, strictly read, one writer, nothing that is not ours touched."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from full_disk import largest_file
from oracle import identical, randn
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mikernels import files, owning
from mikernels.files import check_json, check_seal, parse_json, read_json, sealed, write_json
from mikernels.owning import LOCK, owned
from mikernels.tensor_files import overlap, read_tensors, write_tensors


def test_a_failed_write_leaves_the_former_file_alone(tmp_path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"n": 1})
    with largest_file(1000), pytest.raises(OSError) as raised:
        write_json(path, ["x" * 5000])
    assert raised.value.errno == errno.EFBIG
    assert json.loads(path.read_text()) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_write_follows_no_link_and_spares_other_names_of_a_file(tmp_path) -> None:
    mine = tmp_path / "mine"
    for make in (os.symlink, os.link):
        mine.write_text("mine")
        for name in (".a.json.partial", "a.json"):
            (tmp_path / name).unlink(missing_ok=True)
            make(mine, tmp_path / name)
        write_json(tmp_path / "a.json", 3)
        assert mine.read_text() == "mine" and not (tmp_path / "a.json").is_symlink()
        assert (tmp_path / "a.json").read_text() == "3\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": NaN}', "NaN, which is no JSON number"),
        (b"[-Infinity]", "-Infinity, which is no JSON number"),
        (b"[1e999]", "1e999, which is beyond a double"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' twice in an object"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' twice"),
        (b"\xef\xbb\xbf{}", "a byte order mark"),
        ('{"a": "é"}'.encode("latin-1"), "bytes that are not UTF-8 at 7"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"[" * 100_000, "nesting deeper than 64"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nesting deeper than 64"),
        (b"", "no JSON"),
        (b"\0\0\0", "no JSON"),
        (b'{"a": 1', "no JSON"),
        (b"{} {}", "no JSON"),
        (b"1" * 5000, "1, which is beyond a double"),
        (b"[-1" + b"0" * 309 + b"]", "0, which is beyond a double"),
    ],
)
def test_json_is_read_strictly(text, reason, tmp_path) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=rf"f: {path} must be a thing, got .*{reason}.*; mend"):
        read_json(path, "f", "a thing", "mend it")


def test_what_is_read_must_be_a_regular_file_of_a_bounded_size(tmp_path, monkeypatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, kind in (("fifo", "a FIFO"), ("folder", "a folder"), ("zero", "a device")):
        with pytest.raises(ValueError, match=f"got {kind}; fix"):
            read_json(tmp_path / name, "f", "JSON", "fix")
        with pytest.raises(ValueError, match=kind):
            read_tensors(tmp_path / name)
    for name in ("dangling", "absent"):
        with pytest.raises(FileNotFoundError, match=f"f: .*{name} must be JSON, got no such file"):
            read_json(tmp_path / name, "f", "JSON", "fix")
    (tmp_path / "big").write_text("[" + "1," * 100 + "1]")
    monkeypatch.setattr(files, "LARGEST_JSON", 100)
    with pytest.raises(ValueError, match="203 bytes"):
        read_json(tmp_path / "big", "f", "JSON", "fix")


def test_what_json_would_change_is_refused() -> None:
    check_json({"a": [1, 10**308, 2.5, None, True, "x", (1, 2)]}, "state")
    cyclic: list = []
    cyclic.append(cyclic)
    for value, error, said in (
        ({"a": {1: 2}}, TypeError, "state.a must have names that are strings, got 1"),
        ({"a": [0.0, float("nan")]}, ValueError, "state.a.1 must be finite, got nan"),
        ({"a": -(10**309)}, ValueError, "state.a must be within a double, got 1027 bits"),
        ({"a": torch.zeros(1)}, TypeError, "state.a must be JSON-able, got Tensor"),
        ({"a": {1, 2}}, TypeError, "state.a must be JSON-able, got set"),
        (cyclic, ValueError, "must be nested at most 60 deep"),
    ):
        with pytest.raises(error, match=said):
            check_json(value, "state")


def test_a_seal_sees_every_change_but_the_layout() -> None:
    value = json.loads(json.dumps(sealed({"a": 0.1, "b": [1, {"c": None}]}, **{"x.bin": "00"})))
    check_seal(value)
    check_seal(dict(reversed(value.items())))
    for changed in (
        {**value, "a": 0.10000000000000002},
        {**value, "b": [True, {"c": None}]},
        {**value, "d": 0},
        {**value, "sha256": {**value["sha256"], "x.bin": "01"}},
        {**value, "sha256": {"x.bin": "00"}},
        {k: v for k, v in value.items() if k != "a"},
    ):
        with pytest.raises(ValueError, match="contents with SHA-256"):
            check_seal(changed)


def test_tensor_files_are_those_of_the_library(tmp_path) -> None:
    tensors = {
        "f": randn(3, 5).mT,
        "b": randn(7, dtype=torch.bfloat16)[::2],
        "d": randn(2, dtype=torch.float64),
        "i": torch.arange(4),
        "u": torch.arange(5, dtype=torch.uint8),
        "t": torch.tensor([True, False]),
        "s": torch.tensor(2.5),
        "e": torch.zeros(0, 3),
    }
    path = tmp_path / "a.safetensors"
    hashed = write_tensors(path, tensors, {"who": "me"})
    assert hashed == subprocess.check_output(["sha256sum", path], text=True).split()[0]
    for read in (load_file(path), read_tensors(path, hashed)):
        assert read.keys() == tensors.keys()
        for name, t in tensors.items():
            assert read[name].dtype == t.dtype and identical(read[name], t.contiguous())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"who": "me"}
    save_file({"f": randn(2)}, tmp_path / "b")
    assert identical(read_tensors(tmp_path / "b")["f"], randn(2))
    for t in (torch.zeros(2, dtype=torch.complex64), torch.zeros(2).to_sparse()):
        with pytest.raises(TypeError, match="f must be dense, of one of"):
            write_tensors(path, {"f": t})


def test_every_flipped_bit_of_a_tensor_file_is_seen(tmp_path) -> None:
    path = tmp_path / "a"
    hashed = write_tensors(path, {"w": randn(8, 4)})
    whole = bytearray(path.read_bytes())
    for at in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[at] ^= 1 << (at % 8)
        path.write_bytes(changed)
        with pytest.raises(ValueError):
            read_tensors(path, hashed)
    path.write_bytes(whole)
    read_tensors(path, hashed)


HEADERS = {
    "huge": {"a": {"dtype": "F32", "shape": [10**18, 10], "data_offsets": [0, 4]}},
    "beyond": {"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}},
    "bogus": {"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}},
    "list": [1],
    "four bits": {"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_are_value_errors(name, tmp_path) -> None:
    text = json.dumps(HEADERS[name]).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    with pytest.raises(ValueError):
        read_tensors(tmp_path / "a")


def test_overlap_is_found_and_neighbours_are_not() -> None:
    whole = torch.zeros(10, 4)
    assert overlap({"a": whole, "b": whole}) == ("a", "b")
    assert overlap({"a": whole[:6], "c": randn(3), "b": whole[5:]}) == ("a", "b")
    assert overlap({"a": whole[:5], "b": whole[5:], "c": whole[:0]}) is None


HOLD = """
    import sys, time
    from pathlib import Path
    from mikernels.owning import owned
    with owned(Path(sys.argv[1]), "another run"):
        print("held", flush=True)
        sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(HOLD), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_told_of_the_first(tmp_path) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(BlockingIOError) as raised, owned(tmp_path, "mine"):
            raise AssertionError("two writers")
    finally:
        process.communicate("")
    said = str(raised.value)
    assert f"mine: {tmp_path} must have one writer at a time" in said
    assert f"another run of process {process.pid} on {os.uname().nodename} since 20" in said
    # within one process, too
    mine = pytest.raises(BlockingIOError, match=f"process {os.getpid()} ")
    with owned(tmp_path, "mine"), mine, owned(tmp_path, "again"):
        raise AssertionError("two writers")
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_owner_is_taken_over(tmp_path) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK).exists()
    with owned(tmp_path, "mine"):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_released_lock_file_that_somebody_has_open_locks_nothing(tmp_path, monkeypatch) -> None:
    """The first owner ends between the second's opening of the file and its locking."""
    flock, first = owning.fcntl.flock, owned(tmp_path, "first")
    first.__enter__()
    calls = []

    def late(descriptor: int, how: int) -> None:
        if not calls:
            calls.append(first.__exit__(None, None, None))
        flock(descriptor, how)

    monkeypatch.setattr(owning.fcntl, "flock", late)
    with owned(tmp_path, "second"):
        assert (tmp_path / LOCK).exists()
        with pytest.raises(BlockingIOError, match="beside second"), owned(tmp_path, "third"):
            raise AssertionError("two writers")


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(owning.fcntl, "flock", none)
    with pytest.warns(RuntimeWarning, match="a file system without locks"), owned(tmp_path, "f"):
        pass


@pytest.mark.parametrize("kind", ["a FIFO", "a file of two names"])
def test_what_has_the_locks_name_is_neither_waited_for_nor_written_to(kind, tmp_path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (tmp_path / "out").mkdir()
    lock = tmp_path / "out" / LOCK
    os.mkfifo(lock) if kind == "a FIFO" else os.link(mine, lock)
    refused = pytest.raises(FileExistsError, match=f"me: {lock} must be a lock of ours.*got {kind}")
    with refused, owned(tmp_path / "out", "me"):
        raise AssertionError("owned")
    assert lock.exists() and mine.read_text() == "precious"


def test_a_lock_that_a_full_disk_leaves_unsigned_is_released_and_explained(tmp_path) -> None:
    full = pytest.raises(OSError, match="me: a lock must be written to .* got File too large; free")
    with largest_file(0), full, owned(tmp_path, "me"):
        raise AssertionError("owned")
    with owned(tmp_path, "me"):
        assert json.loads((tmp_path / LOCK).read_text())["as"] == "me"


@pytest.mark.parametrize("lost", ["replaced by a file", "a lock that cannot be removed"])
def test_releasing_a_lock_does_not_mask_the_error_under_way(lost, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "out"
    folder.mkdir()

    def refuse(self, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.raises(ZeroDivisionError), owned(folder, "me"):
        if lost == "replaced by a file":
            folder.rename(tmp_path / "away")
            folder.write_text("mine")
        else:
            monkeypatch.setattr(Path, "unlink", refuse)
        raise ZeroDivisionError
    monkeypatch.undo()
    if folder.is_dir():
        with owned(folder, "next"):
            assert json.loads((folder / LOCK).read_text())["as"] == "next"


def test_an_owner_sees_that_its_folder_was_replaced(tmp_path) -> None:
    folder = tmp_path / "a"
    for state in ("it was deleted", "another folder in its place"):
        folder.mkdir(exist_ok=True)
        with owned(folder, "mine") as lock:
            lock.check()
            folder.rename(tmp_path / state)
            if state.startswith("another"):
                folder.mkdir()
            with pytest.raises(FileNotFoundError, match=f"mine: {folder} must stay .*{state}"):
                lock.check()


def test_importing_the_package_imports_no_pydantic(run_python) -> None:
    said = run_python(
        """
        import sys, mikernels, mikernels.training
        print([name for name in ("pydantic", "mikernels.schema") if name in sys.modules])
        """
    )
    assert said.strip() == "[]"


def test_a_damaged_record_of_the_build_is_named(tmp_path, monkeypatch) -> None:
    from mikernels import _built

    monkeypatch.setattr(_built, "__file__", str(tmp_path / "_built.py"))
    assert "not installed" in _built.build_facts()["reason"]
    for text in ("{", "[]", '{"cuda": 3}'):
        (tmp_path / "_build.json").write_text(text)
        facts = _built.build_facts()
        assert facts["extension"] is False and str(tmp_path / "_build.json") in facts["reason"]
