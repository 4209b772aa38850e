# The verbs that people and CI use. Everything lives in .venv; nothing else on the machine is touched.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
KERNELS := $(shell find kernels -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name CMakeLists.txt)
MODULES := $(shell find quantcli -name '*.py' | sort | cksum | cut -d' ' -f1)
CPP := $(filter %.h %.cpp %.cu,$(KERNELS))
PICO := tests/data/pico

.DEFAULT_GOAL := help
.PHONY: help setup build demo test long-test peer-test bench lint docs format clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.packages: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt scikit-build-core nanobind cmake ninja
	@touch $@

# An editable install knows each module's file by name, so it is made again when modules have moved.
$(VENV)/.modules-$(MODULES): $(VENV)/.packages
	@touch $@

$(VENV)/.installed: $(VENV)/.packages $(VENV)/.modules-$(MODULES) $(KERNELS)
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev,data]'
	@touch $@

setup: $(VENV)/.installed  ## the virtual environment with quantcli in it, kernels compiled

build: setup  ## compile the kernels (setup does it too, whenever a source has changed)

demo: setup  ## the main job on the model that ships with the tests
	BIN=$(BIN) MODEL=$(PICO) ./demo.sh

test: setup  ## the tests, in a process of one thread for each core
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n logical --maxprocesses 8 --dist worksteal

long-test: setup  ## the tests that take many minutes: thousands of broken folders, every family in every format
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m long -n logical --maxprocesses 8 --dist worksteal

peer-test: setup  ## the tests against the peers' own programs (see tests/PEERS.md)
	$(BIN)/pytest -q -m peer

bench: setup  ## timings of the kernels against their torch references
	$(BIN)/python tests/bench/bench_solve.py
	$(BIN)/python tests/bench/bench_awq.py

lint: setup  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

docs: setup  ## the pages as a site in build/site; a link that leads nowhere is an error (--quiet would silence that too)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: setup  ## put every file into the house's form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:  ## remove everything that make made
	rm -rf $(VENV) build
