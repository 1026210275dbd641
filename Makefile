# `make demo` and `make test` need nothing but Python >= 3.11: each creates .venv and installs into it.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

# XLA sizes the CPU thread pool by NPROC; with 8 forced devices on few cores a small pool deadlocks.
export NPROC ?= 16

.PHONY: demo test install clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[test,report]'
	touch $@

demo: $(STAMP)
	$(RUN) -m internvlx_jax.demo

test: $(STAMP)
	$(RUN) -m pytest -n 2 --dist loadscope

clean:
	rm -rf $(VENV) runs
