# make book   the HTML book, in _build/html          make test   everything the project checks
# make env    only the Python environment in .venv   make clean  forget what was built
# Another interpreter: make book PY=python3.12
PY ?= python3
UV_VERSION := 0.13.8
BIN := .venv/bin
STAMP := .venv/.synced
JOBS ?= 2

export PYTHONHASHSEED := 0
export OMP_NUM_THREADS ?= 1
# The notebooks draw with Jupyter's inline backend: a backend set from outside would lose every figure.
unexport MPLBACKEND

.PHONY: env book test refresh clean
env: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PY) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PY=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PY) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION)
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip sync -q --require-hashes requirements.lock
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install -q --no-deps --no-build-isolation -e .
	@touch $@

book: $(STAMP)
	$(BIN)/python book/build.py --jobs $(JOBS)

test: $(STAMP)
	$(BIN)/ruff check lib tests book data_scripts benchmarks
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadscope --no-loadscope-reorder tests
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadscope --nbval --nbval-sanitize-with tests/sanitize.cfg \
	  --nbval-kernel-name python3 --nbval-cell-timeout 600 -W default notebooks
	$(BIN)/python book/build.py --jobs $(JOBS)

# Write the notebooks' stored outputs anew (after a change that is meant to change them).
refresh: $(STAMP)
	$(BIN)/python book/build.py --refresh --jobs $(JOBS)

clean:
	rm -rf _build
