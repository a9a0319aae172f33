# Every target does its own set-up: a virtual environment in .venv, made once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ONE_CORE := $(shell command -v taskset >/dev/null && echo taskset -c $$(taskset -pc $$$$ | sed -E 's/.*: ([0-9]+).*/\1/'))

.DEFAULT_GOAL := help
.PHONY: help demo demos lessons dist test fuzz test-browser test-lessons test-install test-oldest test-peers test-cuda mutants coverage gpu-report soak bench bench-quick exactness lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.installed  ## train the six-hidden-layer network with and without BatchNorm, and draw the figure
	$(BIN)/python -m demos deep_mlp

demos: $(VENV)/.installed  ## run every demo, and make a page of their figures in runs/all
	$(BIN)/python -m demos all

lessons: $(VENV)/.lessons  ## open six lessons in a browser, in English and Korean
	$(BIN)/marimo --log-level ERROR run demos/lessons/lesson_*.py

test: $(VENV)/.test  ## run the test-suite
	$(BIN)/python -m pytest -n auto --ignore=tests/peers

fuzz: $(VENV)/.onnx  ## read 100,000 damaged files of each format
	$(BIN)/python -m tests.fuzz

test-lessons: $(VENV)/.lessons $(VENV)/.browser  ## run the lessons as scripts, and use them in a browser (needs chromium)
	$(BIN)/python -m pytest -rs -n auto tests/framework/test_lessons.py tests/framework/test_notebook.py tests/lessons

# The same sources and setuptools give the same wheel, byte for byte: times are the first that a zip can hold, and modes
# are those of umask 022.
dist: $(VENV)/.oldest  ## build the sdist and the wheel
	rm -rf dist
	umask 022 && SOURCE_DATE_EPOCH=315532800 $(BIN)/uv build --quiet --out-dir dist

PYTHONS ?= 3.11 3.12 3.13 3.14
test-install: dist  ## install wheel and sdist into empty environments of PYTHONS, versions or paths, and use them there
	$(BIN)/python -m tests.tools.install $(PYTHONS)

# From the sdist, on one core, in a folder with a space, without a home or a place for compiled loops: HOME is not a
# folder, and a file stands where __pycache__ would be made, which binds root too.
OLDEST := build/oldest versions
test-oldest: $(VENV)/.oldest  ## run most of the test-suite with the oldest versions that pyproject.toml allows, and little else
	rm -rf "$(OLDEST)" && mkdir -p "$(OLDEST)"
	$(BIN)/uv build --quiet --sdist --out-dir "$(OLDEST)"
	tar -xzf "$(OLDEST)"/tinygrad_bn-*.tar.gz -C "$(OLDEST)" --strip-components=1
	$(BIN)/uv venv --quiet --python $(BIN)/python "$(OLDEST)/.venv"
	uv="$$PWD/$(BIN)/uv" && cd "$(OLDEST)" && "$$uv" pip install --quiet --python .venv --resolution lowest-direct '.[test]'
	cd "$(OLDEST)" && touch kernels/tinygrad_bn_kernels/cpu/__pycache__ && \
	  env -u NUMBA_CACHE_DIR -u XDG_CACHE_HOME HOME=/dev/null $(ONE_CORE) .venv/bin/python -m pytest -m "not slow" -k "not test_property" --ignore=tests/peers

test-peers: $(VENV)/.peers  ## compare with PyTorch (installs it: the CPU build is about 200 MB)
	$(BIN)/python -m pytest -n auto tests/peers

mutants: $(VENV)/.mutants  ## plant mistakes in the core, and see whether its tests find them (half an hour)
	$(BIN)/python -m tests.tools.mutants

coverage: $(VENV)/.coverage  ## which lines and branches the tests run, with uncompiled loops (half an hour)
	rm -f .coverage .coverage.*
	NUMBA_DISABLE_JIT=1 $(BIN)/coverage run -m pytest -q -n auto --ignore=tests/peers
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=95

test-browser: $(VENV)/.browser  ## use the pages of explanations in Chromium (needs it: apt install chromium)
	TINYGRAD_BN_BROWSER=required $(BIN)/python -m pytest tests/browser

test-cuda: $(VENV)/.cuda-test  ## execute every CUDA kernel without a GPU (installs numba-cuda; needs the CUDA 13 toolkit)
	TINYGRAD_BN_CUDA_TOOLS=required $(BIN)/python -m pytest -n auto tests/cuda

gpu-report: $(VENV)/.gpu  ## on a machine with an NVIDIA GPU: check every op there, and print the bandwidth of each kernel
	$(BIN)/python -m pytest -q -m gpu tests/cuda/test_gpu.py
	$(BIN)/python -m tests.cuda.gpu_report

soak: $(VENV)/.test  ## 20,000 steps of each article's network: memory, files, threads and caches must not grow (an hour; Linux)
	$(BIN)/python -m tests.soak

bench: $(VENV)/.bench  ## time this package against NumPy, PyTorch and JAX (installs them; 10 minutes, a quiet machine)
	$(BIN)/python -m tests.benchmarks.bench

bench-quick: $(VENV)/.bench  ## the same in about a minute, less exactly, without compiled PyTorch
	$(BIN)/python -m tests.benchmarks.bench --quick --seconds 0.7

exactness: $(VENV)/.bench  ## how many digits BatchNorm keeps at any mean, here and in the peers (installs them)
	$(BIN)/python -m tests.benchmarks.exactness

lint: $(VENV)/.lint  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.lint  ## put the source into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and everything that tools leave behind
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make $(VENV); on Debian: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.gpu: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test,cuda]'
	@touch $@

$(VENV)/.test $(VENV)/.lessons $(VENV)/.browser $(VENV)/.oldest $(VENV)/.peers $(VENV)/.bench $(VENV)/.lint $(VENV)/.mutants $(VENV)/.coverage $(VENV)/.cuda-test $(VENV)/.onnx: $(VENV)/.%: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test,$*]'
	@touch $@
