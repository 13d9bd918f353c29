# `make demo` and `make test` do all of their own set-up, into .venv/, on a machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-oldest lint docs bench gpu soak clean

demo: $(READY)
	$(BIN)/siftune demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not soak"

# The hook's tests once against the oldest supported transformers and trl, in an environment of their own.
OLDEST := .venv-oldest
test-oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints-oldest.txt)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test]'
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile tests/unit/test_attach*.py tests/laws/test_attach*.py tests/laws/test_resume.py \
		tests/unit/test_train.py tests/unit/test_score_reference.py tests/laws/test_train_kill.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/words.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(READY)
	$(BIN)/python benchmarks/run.py

# On a machine with a CUDA GPU and its own torch and transformers: no environment is made, so that nothing is downloaded.
gpu:
	$(PYTHON) benchmarks/gpu.py

soak: $(READY)
	$(BIN)/python -m pytest -m soak --ignore=tests/faults --ignore=tests/laws/test_kill.py
	$(BIN)/python scripts/soak_reliability.py --soak

# torch first and by its exact pin: a CPU build where one is to be had.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "siftune needs Python >= 3.11; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
