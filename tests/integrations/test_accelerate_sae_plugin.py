# SPDX-License-Identifier: Apache-2.0
"""The plugin accelerates what other suites construct, and says what computed and what did not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import pytest
import torch
from sae_lens.saes import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

D, F = 8, 24
x = torch.ones(4, D)

def config(d_sae=F):
    return TopKTrainingSAEConfig(d_in=D, d_sae=d_sae, k=3)

def accelerated(sae):
    return "encode" in vars(sae)

@pytest.fixture(scope="module")
def shared():
    return TopKTrainingSAE(config())

def test_fixture(shared):
    assert accelerated(shared)
    shared.encode(x)

def test_fixture_of_another_test(shared):
    assert accelerated(shared)
    shared.encode(x)
    shared.encode(x)

def test_not_run(shared):
    assert accelerated(shared)

def test_looks():
    assert TopKTrainingSAE(config()).encode(x).sin().shape == (4, F)

def test_trainer():
    sae = TopKTrainingSAE(config())
    assert accelerated(sae)
    settings = SAETrainerConfig(total_training_samples=8, train_batch_size_samples=4, lr_end=1e-4)
    made = SAETrainer(settings, sae, iter([x, x]))
    assert made.sae is sae and accelerated(sae)
    made.fit()

def test_refused():
    assert not accelerated(TopKTrainingSAE(config(D)))
    assert not accelerated(TopKTrainingSAE(config(D)))

class Own(TopKTrainingSAE):
    def encode_with_hidden_pre(self, x):
        return super().encode_with_hidden_pre(x)

def test_overrides():
    assert not accelerated(Own(config()))

class Below(TopKTrainingSAE):
    def __init__(self, cfg):
        super().__init__(cfg)
        assert not accelerated(self)
        self.other = TopKTrainingSAE(cfg)
        assert not accelerated(self.other)

def test_constructors():
    made = Below(config())
    assert accelerated(made) and accelerated(made.other)

def test_class_of_the_test():
    class Later(TopKTrainingSAE):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.later = cfg

    assert not accelerated(Later(config()))

def test_constructor_fails():
    with pytest.raises(AttributeError):
        TopKTrainingSAE(None)
    assert accelerated(TopKTrainingSAE(config()))

def test_fails():
    TopKTrainingSAE(config()).encode(x)
    assert False

def test_last():
    # between tests classes are as they were
    assert not hasattr(CONSTRUCTOR, "__wrapped__")

CONSTRUCTOR = TopKTrainingSAE.__init__
"""


@pytest.mark.peers
def test_another_suite(tmp_path):
    pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    (tmp_path / "test_theirs.py").write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "accelerate_sae_plugin", "test_theirs.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")},
        capture_output=True,
        text=True,
    )
    assert "1 failed, 11 passed" in done.stdout, done.stdout + done.stderr
    assert "test_theirs.py::test_fails" in done.stdout
    # one in the first test, two in the next, and one each of the look, two steps and the failure
    assert "accelerated: 5 tests, 7 products left" in done.stdout
    assert "dense: 1 (sin 1)" in done.stdout
    assert "objects: 8 (TopKTrainingSAE 6, SAETrainer 1, Below 1)" in done.stdout
    assert "refused: 4" in done.stdout
    assert "2 accelerate: expected more features than activations' width" in done.stdout
    assert "1 accelerate: expected TopKTrainingSAE.encode_with_hidden_pre" in done.stdout
    assert "1 a class that the test itself made" in done.stdout
    assert "(test_theirs.py::test_class_of_the_test)" in done.stdout
