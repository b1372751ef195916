# SPDX-License-Identifier: BSD-3-Clause
# `make demo` and `make test` do all the set-up they need.

PYTHON ?= python3.11
VENV   := .venv
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.set-up
PIP    := $(VENV)/bin/pip install --quiet --disable-pip-version-check

DEMO_ARGS := --batch_size 256 --limit_train_batches 400 --limit_val_batches 40 --max_num_embeddings 100000 \
             --embedding_dim 32 --load_factor 0.02 --adagrad --seed 0 --json demo_out/demo.json --plot demo_out/demo.png

.PHONY: setup demo test test-quick test-oldest test-newest test-device-path benchmark conformance conformance-newest faults fuzz soak check format docs clean

setup: $(STAMP)

# Where torch comes from, if not from pip's own index; https://download.pytorch.org/whl/cpu has the CPU build.
TORCH_INDEX ?=

# torch first, from the CPU build where there is one; TorchRec without its dependencies, which are CUDA only.
$(STAMP): pyproject.toml requirements-cpu.txt requirements-dev.txt requirements-docs.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) --no-deps torchrec==1.8.0
	$(PIP) -r requirements-cpu.txt -r requirements-dev.txt
	$(PIP) --no-deps --editable .
	touch $(STAMP)

demo: setup
	$(RUN) examples/criteo_dlrm/main.py $(DEMO_ARGS) $(ARGS)

# As many tests at a time; each takes one core.
WORKERS ?= 2
PYTEST = $(RUN) -m pytest -n $(WORKERS) --dist worksteal

test: setup
	$(PYTEST) $(ARGS)

# What one wants to know while one writes: the rules of the core, and the same bits as stock; a minute and a half
test-quick: setup
	$(PYTEST) tests/test_imports.py tests/test_slot_map.py tests/test_stages.py tests/test_triton_ops.py tests/test_host_table.py \
		tests/test_snapshot.py tests/test_errors.py tests/test_device_batch.py tests/test_device_path.py tests/test_equivalence.py $(ARGS)

# The oldest and the newest TorchRec that are supported, with the same torch and FBGEMM. Tests that are marked
# any_torchrec find the same with each: ARGS="-m 'not any_torchrec'"
test-oldest: TORCHREC := 1.6.1
test-newest conformance-newest: TORCHREC := 1.9.2
OTHER = $(CURDIR)/$(VENV)/torchrec-$(TORCHREC)
define set-up-other
	test -d $(OTHER) || $(PIP) --no-deps --target $(OTHER) torchrec==$(TORCHREC)
	PYTHONPATH=$(OTHER) $(RUN) -c "from importlib.metadata import version; assert version('torchrec') == '$(TORCHREC)'"
endef

test-oldest test-newest: setup
	$(set-up-other)
	PYTHONPATH=$(OTHER) $(PYTEST) $(ARGS)

# Scratchpads on the CPU planned and filled as a GPU's are; what is about the host's own way is left out.
test-device-path: setup
	TEST_DEVICE_PATH=torch $(PYTEST) $(ARGS)

# Every way to hold the tables that this device has, side by side; results in benchmark_out
benchmark: setup
	$(RUN) examples/benchmark/train_step.py --quick --out benchmark_out $(ARGS)

# Configurations drawn at random, for 30 minutes; ARGS="--minutes 5 --first_seed 100"
fuzz: setup
	$(RUN) tests/fuzz.py $(ARGS)

# What happens to jobs: killed 50 times, out of disk, damaged checkpoints, a rank gone; prints a table
faults: setup
	$(RUN) tests/faults.py $(ARGS)

# 200,000 batches beside stock, with everything that may happen in mid-run; half an hour
soak: setup
	$(RUN) tests/soak.py $(ARGS)

# TorchRec's own tests; tests/conformance/README.md
conformance: setup
	$(RUN) -m tests.conformance $(ARGS)

conformance-newest: setup
	$(set-up-other)
	PYTHONPATH=$(OTHER) $(RUN) -m tests.conformance $(ARGS)

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pydoclint torchrec_scratchpipe

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# The documents as a site, in site/; docstrings are read, not imported
docs: setup
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)
	@echo "site/index.html is the first page; to search, run: $(RUN) -m http.server --directory site"

clean:
	rm -rf $(VENV) site demo_out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
