# SPDX-License-Identifier: Apache-2.0
"""One command for a machine with a GPU: build, test, check, measure, and merge into one file.

Run by bench/gpu_check.sh before anything is installed, so this file needs Python and torch alone.
Each part is a process with its own time limit. A part that has succeeded is kept while its record
lies in out/gpu_check or in $OUT, so that a run that was cut short goes on. A failing part is
recorded with the end of its output. $OUT gets two files, anew after every part: a run may be
stopped from outside, and what fetches files may take a few only. Exit code: 0 all right, 1 a part
failed, 2 no GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "out" / "gpu_check"
MERGED, LOGS = "gpu_check.json", "gpu_check_logs.tar.gz"
TAIL = 4000
# a part that is stopped gets this long to end by itself
GRACE = 5.0


def alone(path: str) -> ModuleType:
    """A file of the package, loaded by itself: the package is what is yet to be built."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_json(path: Path, value: Any) -> None:
    # a NaN among the findings must not cost the others
    alone("mikernels/files.py").write_atomic(path, json.dumps(value, indent=1) + "\n")


@dataclass(frozen=True)
class Part:
    """A process.

    Attributes:
        command: words; "{out}" is the folder of the records, "{tool}" where the tool is.
        seconds: its limit.
        result: the JSON file that it leaves in that folder, merged into the whole.
        tool: a program that it needs; where it is missing the part is absent, not failed.
        env: added to the environment; "{out}" as in command.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    result: str = ""
    tool: str = ""
    env: Mapping[str, str] = field(default_factory=dict)


def parts(python: str = sys.executable) -> list[Part]:
    """Everything, in the order of what must not be missed when time runs out."""

    def check(name: str, seconds: float) -> Part:
        result = f"{name}.result.json"
        words = (python, "-m", "mikernels.bench.gpu.gpu_parts", name, f"{{out}}/{result}")
        return Part(name, words, seconds, result)

    def cli(name: str, seconds: float, words: str, result: str = "") -> Part:
        command = (python, "-c", "from mikernels.cli import main; main()", *words.split())
        # what tune finds, crossover uses
        return Part(name, command, seconds, result, env={"XDG_CACHE_HOME": "{out}/cache"})

    def sanitizer(tool: str, seconds: float) -> Part:
        tiny = (
            python,
            "-m",
            "mikernels.bench.gpu.gpu_parts",
            "tiny",
            f"{{out}}/{tool}.result.json",
        )
        words = ("{tool}", "--tool", tool, "--error-exitcode", "9", *tiny)
        # cached blocks would hide an access beyond a tensor's end
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Part(tool, words, seconds, f"{tool}.result.json", "compute-sanitizer", env)

    # each worker compiles its kernels, a core each
    cores = max(1, (os.cpu_count() or 1) - 2)
    workers = ["-n", str(cores)] if importlib.util.find_spec("xdist") else []
    # a line per test: where the part is stopped, its log says what had passed
    pytest = (python, "-m", "pytest", "-vv", "--tb", "short", "--maxfail", "60", *workers)
    install = "-m pip install --no-build-isolation --no-deps --disable-pip-version-check -e ."
    ops = alone("bench/ops/__init__.py").names(gpu=True)
    save = "--device cuda --budget 2 --resume --json {out}/"
    # Inductor takes half a minute an operator, so it is measured at one shape
    compiled = (
        f"bench all --providers ours,compile --shape G2 --mode fwd,step {save}bench_compile.json"
    )
    quick = f"--providers *,!compile {save}bench.json"
    # at G2 all trainers together would be 184 GB
    libraries = f"bench integrations --shape G1 {save}bench.json"
    return [
        Part("build", (python, *install.split()), 240, env=build_env()),
        # what bounds stand on, and what a GPU alone can tell of results
        check("matrix_units", 60),
        check("facts", 60),
        check("once", 120),
        Part("tests", (*pytest, "tests/device"), 240),
        check("determinism", 90),
        check("graph", 60),
        sanitizer("memcheck", 100),
        # what the result is for
        *(cli(f"bench_{op}", 60, f"bench {op} {quick}", "bench.json") for op in ops),
        check("falsify", 60),
        check("two_devices", 60),
        *(sanitizer(tool, 100) for tool in ("racecheck", "initcheck", "synccheck")),
        cli("libraries", 120, libraries, "bench.json"),
        check("compile", 120),
        cli("tune", 60, "tune --device cuda", "cache/mikernels/tuned.json"),
        cli("crossover", 60, "bench crossover --device cuda"),
        cli("bench_compile", 180, compiled, "bench_compile.json"),
        Part(
            "cpu_tests", (*pytest, "tests/ops/test_row_topk.py", "tests/ops/test_dispatch.py"), 120
        ),
    ]


def build_env() -> dict[str, str]:
    """One architecture compiles quickest."""
    if "MIKERNELS_ARCHS" not in os.environ and (found := capability()):
        return {"MIKERNELS_ARCHS": found}
    return {}


@functools.cache
def capability() -> str:
    """Of the first GPU, e.g. "9.0"; "" without torch or a GPU."""
    code = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else ""


def run_part(part: Part, out: Path, limit: float) -> dict[str, Any]:
    """Runs one part; its output goes to a file, its end into the record."""
    tool = located(part.tool) if part.tool else ""
    if tool is None:
        return {"status": "absent", "reason": f"there is no {part.tool}", "seconds": 0.0}
    log = out / f"{part.name}.log"
    command = [word.replace("{out}", str(out)).replace("{tool}", tool) for word in part.command]
    own = {name: word.replace("{out}", str(out)) for name, word in part.env.items()}
    began = time.monotonic()
    record: dict[str, Any] = {"command": " ".join(part.command[1:]), "limit_s": round(limit, 1)}
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **own},
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            return {**record, "status": "failed", "reason": str(error), "seconds": 0.0}
        code = _wait(process, limit)
    record["seconds"] = round(time.monotonic() - began, 1)
    tail = log.read_text(errors="replace")[-TAIL:]
    if code is None:
        return {**record, "status": "timeout", "reason": f"longer than {limit:.0f} s", "tail": tail}
    if code:
        return {**record, "status": "failed", "reason": f"exit code {code}", "tail": tail}
    return {**record, "status": "ok", "tail": tail.splitlines()[-1:]}


def located(tool: str) -> str | None:
    """A program on PATH or in a CUDA toolkit."""
    toolkits = filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda"))
    beside = os.pathsep.join(f"{folder}/bin" for folder in toolkits)
    return shutil.which(tool) or shutil.which(tool, path=beside)


def _wait(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """The exit code, or None after stopping the part and everything that it started."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
                process.wait(GRACE)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        return None


