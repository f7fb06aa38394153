# Each target sets up what it needs in .venv; see `make help`
PYTHON ?= python3
BIN = .venv/bin
# notebooks' stored outputs and test runs are free of other packages' warnings; one thread per process is fastest for small models
RUN = PYTHONWARNINGS=ignore $(BIN)

.PHONY: help demo test docs docs-test bench techniques soak-contract soak-tests soak-oldest soak-loop soak-crash soak-log soak-ranks notebooks clean

help:          ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/ready: pyproject.toml setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,10) and "Python >= 3.10 is needed, and $(PYTHON) is "+sys.version.split()[0]+"; try make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@

demo: .venv/ready  ## Train a language model on the Python language reference (3 minutes)
	$(RUN)/python examples/language_model.py

test: .venv/ready  ## Run all tests, with coverage
	OMP_NUM_THREADS=1 $(RUN)/pytest -n 2 --cov --cov-fail-under=95 --durations 5

docs: .venv/ready  ## Write README.md and build the site into docs/_build/html, warnings as errors
	$(RUN)/python docs/build.py --readme
	$(RUN)/python docs/build.py

.venv/browser-ready: .venv/ready
	$(BIN)/pip install -q -e '.[browser]'
	@touch $@

docs-test: .venv/browser-ready docs ## Look at the site in a browser (needs chromium): screens of two widths, search, first screens (3 minutes)
	$(RUN)/pytest -n 2 tests/browser.py

.venv/bench-ready: .venv/ready
	$(BIN)/pip install -q -e '.[bench]'
	@touch $@

bench: .venv/bench-ready ## Measure the callbacks and the loop beside their peers (half an hour)
	$(RUN)/python benchmarks/callbacks.py
	$(RUN)/python benchmarks/speed.py
	$(RUN)/python benchmarks/loop.py
	$(RUN)/python benchmarks/checkpoint.py
	$(RUN)/python benchmarks/safety.py
	$(RUN)/python benchmarks/gradients.py
	$(RUN)/python benchmarks/schedules.py
	$(RUN)/python benchmarks/passes.py
	$(RUN)/python benchmarks/optimizers.py
	$(RUN)/python benchmarks/averaging.py
	$(RUN)/python benchmarks/tensors.py
	$(RUN)/python benchmarks/waits.py
	$(RUN)/python benchmarks/memory.py
	$(RUN)/python benchmarks/monitors.py

techniques: .venv/ready ## Train digits, texts, a table and a language model with and without each technique: tables and figures of the docs (an hour and a half)
	OMP_NUM_THREADS=1 $(RUN)/python benchmarks/techniques.py
	OMP_NUM_THREADS=1 $(RUN)/python benchmarks/do_they_help.py
	OMP_NUM_THREADS=1 $(RUN)/python benchmarks/average_defaults.py
	OMP_NUM_THREADS=1 $(RUN)/python benchmarks/figures.py
	OMP_NUM_THREADS=1 $(RUN)/python benchmarks/lr_find.py
	OMP_NUM_THREADS=1 $(RUN)/python benchmarks/mixing.py
	OMP_NUM_THREADS=1 $(RUN)/python benchmarks/resizing.py
	OMP_NUM_THREADS=1 $(RUN)/python benchmarks/freezing.py

soak-contract: .venv/ready ## Every callback in every setting, every pair, in a notebook and in 2 processes (an hour)
	$(RUN)/python tests/contract.py --all

soak-tests: .venv/ready ## Run every notebook as it stands, and all tests with every case of each, of which `make test` takes some (40 minutes)
	PYTHONWARNINGS=ignore $(RUN)/nbdev-test --n-workers 2
	EVERY_CASE=1 OMP_NUM_THREADS=1 $(RUN)/pytest -n 2

soak-oldest: ## Run all tests with the oldest PyTorch and NumPy; PYTHON=python3.10 for the oldest Python too (10 minutes, 7 GB)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q -e '.[dev]' 'torch==2.6.*' 'numpy<2'
	OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore .venv-oldest/bin/pytest -n 2

soak-loop: .venv/bench-ready ## Train for a million batches with FastLoop; memory must not grow (10 minutes)
	$(RUN)/python benchmarks/loop.py --batches 1000000

soak-crash: .venv/ready ## Kill training runs 500 times and resume them; each must end with the same bits (25 minutes)
	$(RUN)/python tests/crash.py --kills 500

soak-log: .venv/bench-ready ## Kill runs with all monitors 200 times, with lr_find and validate between fits; each row must be in the log once; memory over 200,000 batches (15 minutes)
	$(RUN)/python tests/crash.py --kills 200 --cases logged
	$(RUN)/python benchmarks/monitors.py --batches 200000

soak-ranks: .venv/ready ## Train with faults on one of 2 and of 4 processes, 200 times, then under distrib_ctx; all must end alike (10 minutes)
	$(RUN)/python tests/distributed_safety.py --scenarios 200
	$(RUN)/python tests/distributed_safety.py --scenarios 100 --distrib

notebooks: .venv/ready ## Export the modules, run the notebooks and store their outputs
	$(BIN)/nbdev-export
	OMP_NUM_THREADS=1 $(RUN)/nbdev-test --save --n-workers 2
	$(BIN)/nbdev-clean

clean:         ## Remove what the other targets made
	rm -rf .venv .venv-oldest _proc build dist docs/_build examples/out *.egg-info .pytest_cache .coverage*
