# SPDX-License-Identifier: Apache-2.0
"""The by-feature operators in plain torch, for CPU and device tests."""


def gather_dot(rows, w, indices):
    return (rows[:, None] * w[indices]).sum(-1)


def feature_sum(coefficients, rows, indices, n_features):
    dw = rows.new_zeros(n_features, rows.shape[1])
    terms = coefficients[..., None] * rows[:, None]
    dw.index_add_(0, indices.reshape(-1), terms.reshape(-1, rows.shape[1]))
    db = rows.new_zeros(n_features).index_add_(0, indices.reshape(-1), coefficients.reshape(-1))
    return dw, db
