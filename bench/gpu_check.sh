#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds, checks and measures everything on a machine with a GPU: bench/gpu_check.sh --help
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu/gpu_check.py" "$@"
