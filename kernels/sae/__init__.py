# SPDX-License-Identifier: Apache-2.0
"""Training of sparse autoencoders: encode, decode, gradients by feature, Adam."""
