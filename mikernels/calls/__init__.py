# SPDX-License-Identifier: Apache-2.0
"""The call log: which operators ran, on what, by which implementation and why.

`log` switches it, `recorded` is what operators are meanwhile, `lines` is how a call reads, `saved`
is its file and `replay` runs that again.
"""
