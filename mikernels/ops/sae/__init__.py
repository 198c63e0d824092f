# SPDX-License-Identifier: Apache-2.0
"""Operators of sparse autoencoders: encode, decode, gradients, updates."""
