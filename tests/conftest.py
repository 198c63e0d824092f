# SPDX-License-Identifier: Apache-2.0
"""Every test runs on poisoned memory, with a pinned hypothesis profile, at every level."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

import mikernels
from mikernels import _ext

# what tests share is imported by name: pyproject.toml has the folder on sys.path
pytest.register_assert_rewrite(*(p.stem for p in Path(__file__).parent.glob("support/*.py")))

# without the extension there is one implementation; with it, a level is skipped only by processor
LEVELS = _ext.LEVELS if mikernels.supported_levels() else ()

hypothesis.settings.register_profile(
    "pinned",
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    # `impl` forces a level once for all examples, which is what is wanted
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("pinned")


def pytest_report_header() -> str:
    state = ", ".join(mikernels.supported_levels()) or f"no extension ({_ext.MISSING})"
    return f"mikernels {mikernels.__version__}, torch {torch.__version__}, levels: {state}"


# the tests of what has bodies of its own at avxvnni; elsewhere that level is avx2
SCREENS = "encode", "batch_topk_encode", "threshold_encode", "groupmax_encode", "pairwise_topk"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, same = [], []
    for item in items:
        callspec = getattr(item, "callspec", None)
        again = callspec is not None and "avxvnni" in callspec.params.values()
        screens = item.path.stem in (f"test_{op}" for op in SCREENS)
        (same if again and not screens else kept).append(item)
    config.hook.pytest_deselected(items=same)
    # minutes in one test: at the end the other worker would have nothing left to do meanwhile
    items[:] = sorted(kept, key=lambda item: item.path.stem != "test_sanitizers")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` returns NaN and INT_MAX, so an output that is not fully written is seen."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level of the extension, forced."""
    if request.param not in mikernels.supported_levels():
        pytest.skip(f"processor lacks {request.param}")
    with mikernels.force_level(request.param):
        yield request.param


@pytest.fixture(params=["reference", *LEVELS])
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation as an `impl` argument: the reference, and cpp at each level, forced."""
    if request.param == "reference":
        yield "reference"
        return
    if request.param not in mikernels.supported_levels():
        pytest.skip(f"processor lacks {request.param}")
    with mikernels.force_level(request.param):
        yield "cpp"


@pytest.fixture
def run_python() -> Callable[[str], str]:
    """Runs a script in a fresh interpreter and returns what it printed."""

    def run(script: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-c", textwrap.dedent(script)],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def peak_growth(run_python: Callable[[str], str]) -> Callable[..., int]:
    """Bytes by which the peak of a fresh process grows while `call`, an expression in x and w, runs
    at every level on every "x, w" given. One process: each takes a second to import torch."""
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in KiB on Linux")
    if not mikernels.supported_levels():
        pytest.skip(_ext.MISSING)

    def grown(call: str, *inputs: str) -> int:
        script = f"""
            import resource, torch, mikernels

            def run(x, w):
                for level in mikernels.supported_levels():
                    with mikernels.force_level(level):
                        {call}

            inputs = [{", ".join(f"({given})" for given in inputs)}]
            for x, w in inputs:
                run(x[:64], w)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for x, w in inputs:
                run(x, w)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
        return int(run_python(script)) * 1024

    return grown
