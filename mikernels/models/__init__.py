# SPDX-License-Identifier: Apache-2.0
"""What is known about a language model, once: how it is loaded, what it is made of, how it writes
into its residual stream, how hooks fire in it, and where its tokens stand."""
