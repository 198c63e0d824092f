# SPDX-License-Identifier: Apache-2.0
"""What mass_threshold computes, for its tests on every kind of device."""

import math

FRACTIONS = (0.0, 1e-9, 0.1, 0.2, 0.5, 0.8, 0.95, 0.999, 1.0)


def definition(x, frac, absolute):
    """The highest entry v for which the entries >= v hold the fraction; sums rounded once."""
    values = (x.abs() if absolute else x).double().reshape(-1).tolist()
    wanted = frac * math.fsum(values) if frac else 0.0
    ordered = sorted(values, reverse=True)
    # the mass from the top grows with the number of entries
    low, high = 1, len(ordered)
    while low < high:
        middle = (low + high) // 2
        if math.fsum(ordered[:middle]) >= wanted:
            high = middle
        else:
            low = middle + 1
    return ordered[low - 1]
