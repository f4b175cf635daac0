# SPDX-License-Identifier: Apache-2.0
#
# find_package(infllm): infllm::core, ops, backend, model, engine, and what they link against.
include(CMakeFindDependencyMacro)
find_dependency(Threads)
find_dependency(fmt)
find_dependency(nlohmann_json)
find_dependency(PkgConfig)
pkg_check_modules(HWY REQUIRED IMPORTED_TARGET libhwy)
include("${CMAKE_CURRENT_LIST_DIR}/infllm_targets.cmake")
