# SPDX-License-Identifier: Apache-2.0
"""One training run in a process of its own: `python -m mikernels.demo.worker SPEC.json`.

A fresh process makes the peak of its memory its own. The peak is that of the resident set while the
run trains, above what is resident before the first step: the activations and the SAE's weights. So
it holds gradients, optimiser state and temporaries. Activations are read into memory, not mapped:
pages of a map would count as the run touches them.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mikernels.activations import TensorSource
from mikernels.activations.shards import load_rows
from mikernels.demo.data import held_out
from mikernels.files import explained, finite, read_json, write_json
from mikernels.machine import reset_peak, resident_bytes
from mikernels.nn import ARCHITECTURES
from mikernels.training import TrainConfig, Trainer


def read_spec(path: Path) -> dict[str, Any]:
    """`run.json`: see `train`.

    Raises:
        FileNotFoundError, ValueError: naming the file and the field.
    """
    from mikernels.schema import Spec, check

    fix = "run the demo again"
    raw = read_json(path, "demo", "the settings of a run", fix)
    spec = check(Spec, raw, "demo", path, fix).model_dump()
    if spec["architecture"] not in ARCHITECTURES:
        raise ValueError(
            f"demo: {path} must hold architecture: one of {sorted(ARCHITECTURES)}, got "
            f"{spec['architecture']!r}; {fix}"
        )
    return spec


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Train as `spec` says: activations (a shard folder), architecture, sae and config (keyword
    arguments), seed, out_dir or None. Returns rows, scale, parts (seconds), steps and
    peak_extra_bytes or None."""
    rows, _ = load_rows(Path(spec["activations"]))
    x = rows["activations"][~held_out(rows, spec["seed"])].float()
    del rows
    config = TrainConfig(**spec["config"])
    generator = torch.Generator().manual_seed(spec["seed"])
    variant: Any = ARCHITECTURES[spec["architecture"]]
    sae = variant(x.shape[1], generator=generator, **spec["sae"])
    source = TensorSource(x, seed=spec["seed"])
    # matmul's own buffers and thread stacks are there before the peak starts
    sae.w_enc.detach() @ x[0]
    before = resident_bytes("VmRSS")
    measured = reset_peak()
    quiet = not sys.stderr.isatty()  # a line a step is too much for a log
    trainer = Trainer(sae, source, config, out_dir=spec["out_dir"], quiet=quiet)
    history = trainer.run()
    peak = resident_bytes("VmHWM")
    extra = None if not measured or peak is None or before is None else max(0, peak - before)
    return {**asdict(history), "steps": trainer.step, "peak_extra_bytes": extra}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    result = train(read_spec(path))
    answer = path.with_suffix(".result.json")
    with explained("demo", "the result of a run", answer, "free space"):
        write_json(answer, finite(result))
