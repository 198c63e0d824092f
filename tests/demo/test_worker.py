# SPDX-License-Identifier: Apache-2.0
"""The training process: its memory's peak, and the settings that it reads."""

import json

import pytest

from mikernels.demo.worker import read_spec, reset_peak, resident_bytes


@pytest.mark.skipif(resident_bytes("VmRSS") is None, reason="needs /proc")
def test_peak_memory_is_that_of_the_run(run_python):
    if not reset_peak():
        pytest.skip("the kernel does not let a process reset its peak")
    # in a process of its own, as the demo's worker is: a heap of other tests may have room already
    held, left = map(
        int,
        run_python("""
            import torch
            from mikernels.demo.worker import reset_peak, resident_bytes
            assert reset_peak()
            before = resident_bytes("VmRSS")
            block = torch.ones(100 << 20, dtype=torch.uint8)
            held = resident_bytes("VmHWM") - before
            del block
            assert reset_peak()
            print(held, resident_bytes("VmHWM") - before)
        """).split(),
    )
    assert 95 << 20 < held < 130 << 20 and left < 50 << 20


SPEC = {
    "activations": "a",
    "seed": 0,
    "out_dir": None,
    "architecture": "topk",
    "sae": {},
    "config": {},
}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": True}, "seed"),
        ({"sae": []}, "sae"),
        ({"activations": None}, "activations"),
        ({"architecture": None}, "architecture"),
        ({"architecture": "nothing"}, r"architecture: one of \['batch_topk', .*, got 'nothing'"),
        ({"more": 1}, "more"),
    ],
)
def test_the_settings_of_a_run_are_checked(tmp_path, change, field):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(SPEC))
    assert read_spec(path) == SPEC
    path.write_text(json.dumps({**SPEC, **change}))
    with pytest.raises(ValueError, match=f"demo: {path} must hold {field}"):
        read_spec(path)
