# `make demo` and `make test` work on a fresh machine: each makes .venv, builds and runs.
PYTHON ?= python3
