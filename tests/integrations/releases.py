# SPDX-License-Identifier: Apache-2.0
"""The tests of `accelerate` against other releases of the libraries than the installed ones.

    make test-releases
    .venv/bin/python tests/integrations/releases.py eai-sparsify

Each release is installed by itself, without dependencies, into a folder that is kept, and comes
first on the path of a process of its own; all else is the environment's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

# package -> what is imported, and its releases
RELEASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sae-lens": ("sae_lens", ("6.44.4", "6.46.1", "6.48.0", "6.50.1", "6.52.0", "6.54.12")),
    "dictionary-learning": ("dictionary_learning", ("0.1.0",)),
    "eai-sparsify": (
        "sparsify",
        (
            *("0.0.1", "1.0.0", "1.1.0", "1.1.1", "1.1.2", "1.1.3", "1.2.0", "1.2.1", "1.2.2"),
            *("1.3.0", "1.3.1", "1.3.2", "1.3.3"),
        ),
    ),
}
TESTS = {
    "sae-lens": "test_saelens.py",
    "dictionary-learning": "test_dictionary_learning.py",
    "eai-sparsify": "test_sparsify.py",
}
ROOT = Path(__file__).resolve().parents[2]
AT_A_TIME = 2


@dataclass
class Result:
    release: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    why: str = ""

    @property
    def good(self) -> bool:
        return self.passed > 0 and not self.failed and not self.why

    def __str__(self) -> str:
        counts = f"{self.passed:5} passed {self.failed:4} failed {self.skipped:4} skipped"
        return f"{self.release:28}{counts} {self.seconds:6.1f} s  {self.why}".rstrip()


def run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def install(package: str, version: str, folder: Path) -> str:
    """Into a folder of its own, unless it is there; what went wrong, if anything."""
    if folder.exists():
        return ""
    begun = folder.with_name(f"{folder.name}.begun-{os.getpid()}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = run([*pip, "--no-deps", "--target", str(begun), f"{package}=={version}"])
    if done.returncode:
        shutil.rmtree(begun, ignore_errors=True)
        return f"not installed: {(done.stderr.strip() or 'pip failed').splitlines()[-1]}"
    begun.rename(folder)
    return ""


def test(package: str, version: str, below: Path) -> Result:
    result, start = Result(f"{package} {version}"), time.monotonic()
    folder = below / f"{package}-{version}"
    result.why = install(package, version, folder)
    if not result.why:
        _test(package, folder, result)
    result.seconds = time.monotonic() - start
    print(result, flush=True)
    return result


def _test(package: str, folder: Path, result: Result) -> None:
    module = RELEASES[package][0]
    path = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    find = f"import importlib.util as u; print(u.find_spec({module!r}).origin)"
    found = run([sys.executable, "-P", "-c", find], **path).stdout.strip()
    if not found.startswith(str(folder)):
        result.why = f"{module} is that of {found or 'nowhere'}"
        return
    report, log = (folder.with_name(f"{folder.name}.{kind}") for kind in ("xml", "log"))
    report.unlink(missing_ok=True)
    tests = f"tests/integrations/accelerate/{TESTS[package]}"
    pytest = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", tests]
    done = run([*pytest, f"--junitxml={report}"], **path)
    log.write_text(done.stdout + done.stderr)
    if not report.exists():
        result.why = f"pytest ended with {done.returncode}; see {log}"
        return
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {n: int(suite.get(n, 0)) for n in ("tests", "failures", "errors", "skipped")}
    result.failed = counts["failures"] + counts["errors"]
    result.skipped = counts["skipped"]
    result.passed = counts["tests"] - result.failed - result.skipped
    if result.failed:
        result.why = f"see {log}"
    elif not result.passed:
        result.why = "nothing ran"


def main() -> int:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("packages", nargs="*", help=f"of {', '.join(RELEASES)}; all by default")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "releases", help="kept")
    given = parser.parse_args()
    if unknown := {*given.packages} - {*RELEASES}:
        parser.error(f"expected packages of {', '.join(RELEASES)}, got {', '.join(unknown)}")
    below = given.folder.resolve()
    below.mkdir(parents=True, exist_ok=True)
    pairs = [(p, v) for p in given.packages or RELEASES for v in RELEASES[p][1]]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        results = list(pool.map(lambda pair: test(*pair, below), pairs))
    bad = [r.release for r in results if not r.good]
    print(f"{len(results) - len(bad)} of {len(results)} releases passed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
