# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: how one is declared (`spec`), judged (`correctness`), timed, saved
and shown."""
