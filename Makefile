# Lineup: two commands are enough, `make demo` and `make test`; the rest is for who works on it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
LINEUP := $(BIN)/lineup
TOOLS := .tools/bin
SERVE ?= 1
# What `make demo` judges; by default two generated portraits, and two photographs that scikit-learn brings.
IMAGES ?= pretrained/samples/*.jpg $$($(BIN)/python -c "from sklearn.datasets import load_sample_images as s; print(*s().filenames)")
# What `make demo-train` learns: a real image set instead of the simulated one, `make demo-train DATA=/path/to/images`.
DATA ?=
RECORDS ?= 1000
# Few updates teach little with the defaults, which are the paper's: residuals and generators show sooner what to see.
RECIPE ?= --image-size 64 --scale native --preprocess center_crop --windows 5 --augmentations 0 --positives generator \
  --proxies 5 --architecture-args '{"stem": "residual", "depth": 4}' --batch-size 8 --learning-rate 0.012 \
  --weight-decay 0.05 --epoch-steps 100 --warmup-epochs 0.5 --epochs 15
# Of the campaign `make soak`: all of it, or one of fuzz, kills, faults and load.
PART ?=

ifeq ($(DATA),)
TRAINED := lineup-data/demo-train
SET := $(TRAINED)/images
UNSEEN := Those of $(SET)/fake/sim-spectral are new to it, by a generator it does not know.
else
TRAINED := lineup-data/demo-$(shell printf %s '$(abspath $(DATA))' | sha256sum | cut -c1-8)
SET := $(DATA)
endif
demo: export LINEUP_HOME ?= lineup-data/demo
demo-train: export LINEUP_HOME ?= $(TRAINED)

define NEXT
@echo
@echo "For further commands:  . $(BIN)/activate; export LINEUP_HOME=$(LINEUP_HOME)"
@echo "Then lineup serve opens the page again; a lean installation without torch (pip install '.[cpu]') serves it too."
endef

.PHONY: demo demo-train test check docs bench soak audit manifests sbom clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         judge images with the pretrained checkpoint, serve the page   (SERVE=0: end after printing, IMAGES=PATH: yours)"
	@echo "make demo-train   simulate, train, index, evaluate, detect, serve   (SERVE=0: end after printing, DATA=PATH: your images)"
	@echo "make test         the whole test suite"
	@echo "make check        lint, types, import contracts, migrations"
	@echo "make docs         the pages of docs/ as a site, in build/site, with what is drawn from the code anew"
	@echo "make audit        known vulnerabilities of what the lock names;  make sbom: what each image holds, in build/sbom"
	@echo "make manifests    what Kubernetes's schemas say of docker/kubernetes.yml"
	@echo "make bench        speed beside its targets;  make soak: the campaign   (PART=fuzz|kills|faults|load|engine)"

# The lock holds hashes of CUDA 13 packages whose version pins only a current pip can read.
$(VENV)/.locked: requirements.lock
	$(PYTHON) -m venv $(VENV)
	@echo "installing the locked dependencies into $(VENV), about 7 GB: this takes some minutes"
	$(BIN)/pip install --quiet --upgrade "pip>=26"
	$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	@touch $@

$(LINEUP): $(VENV)/.locked pyproject.toml
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(LINEUP)
	@mkdir -p $(LINEUP_HOME)
	cp -r pretrained/checkpoint $(LINEUP_HOME)/
	$(LINEUP) index import pretrained/references.lineup
	LINEUP_RECORD=false $(LINEUP) detect $(IMAGES) --details
	$(NEXT)
ifneq ($(SERVE),0)
	@echo "Open the link to the page that comes next, and drop an image on it."
	$(LINEUP) serve
endif

demo-train: $(LINEUP)
ifeq ($(DATA),)
	$(LINEUP) train simulate $(SET) --records $(RECORDS)
endif
	$(LINEUP) train fit --data $(SET) --split train --output $(or $(LINEUP_CHECKPOINT),$(LINEUP_HOME)/checkpoint) $(RECIPE)
	$(LINEUP) index add $(SET) --split train
	$(LINEUP) index evaluate --data $(SET) --split test,unseen --output $(LINEUP_HOME)/evaluation.json
	LINEUP_RECORD=false $(LINEUP) detect $(SET) --split test,unseen --sample 2 --details
	$(NEXT)
ifneq ($(SERVE),0)
	@echo "Open the link to the page that comes next, and drop an image on it. $(UNSEEN)"
	$(LINEUP) serve
endif

# Threads that spin while they wait make every other process on a small machine slower.
test: export OMP_WAIT_POLICY ?= PASSIVE
# Each process has a Postgres of its own; a file stays whole, for its fixtures. Three keep two cores busy, for a third of
# the time they wait for browsers and databases.
test: JOBS ?= 3
test: $(LINEUP)
	$(RUN) pytest -q -m "not soak" --numprocesses $(JOBS) --dist loadfile

check: $(LINEUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(RUN) pytest -q tests/indexer/database/test_migrations.py

docs: $(LINEUP) $(TOOLS)/.locked
	$(BIN)/python docs/imports.py
	$(BIN)/python docs/fields.py
	NO_MKDOCS_2_WARNING=1 $(TOOLS)/mkdocs build --strict --quiet
	@echo "the pages are in build/site"

# Sizes: LINEUP_SOAK_FILES, LINEUP_SOAK_REQUESTS, LINEUP_SOAK_SEQUENCES, LINEUP_SOAK_KILLS, LINEUP_SOAK_MINUTES.
soak: $(LINEUP)
	$(RUN) pytest -q -m soak tests$(if $(PART),/journey/test_$(PART).py)

bench: $(LINEUP)
	$(RUN) benchmarks.targets

# Of no use to the project itself, so they are neither in its lock nor in its environment.
$(TOOLS)/.locked: tools.lock
	$(PYTHON) -m venv .tools
	$(TOOLS)/pip install --quiet --require-hashes -r tools.lock
	@touch $@

# Of an address that it cannot reach pip-audit has a traceback.
OSV := https://api.osv.dev/v1/query

audit: $(TOOLS)/.locked
	@$(TOOLS)/python -c 'import requests; requests.get("$(OSV)", timeout=20)' 2>/dev/null || \
		{ echo "not audited: the database of vulnerabilities (OSV) cannot be reached from here" >&2; exit 1; }
	for lock in requirements.lock docker/faiss-cpu.lock docker/pip.lock tools.lock; do \
		$(TOOLS)/pip-audit --strict --vulnerability-service osv --disable-pip --require-hashes --requirement $$lock || exit 1; done

manifests: $(TOOLS)/.locked
	$(TOOLS)/kubernetes-validate --strict docker/kubernetes.yml

build/sbom/lean.json: EXTRAS := cpu blobs milvus
build/sbom/cpu.json: EXTRAS := cpu train blobs milvus
build/sbom/cuda.json: EXTRAS := gpu train blobs milvus datasets export
build/sbom/%.json: $(TOOLS)/.locked pyproject.toml requirements.lock docker/faiss-cpu.lock docker/pip.lock
	@mkdir -p $(@D)
	{ $(TOOLS)/python docker/extras.py $(EXTRAS); cat docker/pip.lock; } | $(TOOLS)/uv pip compile --quiet --generate-hashes \
		--no-header --no-annotate --python-version 3.11 --constraint requirements.lock --constraint docker/faiss-cpu.lock \
		--output-file $(@:.json=.lock) -
	$(TOOLS)/cyclonedx-py requirements --output-reproducible --pyproject pyproject.toml --output-file $@ $(@:.json=.lock)

sbom: build/sbom/lean.json build/sbom/cpu.json build/sbom/cuda.json

clean:
	rm -rf lineup-data build .tools *.egg-info
