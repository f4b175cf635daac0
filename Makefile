# SPDX-License-Identifier: Apache-2.0
#
# The commands of the project; `make help` lists them. Each installs the packages it needs from
# docs/dependencies.md and configures by itself. The work is CMake's: see CMakePresets.json.
SHELL := /bin/bash -o pipefail
JOBS ?= $(shell nproc)
CMAKE_FLAGS ?=
FUZZ_SECONDS ?= 60
CTEST_FLAGS ?=
TARGETS ?= all
PYTHON ?= ON
RELEASE := build/release
# What ninja prints in front of each line: done/all, percent, seconds.
export NINJA_STATUS = [%f/%t %p %es] 
SOURCES = $(shell find infllm tests bench fuzz examples python -name '*.h' -o -name '*.cc' -o -name '*.cu*')

.PHONY: help build demo test python cuda gpu-test gpu-sanitize bench gpu-bench fuzz asan tsan lint format-check format tidy \
  render render-cli check-render clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

build:  ## the program, optimised: build/release/infllm
	tools/install_deps.sh build $(ALSO)
	test -f $(RELEASE)/CMakeCache.txt || cmake --preset release -DINFLLM_DEVELOPER=OFF $(CMAKE_FLAGS)
	cmake --build --preset release --parallel $(JOBS) --target infllm

demo: ALSO = demo
demo: build  ## ask for a fact in a long document, dense and sparse
	python3 tools/demo.py --binary $(RELEASE)/infllm

# PyTorch and what builds the package go into .venv; PYTHON=OFF does without them.
PYTHON_FLAGS_ON = -DINFLLM_PYTHON=ON -DPython_EXECUTABLE=$(CURDIR)/.venv/bin/python
PYTHON_FLAGS = $(or $(PYTHON_FLAGS_$(PYTHON)),-DINFLLM_PYTHON=OFF)
PYTHON_GROUP = $(if $(filter ON,$(PYTHON)),python)
PYTHON_TARGET = $(if $(filter ON,$(PYTHON)),infllm_python)

test:  ## everything that needs no GPU: unit tests, fuzz seeds, scripts, the package (PYTHON=OFF: not)
	tools/install_deps.sh build test $(PYTHON_GROUP)
	cmake --preset release -DINFLLM_DEVELOPER=ON $(PYTHON_FLAGS) $(CMAKE_FLAGS)
	cmake --build --preset release --parallel $(JOBS)
	ctest --preset release --parallel $(JOBS) $(CTEST_FLAGS)

python:  ## the Python package in build/release/python, for work on it; users: pip install .
	tools/install_deps.sh build python
	cmake --preset release -DINFLLM_DEVELOPER=OFF $(PYTHON_FLAGS_ON) $(CMAKE_FLAGS)
	cmake --build --preset release --parallel $(JOBS) --target infllm_python

cuda:  ## the program with the CUDA columns: build/cuda/infllm; installs nvcc if there is none
	tools/install_deps.sh build
	tools/install_deps.sh --unless-found nvcc /usr/local/cuda/bin/nvcc cuda
	test -f build/cuda/CMakeCache.txt || cmake --preset cuda -DINFLLM_DEVELOPER=OFF $(CMAKE_FLAGS)
	cmake --build --preset cuda --parallel $(JOBS) --target infllm

gpu-test:  ## every step, the model and the package on this machine's NVIDIA GPU (PYTHON=OFF: no package)
	tools/gpu_test.sh --find
	tools/install_deps.sh build test $(PYTHON_GROUP)
	cmake --preset cuda -DINFLLM_DEVELOPER=ON $(PYTHON_FLAGS) $(CMAKE_FLAGS)
	cmake --build --preset cuda --parallel $(JOBS) --target gpu_tests $(PYTHON_TARGET)
	tools/gpu_test.sh build/cuda/tests

bench:  ## run the benchmarks, add their lines to bench/results, render the tables
	tools/install_deps.sh build test
	cmake --preset release -DINFLLM_DEVELOPER=ON $(CMAKE_FLAGS)
	cmake --build --preset release --parallel $(JOBS) --target benches infllm
	tools/bench.sh $(RELEASE) bench/results/cpu.jsonl
	$(MAKE) render

gpu-sanitize:  ## small cases of the same under compute-sanitizer's four tools
	tools/install_deps.sh build test sanitize
	cmake --preset cuda -DINFLLM_DEVELOPER=ON $(CMAKE_FLAGS)
	cmake --build --preset cuda --parallel $(JOBS) --target gpu_tests
	tools/gpu_sanitize.sh build/cuda/tests $(SANITIZER_RESULTS)
	$(MAKE) render

GPU_RESULTS ?= bench/results/h200.jsonl
SANITIZER_RESULTS ?= bench/results/sanitizers/h200.jsonl
gpu-bench:  ## the benchmarks on this machine's NVIDIA GPU, with PyTorch's attention beside them
	tools/install_deps.sh build test $(PYTHON_GROUP)
	cmake --preset cuda -DINFLLM_DEVELOPER=ON $(PYTHON_FLAGS) $(CMAKE_FLAGS)
	cmake --build --preset cuda --parallel $(JOBS) --target device_bench infllm $(PYTHON_TARGET)
	tools/gpu_bench.sh build/cuda $(GPU_RESULTS)
	$(MAKE) render

fuzz:  ## every fuzz target for FUZZ_SECONDS (60), from the seeds in fuzz/corpus
	tools/install_deps.sh build fuzz
	cmake --preset fuzz $(CMAKE_FLAGS)
	cmake --build --preset fuzz --parallel $(JOBS)
	tools/fuzz.sh build/fuzz/fuzz $(FUZZ_SECONDS)

asan:  ## the tests under AddressSanitizer and UndefinedBehaviorSanitizer
	tools/install_deps.sh build test
	cmake --preset debug $(CMAKE_FLAGS)
	cmake --build --preset debug --parallel $(JOBS) --target $(TARGETS)
	ctest --preset debug --parallel $(JOBS) $(CTEST_FLAGS)

tsan:  ## the tests with threads under ThreadSanitizer
	tools/install_deps.sh build test
	cmake --preset tsan $(CMAKE_FLAGS)
	cmake --build --preset tsan --parallel $(JOBS) --target $(TARGETS)
	ctest --preset tsan --parallel $(JOBS) $(CTEST_FLAGS)

lint: format-check tidy  ## layout, clang-tidy, include arrows
	tools/check_includes.py

format-check:
	tools/install_deps.sh lint
	clang-format-14 --dry-run --Werror $(SOURCES)

tidy:
	tools/install_deps.sh build test lint
	cmake --preset release -DINFLLM_DEVELOPER=ON $(CMAKE_FLAGS)
	run-clang-tidy-14 -quiet -p $(RELEASE) -j $(JOBS) '/infllm/(core|ops|model|engine|app)/' 2>&1 \
	  | sed -E '/^clang-tidy|warnings? generated|^Suppressed|^Use -header-filter/d'

format:  ## lay out every source with clang-format 14
	tools/install_deps.sh lint
	clang-format-14 -i $(SOURCES)

render:  ## docs/performance.md and the README's numbers from bench/results
	tools/render_results.py

render-cli: build  ## docs/cli.md from the program's help
	tools/render_cli.py --binary $(RELEASE)/infllm

check-render:
	tools/render_results.py --check

clean:  ## remove build/
	rm -rf build