def check(
    chosen: Sequence[Part],
    folders: Sequence[Path],
    *,
    force: bool = False,
    budget: float = 570.0,
    say: Callable[[str], None] = print,
    done: Callable[[dict[str, dict[str, Any]]], object] = lambda records: None,
) -> dict[str, dict[str, Any]]:
    """Runs what has not succeeded yet, while the budget lasts; records are in folders[0].

    done: called with the records so far after every part that ran.
    """
    out = folders[0]
    out.mkdir(parents=True, exist_ok=True)
    records, began = {}, time.monotonic()
    for part in chosen:
        old = None if force else _done(part, folders)
        left = budget - (time.monotonic() - began)
        if old:
            record = old
            say(f"{part.name}: kept, {old['status']}")
        elif left < 1:
            record = {"status": "not run", "reason": "the budget is spent", "seconds": 0.0}
            say(f"{part.name}: not run, the budget of {budget:.0f} s is spent")
        else:
            say(f"{part.name} ...")
            record = run_part(part, out, min(part.seconds, left))
            write_json(out / f"{part.name}.json", record)
            reason = record.get("reason", "")
            say(f"{part.name}: {record['status']} in {record['seconds']:.0f} s {reason}".rstrip())
            if record["status"] in ("failed", "timeout"):
                say("\n".join("    " + line for line in record.get("tail", "").splitlines()[-12:]))
        records[part.name] = record
        if not old:
            done(records)
    return records


def _done(part: Part, folders: Sequence[Path]) -> dict[str, Any] | None:
    for folder in folders:
        merged = (_json(folder / MERGED) or {}).get("parts", {})
        for record in (_json(folder / f"{part.name}.json"), merged.get(part.name)):
            if record and record.get("status") == "ok":
                return record
    return None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def merge(chosen: Sequence[Part], records: dict[str, Any], folders: Sequence[Path]) -> Path:
    """One file of every record and every result, in each of the folders."""
    known = {part.name: records.get(part.name) or _done(part, folders) for part in chosen}
    results = {}
    for name in filter(None, (part.result for part in chosen)):
        key = Path(name).name.removesuffix(".json").removesuffix(".result")
        earlier = ((_json(f / MERGED) or {}).get("results", {}).get(key) for f in folders)
        found = next(filter(None, (*(_json(f / name) for f in folders), *earlier)), None)
        if found:
            results[key] = found
    facts = results.get("facts", {})
    whole = {"schema": 1, "facts": facts, "parts": known, "results": results}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MERGED, whole)
    for folder in folders[1:]:
        with tarfile.open(folder / LOGS, "w:gz") as archive:
            for log in sorted(folders[0].glob("*.log")):
                archive.add(log, log.name)
    return folders[-1] / MERGED


def main(words: Sequence[str] | None = None) -> int:
    began, everything = time.monotonic(), parts()
    names = [part.name for part in everything]
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", action="append", choices=names, help="a part; repeatable")
    parser.add_argument("--force", action="store_true", help="run again what has succeeded")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds in all (570)")
    given = parser.parse_args(words)
    if not capability():
        print("gpu_check: no CUDA device: torch sees none; run this on a machine with a GPU")
        return 2
    folders = [RECORDS, *([Path(os.environ["OUT"])] if os.environ.get("OUT") else [])]
    chosen = [part for part in everything if not given.only or part.name in given.only]
    records = check(
        chosen,
        folders,
        force=given.force,
        # finding the GPU took some of it
        budget=given.budget - (time.monotonic() - began),
        done=lambda records: merge(everything, records, folders),
    )
    path = merge(everything, records, folders)
    bad = [name for name, r in records.items() if r["status"] not in ("ok", "absent")]
    print(f"gpu_check: wrote {path}; " + (f"failed: {', '.join(bad)}" if bad else "all right"))
    return 1 if bad else 0


if __name__ == "__main__":
    # this folder's modules belong to a package: none of them may be found as a top-level one
    here = Path(__file__).resolve().parent
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != here]
    sys.exit(main())
