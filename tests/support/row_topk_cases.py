# SPDX-License-Identifier: Apache-2.0
"""Rows that are hard to select from, for CPU and device tests of row_topk."""

import torch

INF, NAN = float("inf"), float("nan")
# each changes a row of normal data in place
SPECIAL_ROWS = {
    "nan everywhere": lambda row: row.fill_(NAN),
    "nan in the last place": lambda row: row[-1:].fill_(NAN),
    "negative nan": lambda row: row[3:4].fill_(-NAN),
    "more nan than k": lambda row: row[::3].fill_(NAN),
    "+inf ties": lambda row: row[5::7].fill_(INF),
    "-inf everywhere": lambda row: row.fill_(-INF),
    "-inf but for one": lambda row: row[1:].fill_(-INF),
    "constant": lambda row: row.fill_(1.5),
    "zeros of both signs": lambda row: row.zero_()[::2].neg_(),
    "ascending": lambda row: row.copy_(torch.arange(len(row)) / 8),
    "descending": lambda row: row.copy_(-torch.arange(len(row)) / 8),
    "denormal": lambda row: row.mul_(torch.finfo(row.dtype).tiny / 64),
    "huge": lambda row: row.mul_(torch.finfo(row.dtype).max / 8),
    "negative": lambda row: row.abs_().neg_(),
    "clustered": lambda row: row[40:60].add_(100),
}
