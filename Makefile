# make train: first a memory at work, on a task that nothing else can solve (once: runs/copy is kept), then a model of
# text (ARGS="--data my.txt" and other settings of train_mac.py).
# make test: the same for the tests.
# make test-oldest, make test-newest: the same with the oldest and the newest release of every dependency (TESTS="tests/hf"
# for some of the tests).
# make laws SEED=3: the laws of the memory on new random examples (EXAMPLES=100 for each).
# make docs: the documentation, in site/, and the notebook, run from end to end.
# make bench-quick: two quick benchmarks, compared with their committed baselines.
# make baselines: those baselines again, at quick and at full settings (about 15 minutes).
#
# The first of them installs into .venv, and says what. With any of them:
# TORCH=cpu: PyTorch's CPU build, a tenth of the download. CONSTRAINTS=configs/constraints.txt: versions known to be good.
# make constraints: that file again, from .venv, after all tests have passed.
# make notebook: runs the notebook's cells and stores their outputs.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= default
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.PHONY: train test test-oldest test-newest laws lint docs bench-quick baselines constraints notebook clean

DEMO := runs/copy

train: $(STAMP) $(DEMO)/result.json
	$(BIN)/python train_mac.py $(ARGS)

# Continues where it was stopped.
$(DEMO)/result.json: | $(STAMP)
	@echo "A memory at work: copy eight symbols from the segment before, which attention does not see."
	$(BIN)/titans train $(if $(wildcard $(DEMO)/checkpoints/step_????????/SHA256SUMS),--resume,--config configs/copy.yaml) \
	    --out $(DEMO)
	@echo "Accuracy with writing on and off, drawn: $(DEMO)/accuracy.png"

# Two workers on one thread each: small tensors gain nothing from more threads.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Each has an environment of its own, made from the ranges in pyproject.toml and brought up to date on every run.
# uv, since pip knows no oldest. Only wheels: the oldest release that is built for this Python.
test-oldest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-oldest test-newest: test-%: .venv-%/bin/uv
	$< pip install --python .venv-$*/bin/python --only-binary :all: --upgrade --resolution $(RESOLUTION) \
	    -r pyproject.toml --all-extras
	$< pip install --python .venv-$*/bin/python --quiet --no-deps -e .
	NO_MKDOCS_2_WARNING=1 .venv-$*/bin/python -m mkdocs build --strict --site-dir .venv-$*/site
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n 2 --dist loadfile -m "not slow" $(TESTS)

.venv-%/bin/uv:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet uv

SEED ?= 0
EXAMPLES ?= 100

laws: $(STAMP)
	OMP_NUM_THREADS=1 HYPOTHESIS_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -n 2 tests/laws --hypothesis-seed=$(SEED)

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# Strict: a warning, a link to nothing or a formula without translation is an error. (Not with --quiet, which hides
# warnings from it too.) The variable silences a notice on the future of mkdocs.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_notebook.py tests/test_docs_scripts.py

# of the regression check: five seeds, for a spread
CHECKED := symplectic codebook_transfer
QUICK := --quick --seeds 5 --repeats 0

bench-quick: $(STAMP)
	set -e; for name in $(CHECKED); do \
	    $(BIN)/python benchmarks/benchmark_$$name.py $(QUICK) --output-json runs/quick/$$name.json; done
	$(BIN)/python benchmarks/check_regression.py \
	    --baseline benchmarks/results/symplectic_quick_baseline.json --latest runs/quick/symplectic.json \
	    --codebook-baseline benchmarks/results/codebook_transfer_quick_baseline.json \
	    --codebook-latest runs/quick/codebook_transfer.json

baselines: $(STAMP)
	set -e; for name in $(CHECKED); do \
	    $(BIN)/python benchmarks/benchmark_$$name.py $(QUICK) \
	        --output-json benchmarks/results/$${name}_quick_baseline.json; \
	    $(BIN)/python benchmarks/benchmark_$$name.py --repeats 0 \
	        --output-json benchmarks/results/$${name}_baseline.json; done

# A line for each thing that is fetched, and pip's progress bars: the large download takes minutes.
TORCHES := cpu default
ifeq ($(filter $(TORCH),$(TORCHES)),)
$(error TORCH must be one of: $(TORCHES), got $(TORCH))
endif
SIZE_cpu := the CPU build of PyTorch and all else, 0.3 GB to download, 1.5 GB on disk
SIZE_default := PyTorch and all else, on Linux with CUDA 3.1 GB to download and 6 GB on disk (with TORCH=cpu: 0.3 and 1.5)
INSTALL = $(BIN)/python -m pip install $(addprefix -c ,$(CONSTRAINTS))

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): $(SIZE_$(TORCH)). A torch that is there already is kept."
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(filter cpu,$(TORCH)),$(INSTALL) --no-deps torch --index-url https://download.pytorch.org/whl/cpu)
	$(INSTALL) -e ".[test,examples]"
	touch $(STAMP)

# apart, so that tests do not wait for it
$(DOCS_STAMP): $(STAMP)
	@echo "Installing what builds the documentation."
	$(INSTALL) -e ".[docs]"
	touch $(DOCS_STAMP)

constraints: test
	$(BIN)/python docs/scripts/constraints.py > configs/constraints.txt

notebook: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python docs/scripts/notebook.py

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist site
