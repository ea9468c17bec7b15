# The commands of the project; `make help` lists them. Everything is built under build/ and .venv/.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
export PATH := $(CURDIR)/.venv/bin:$(PATH)

ARGS ?=#            further arguments of `make demo`
PYTEST_ARGS ?=#     further arguments of pytest
FUZZ_SECONDS ?= 60# how long `make fuzz` runs
JOBS ?= $(shell nproc)
CXX_FILES = $(shell git ls-files '*.cc' '*.h' '*.cpp' '*.c' '*.cu' '*.cuh')
PY_FILES = python tests bench scripts/verify_installation.py

.PHONY: help demo test build test-cpp test-python examples lint format coverage coverage-cpp sanitize sanitize-clang tsan fuzz bench wheel clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo:  ## set everything up and run a real language model through AdaAttn (ARGS="--tokens 2048 --json")
	scripts/setup demo
	adaattn eval $(ARGS)

test: build  ## set everything up and run all tests, C++ and Python
	$(MAKE) --no-print-directory test-cpp test-python

build:  ## set everything up and build the library with its C++ tests
	scripts/setup test
	cmake --preset cpu
	cmake --build --preset cpu -j $(JOBS)

test-cpp:  ## the C++ tests of what is built
	ctest --preset cpu -j $(JOBS)

test-python:  ## the Python tests of what is installed in .venv
	python -m pytest $(PYTEST_ARGS) tests/python

examples:  ## install the library under build/prefix and build and run the examples against it
	cmake --install build/cpu --prefix build/prefix
	cmake -S examples -B build/examples -G Ninja -DCMAKE_PREFIX_PATH=$(CURDIR)/build/prefix
	cmake --build build/examples
	ctest --test-dir build/examples --output-on-failure --no-tests=error

lint:  ## check formatting, types and suspicious code, C++ and Python
	scripts/setup lint
	clang-format --dry-run --Werror $(CXX_FILES)
	ruff format --check $(PY_FILES)
	ruff check $(PY_FILES)
	mypy
	scripts/clang_tidy build/cpu

format:  ## format all sources in place
	clang-format -i $(CXX_FILES)
	ruff format $(PY_FILES)
	ruff check --fix $(PY_FILES)

coverage: coverage-cpp  ## line coverage of the C++ and the Python tests; fails below 90 %
	python -m pytest --cov=adaattn --cov-report=term --cov-fail-under=90 $(PYTEST_ARGS) tests/python

# Lines of the innermost loops run more than 2^32 times, which gcovr would take for a fault of gcov's.
coverage-cpp:
	scripts/setup test
	cmake --preset coverage
	cmake --build --preset coverage -j $(JOBS)
	find build/coverage -name '*.gcda' -delete
	ctest --preset coverage -j $(JOBS)
	gcovr --root . --filter src/ --filter include/ --gcov-ignore-parse-errors=negative_hits.warn_once_per_file \
	    --gcov-suspicious-hits-threshold 0 --merge-lines --fail-under-line 90 --print-summary build/coverage

sanitize:  ## the C++ tests under the address and undefined-behaviour sanitizers (GCC)
	scripts/setup test
	cmake --preset dev
	cmake --build --preset dev -j $(JOBS)
	ctest --preset dev -j $(JOBS)

# The same with clang, in the build that the fuzzer uses, too.
sanitize-clang:
	scripts/setup fuzz
	cmake --preset fuzz
	cmake --build --preset fuzz -j $(JOBS)
	ctest --preset fuzz -j $(JOBS)

tsan:  ## the threaded C++ tests under the thread sanitizer
	scripts/setup fuzz
	cmake --preset tsan
	cmake --build --preset tsan -j $(JOBS)
	ctest --preset tsan -j $(JOBS)

fuzz:  ## fuzz the C interface for FUZZ_SECONDS seconds
	scripts/setup fuzz
	cmake --preset fuzz
	cmake --build --preset fuzz -j $(JOBS) --target fuzz_c_api
	scripts/fuzz build/fuzz $(FUZZ_SECONDS)

bench:  ## measure against PyTorch and write the README's table
	scripts/setup demo
	adaattn bench --readme README.md $(ARGS)

wheel:  ## the wheel, under dist/
	scripts/setup demo
	uv build --wheel --out-dir dist

clean:  ## remove everything that was built, but not .venv
	rm -rf build dist
