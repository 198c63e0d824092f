# SPDX-License-Identifier: Apache-2.0
"""`.npy` files as shards; pickles are refused and never read."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mikernels.activations import ShardSource
from mikernels.activations.shards import open_shards

X = np.random.default_rng(0).standard_normal((700, 6)).astype(np.float32)


def write(path, x):
    np.save(path, x)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        np.asfortranarray,
        lambda x: x.astype(">f4"),
        lambda x: x.astype(np.float16),
        lambda x: x.astype(np.float64),
    ],
    ids=["plain", "by columns", "big-endian", "half", "double"],
)
def test_rows_of_arrays(tmp_path, change):
    x = change(X)
    (shard,) = open_shards(write(tmp_path / "x.npy", x))
    expected = torch.from_numpy(np.array(x, dtype=x.dtype.newbyteorder("="), order="C"))
    for start, stop in ((0, 700), (255, 300), (690, 999), (5, 5)):
        assert torch.equal(shard.read(start, stop)["activations"], expected[start:stop])
    assert shard.dtype == expected.dtype and shard.row_bytes == 6 * x.itemsize


def test_folders_lists_and_exact_resume(tmp_path):
    for number, part in enumerate(np.split(X, [300, 310])):
        write(tmp_path / f"{number}.npy", part)
    save_file({"activations": torch.from_numpy(X)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="hold files of one kind, got other.safetensors and 0.npy"):
        ShardSource(tmp_path)
    assert ShardSource([tmp_path / "0.npy", tmp_path / "other.safetensors"]).n_rows == 1000
    (tmp_path / "other.safetensors").unlink()
    source, twin = ShardSource(tmp_path, 100), ShardSource([tmp_path], 100)
    seen = torch.cat([source.next_batch() for _ in range(7)])
    assert torch.equal(seen.sort(0).values, torch.from_numpy(X).sort(0).values)
    assert not torch.equal(seen, torch.from_numpy(X))
    state, following = source.state_dict(), source.next_batch()
    twin.load_state_dict(state)
    assert torch.equal(twin.next_batch(), following)
    write(tmp_path / "3.npy", X[:, :3])
    with pytest.raises(ValueError, match=r"3.npy must be \[rows, 6\] .* got \[700, 3\]"):
        ShardSource(tmp_path)
    with pytest.raises(ValueError, match="must name at least one file or folder, got none"):
        ShardSource([])


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: np.save(p, X[:, 0]), ValueError, r"be \[rows, d\], got \[700\]; reshape"),
        (lambda p: np.save(p, X[None]), ValueError, r"be \[rows, d\], got \[1, 700, 6\]"),
        (lambda p: np.save(p, X[:0]), ValueError, r"at least one row and column, got \[0, 6\]"),
        (lambda p: np.save(p, X[:, :0]), ValueError, "at least one row and column"),
        (lambda p: np.save(p, X.astype(int)), TypeError, "float64, got int64; convert it with"),
        (lambda p: np.save(p, X + 1j), TypeError, "got complex64; convert"),
        (lambda p: np.save(p, X.astype("f2").view("V2")), TypeError, "save bfloat16 as .safe"),
        (lambda p: np.save(p, np.array([[Touch(f"{p}.ran")]], object), allow_pickle=True),
         ValueError, "got object, pickled objects, which are not read: they run code"),
        (lambda p: p.write_bytes(b""), ValueError, "be a complete .npy file of .rows, d., got"),
        (lambda p: p.write_bytes(b"PK\3\4" * 99), ValueError, "magic string is not correct"),
        (lambda p: (np.save(p, X), p.write_bytes(p.read_bytes()[:-5])), ValueError, "cut short"),
        (lambda p: (np.save(p, X), p.write_bytes(p.read_bytes()[:50])), ValueError, "got EOF"),
    ],
)  # fmt: skip
def test_bad_arrays_are_named(tmp_path, make, error, message):
    make(tmp_path / "x.npy")
    with pytest.raises(error, match=f"x.npy must .*{message}"):
        ShardSource(tmp_path)
    assert not (tmp_path / "x.npy.ran").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.PTH", "x.bin", "x.pkl", "x.ckpt"])
def test_pickles_are_refused_with_a_way_that_works(tmp_path, name, monkeypatch):
    torch.save(torch.from_numpy(X), tmp_path / name)
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match="got a pickle, which can run any code") as refused:
            ShardSource(place)
    way = str(refused.value).partition(":\n")[2]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in way.splitlines()))
    assert np.array_equal(load_file(tmp_path / "x.safetensors")["activations"].numpy(), X)
    assert ShardSource(tmp_path / "x.safetensors").n_rows == 700
