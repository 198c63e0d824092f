# SPDX-License-Identifier: Apache-2.0
"""Ragged codes in Triton; tests/test_ragged.py has the same rules for the CPU."""

import pytest
import ragged_cases
import torch

from mikernels.kernels.sae import gradients_hot, update

# what the interpreter has time for
CASES = [c for c in ragged_cases.CASES if c not in ("many tokens", "one long row")]


@pytest.fixture(params=[512, 4], ids=["", "chunks of 4"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(gradients_hot, "CHUNK", request.param)


@pytest.fixture(params=[4096, 4], ids=["", "wide"])
def widest(request, monkeypatch):
    monkeypatch.setattr(update, "WIDEST", request.param)


@pytest.mark.parametrize("case", CASES)
def test_decode(device, dtype, case):
    ragged_cases.check_decode(case, dtype, "triton", device)


def test_decode_skips_what_is_not_in_use(device, dtype):
    ragged_cases.check_decode_skips(dtype, "triton", device)


@pytest.mark.parametrize("case", CASES)
def test_gather_dot(device, dtype, case):
    ragged_cases.check_gather_dot(case, dtype, "triton", device)


@pytest.mark.parametrize("case", CASES)
def test_feature_sum(device, dtype, chunk, case):
    ragged_cases.check_feature_sum(case, dtype, "triton", device)


@pytest.mark.parametrize("case", CASES)
def test_levels(device, chunk, case):
    ragged_cases.check_levels(case, torch.float32, "triton", device)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_sae_gradients(device, chunk, case, accumulate):
    ragged_cases.check_sae_gradients(case, torch.float32, "triton", device, accumulate)


@pytest.mark.parametrize("case", CASES)
def test_update(device, chunk, widest, case):
    ragged_cases.check_update(case, "triton", device)
