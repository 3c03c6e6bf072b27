# make demo          MovieLens-100K: fetch, prepare, train, evaluate, print the metrics, serve on 127.0.0.1:8000
# make demo SERVE=0  the same without serving
# make reproduce DATA=ml-100k|ml-1m|beauty|beauty-cold|journey   the README's quality table of that data, several seeds
# make bench-train   training beside RecTools, the loop without Ray and its reader; memory; kills
# make bench-serve   the service under load beside the model in process, a plain app and a no-op; swaps, kills, memory
# make test          lint, types, every test
# make clean-demo    forget the demo's run, so that the next one trains anew

PYTHON ?= $(shell command -v python3.11 || command -v python3)
SERVE ?= 1
VENV := .venv
BIN := $(VENV)/bin
CONFIG := pipelines/configs/movielens-100k.yaml
RUN := runs/movielens-100k
export HF_HUB_OFFLINE := 1
export RAY_USAGE_STATS_ENABLED := 0
export PYTHONUTF8 := 1

REPRODUCE_ml-100k := movielens-100k.yaml --seeds 0,1,2,3,4
REPRODUCE_ml-1m := movielens-1m.yaml --seeds 0,1,2
REPRODUCE_beauty := amazon-beauty.yaml --seeds 0,1,2,3,4
REPRODUCE_beauty-cold := amazon-beauty.yaml --seeds 0 name=amazon-beauty-cold data.split.new_items=0.1
REPRODUCE_journey := complete-journey.yaml --seeds 0,1,2,3,4

.PHONY: demo test lint reproduce bench-train bench-serve clean-demo

demo: $(RUN)/checkpoint/manifest.json
	$(BIN)/mvrec evaluate --config $(CONFIG)
ifneq ($(SERVE),0)
	$(BIN)/mvrec serve --checkpoint $(RUN)/checkpoint
endif

test: $(VENV)/ready lint data/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

reproduce: $(VENV)/ready data/ready
	$(if $(REPRODUCE_$(DATA)),,$(error make reproduce: expected DATA=ml-100k, ml-1m, beauty, beauty-cold or journey, found '$(DATA)'))
	$(if $(filter journey,$(DATA)),$(BIN)/mvrec fetch --to data --what complete-journey --what all-MiniLM-L6-v2)
	$(BIN)/python bench/bench_quality.py --config pipelines/configs/$(REPRODUCE_$(DATA))

bench-train: $(VENV)/ready data/ready .venv-peers/ready
	$(BIN)/python bench/bench_train.py --peer .venv-peers/bin/python

bench-serve: $(VENV)/bench-ready
	$(BIN)/python bench/bench_serve.py $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))

$(VENV)/bench-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

.venv-peers/ready: # RecTools needs an older numpy
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check "torch~=2.13.0" "rectools[torch]==0.19.0"
	touch $@

clean-demo:
	rm -rf $(RUN)

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,test]'
	touch $@

data/ready: $(VENV)/ready
	$(BIN)/mvrec fetch --to data
	touch $@

$(RUN)/prepared/manifest.json: $(CONFIG) data/ready
	$(BIN)/mvrec prepare --config $(CONFIG)

$(RUN)/checkpoint/manifest.json: $(RUN)/prepared/manifest.json
	$(BIN)/mvrec train --config $(CONFIG) --overwrite
