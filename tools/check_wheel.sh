#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# `pip install .` as a user does it, but without CUDA and beside everything else: the wheel is built,
# unpacked into build/wheel, and takes ten training steps from there.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
rm -rf build/wheel
# Under the name of make's compiler ccache finds make's objects.
CC=cc CXX=c++ "$python" -m pip wheel . --quiet --disable-pip-version-check --no-build-isolation --no-deps \
  -C cmake.define.INFLLM_CUDA=OFF -w build/wheel
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-index \
  --target build/wheel/site build/wheel/infllm-*.whl
example=$PWD/examples/train_step.py
cd build/wheel  # away from the sources
PYTHONPATH=site "$python" "$example"
