# SPDX-License-Identifier: Apache-2.0
"""How good the SAEs are that different libraries train from the same batches, and at what cost.

`tasks.py` has the data, `feed.py` hands it out and keeps the time, `contenders.py` trains,
`session.py` runs them all over the seeds, `figures.py` compares, `tables.py` shows.
"""
