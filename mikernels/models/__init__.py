# SPDX-License-Identifier: Apache-2.0
"""What is known about a language model, once: how hooks fire in it, and where its tokens stand."""
