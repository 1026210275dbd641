# `make demo` and `make test` need nothing but Python >= 3.11: each creates .venv and installs into it.
# `make test-torch` compares with PyTorch, in an environment of its own; `make test-gpu` tries what an NVIDIA GPU alone runs.
PYTHON ?= python3
VENV   ?= .venv
TORCH_VENV ?= .venv-torch
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

# XLA sizes the CPU thread pool by NPROC; with 8 forced devices on few cores a small pool deadlocks.
export NPROC ?= 16

.PHONY: demo test test-torch test-gpu install clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[test,report]'
	touch $@

demo: $(STAMP)
	$(RUN) -m internvlx_jax.demo

test: $(STAMP)
	$(RUN) -m pytest -n 2 --dist worksteal

$(TORCH_VENV)/.installed: pyproject.toml requirements-torch.txt
	$(PYTHON) -m venv --clear $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install --quiet --editable . --requirement requirements-torch.txt
	touch $@

test-torch: $(TORCH_VENV)/.installed
	REQUIRE_TORCH=1 $(TORCH_VENV)/bin/python -m pytest tests/convert/test_torch.py

test-gpu: $(STAMP)
	$(RUN) -m pip install --quiet --editable '.[cuda]'
	$(RUN) benchmarks/attention.py --backend cudnn --check

clean:
	rm -rf $(VENV) $(TORCH_VENV) runs
