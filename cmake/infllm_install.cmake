# SPDX-License-Identifier: Apache-2.0
#
# `cmake --install build/release --prefix DIR` puts down the program, the libraries and their
# headers, and a package, so that another project can write
#
#   find_package(infllm REQUIRED)
#   target_link_libraries(engine PRIVATE infllm::backend)
include(CMakePackageConfigHelpers)

set(infllm_package "${CMAKE_INSTALL_LIBDIR}/cmake/infllm")
install(TARGETS infllm)
install(TARGETS infllm_core infllm_ops infllm_backend infllm_model infllm_engine infllm_flags
  EXPORT infllm_targets)
if(INFLLM_HAS_CUDA)
  install(TARGETS infllm_cuda EXPORT infllm_targets)
endif()
foreach(module core ops backend model engine)
  install(DIRECTORY "${PROJECT_SOURCE_DIR}/infllm/${module}"
    DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/infllm" FILES_MATCHING PATTERN "*.h"
    PATTERN "*-inl.h" EXCLUDE)
endforeach()
install(EXPORT infllm_targets NAMESPACE infllm:: DESTINATION "${infllm_package}")
install(FILES "${CMAKE_CURRENT_LIST_DIR}/infllm-config.cmake" DESTINATION "${infllm_package}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/infllm-config-version.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/infllm-config-version.cmake" DESTINATION "${infllm_package}")
