# Every target does its own set-up, into .venv/, on a machine with Python >= 3.11 and make.
# Three lanes of tests: `make check` while you work, `make test` before a commit and in CI, `make soak` for hours.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two stamps: what the demo imports, and everything.
READY_DEMO := $(VENV)/.ready-demo
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo check test test-oldest lint wheel docs bench frameworks gpu soak clean

demo: $(READY_DEMO)
	$(BIN)/siftune demo

check: lint
	$(PYTEST) -m "not slow and not soak"

test: $(READY)
	$(PYTEST) -m "not soak" --durations=25

# The hook's tests once against the oldest supported transformers and trl, in an environment of their own.
OLDEST := .venv-oldest
test-oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP_INSTALL) $$(grep '^torch==' constraints-oldest.txt)
	$(OLDEST)/bin/python $(PIP_INSTALL) -c constraints-oldest.txt -e '.[test]'
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile tests/unit/test_attach*.py tests/laws/test_attach*.py tests/laws/test_resume.py \
		tests/integration/test_train.py tests/integration/test_score_reference.py tests/laws/test_train_kill.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/words.py

# With the constraints' setuptools, so that nothing is fetched.
wheel: $(READY)
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(READY)
	$(BIN)/python benchmarks/run.py

# LLaMA-Factory, Axolotl, ms-swift and Oumi for real on the CPU, one environment each; writes docs/frameworks.md. Not part of test.
frameworks: $(READY)
	$(BIN)/python scripts/frameworks.py

# On a machine with a CUDA GPU and its own torch and transformers: no environment is made, so that nothing is downloaded.
gpu:
	$(PYTHON) benchmarks/gpu.py

soak: $(READY)
	$(BIN)/python -m pytest -m soak --ignore=tests/faults --ignore=tests/laws/test_kill.py
	$(BIN)/python scripts/soak_reliability.py --soak

# torch first and by its exact pin: a CPU build where one is to be had. Modules are compiled when they are first imported.
$(READY_DEMO): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "siftune needs Python >= 3.11; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --no-compile $$(grep '^torch==' constraints.txt)
	$(BIN)/python $(PIP_INSTALL) --no-compile -c constraints.txt -e '.[demo]'
	touch $@

$(READY): $(READY_DEMO)
	$(BIN)/python $(PIP_INSTALL) --no-compile -c constraints.txt -e '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) .venv-frameworks build dist *.egg-info
