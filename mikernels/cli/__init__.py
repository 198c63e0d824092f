# SPDX-License-Identifier: Apache-2.0
"""The `mikernels` command, one command a file."""

from mikernels.cli.command import app, main

__all__ = ["app", "main"]
