# `make run` and `make test` set up what they need: Python 3.11 and pip are enough.

PYTHON ?= python3
DEFAULT = .venv
CURRENT = .venv-current
SAMPLE = data/sample/training_candidates_BTC_20190101_20251206_hold_to_expiry_simulated.csv

# A worker that has nothing left takes over tests of the other. SLOW=1: the tests that are marked slow, and those alone,
# handed out one by one; SLOW=all: all tests.
JOBS ?= 2
SELECTED = $(if $(SLOW),$(if $(filter all,$(SLOW)),--dist worksteal,-m slow --maxschedchunk 1),-m "not slow" --dist worksteal)
PYTEST = -m pytest -n $(JOBS) --durations 10 $(SELECTED)
COVERAGE = $(if $(SLOW),,--cov --cov-report term:skip-covered)

.PHONY: run test test-current lint script wheel clean

# The sample, both configs, a fine-tune on the CPU, and the tiny model that it makes beside the baselines.
run: $(DEFAULT)/ready $(SAMPLE)
	$(DEFAULT)/bin/python -c "from datasets import load_dataset; \
	[print(name, load_dataset('./covered_call_candidates.py', name, trust_remote_code=True), sep='\n') \
	for name in ('per_candidate', 'per_decision_ranking')]"
	$(DEFAULT)/bin/python train_sft.py --config tiny --overwrite_output_dir
	$(DEFAULT)/bin/python -m covered_call evaluate --model out/tiny --output_dir out/report
	@printf '%s\n' "" "The whole path works. Next, with your own files:" "    source $(DEFAULT)/bin/activate" \
	"    covered-call train --config tiny --data_files 'runs/*.csv' --output_dir out/mine" \
	"    covered-call evaluate --model out/mine" "    covered-call --help"

test: $(DEFAULT)/ready
	$(DEFAULT)/bin/python $(PYTEST) $(COVERAGE)

test-current: $(CURRENT)/ready
	$(CURRENT)/bin/python $(PYTEST)

lint: $(DEFAULT)/ready
	$(DEFAULT)/bin/ruff check .
	$(DEFAULT)/bin/ruff format --check .
	$(DEFAULT)/bin/ty check
	$(DEFAULT)/bin/python -m covered_call.candidates.script --check

# covered_call_candidates.py from covered_call/candidates/.
script: $(DEFAULT)/ready
	$(DEFAULT)/bin/python -m covered_call.candidates.script

wheel: $(DEFAULT)/ready
	$(DEFAULT)/bin/pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist

$(SAMPLE): | $(DEFAULT)/ready
	$(DEFAULT)/bin/python data/simulate_backtest.py

# torch comes first and alone, so that a CPU build stays one and nothing else pulls in another. Python compiles what
# is imported when it is: pip would compile everything, for over a minute.
INSTALL = install --quiet --no-compile
$(DEFAULT)/ready: pyproject.toml
	$(PYTHON) -m venv $(DEFAULT)
	$(DEFAULT)/bin/pip $(INSTALL) torch==2.13.0
	$(DEFAULT)/bin/pip $(INSTALL) --editable ".[default,dev]"
	touch $@

$(CURRENT)/ready: pyproject.toml
	$(PYTHON) -m venv $(CURRENT)
	$(CURRENT)/bin/pip $(INSTALL) torch==2.13.0
	$(CURRENT)/bin/pip $(INSTALL) --editable ".[current,dev]"
	touch $@

clean:
	rm -rf $(DEFAULT) $(CURRENT) out models dist
