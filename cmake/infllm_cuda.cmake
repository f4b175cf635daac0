# SPDX-License-Identifier: Apache-2.0
#
# Finds CUDA for the columns in infllm/backend/cuda: sets INFLLM_HAS_CUDA and says why.
#
#   INFLLM_CUDA=AUTO  build them if a CUDA compiler is there: $CUDAToolkit_ROOT, PATH,
#                     /usr/local/cuda, or the one that `tools/install_deps.sh cuda` puts into .venv
#   INFLLM_CUDA=ON    stop if there is none          INFLLM_CUDA=OFF   a program without CUDA
#
# Needed are nvcc, the static run-time library and the header cublasLt.h. The driver and cuBLASLt
# itself are looked for when the program opens a CUDA device, so it starts on any machine.
#
# Then infllm_cuda_flags is what a target with .cu files links, and infllm_cuda_general and
# infllm_cuda_hopper are values for its CUDA_ARCHITECTURES.
set(INFLLM_CUDA AUTO CACHE STRING "Build the CUDA columns: AUTO, ON or OFF")
set_property(CACHE INFLLM_CUDA PROPERTY STRINGS AUTO ON OFF)
set(infllm_oldest_nvcc 12.4)  # C++20 and cudaGetDriverEntryPointByVersion
set(INFLLM_HAS_CUDA OFF)

# Leaves infllm_cuda_missing empty, or says what was not found.
function(infllm_find_cuda)
  set(infllm_cuda_missing "" PARENT_SCOPE)
  file(GLOB wheels "${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/nvidia/cu*/bin")
  find_program(INFLLM_NVCC nvcc HINTS "$ENV{CUDAToolkit_ROOT}/bin" "${CUDAToolkit_ROOT}/bin"
    PATHS /usr/local/cuda/bin ${wheels})
  mark_as_advanced(INFLLM_NVCC)
  if(NOT INFLLM_NVCC)
    set(infllm_cuda_missing "no nvcc" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND "${INFLLM_NVCC}" --version OUTPUT_VARIABLE text ERROR_QUIET)
  string(REGEX MATCH "release ([0-9.]+)" found "${text}")
  if(NOT found OR CMAKE_MATCH_1 VERSION_LESS infllm_oldest_nvcc)
    set(infllm_cuda_missing
      "${INFLLM_NVCC} has version \"${CMAKE_MATCH_1}\", expected ${infllm_oldest_nvcc} or newer"
      PARENT_SCOPE)
    return()
  endif()
  file(REAL_PATH "${INFLLM_NVCC}" nvcc)
  cmake_path(GET nvcc PARENT_PATH root)
  cmake_path(GET root PARENT_PATH root)
  set(places "${root}" "${root}/targets/x86_64-linux" "${root}/targets/sbsa-linux")
  find_path(INFLLM_CUDA_INCLUDE cublasLt.h HINTS ${places} PATH_SUFFIXES include)
  find_library(INFLLM_CUDA_RUNTIME libcudart_static.a HINTS ${places} PATH_SUFFIXES lib64 lib)
  mark_as_advanced(INFLLM_CUDA_INCLUDE INFLLM_CUDA_RUNTIME)
  if(NOT INFLLM_CUDA_INCLUDE)
    set(infllm_cuda_missing "no cublasLt.h near ${root}" PARENT_SCOPE)
  elseif(NOT INFLLM_CUDA_RUNTIME)
    set(infllm_cuda_missing "no libcudart_static.a near ${root}" PARENT_SCOPE)
  endif()
endfunction()

if(INFLLM_CUDA)
  infllm_find_cuda()
  if(NOT infllm_cuda_missing)
    set(INFLLM_HAS_CUDA ON)
    message(STATUS "CUDA columns: yes, with ${INFLLM_NVCC}")
  elseif(INFLLM_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA columns: no (${infllm_cuda_missing}); "
      "`tools/install_deps.sh cuda` installs a CUDA compiler into .venv")
  else()
    message(FATAL_ERROR "INFLLM_CUDA=${INFLLM_CUDA}, but there is ${infllm_cuda_missing}. Install "
      "the CUDA toolkit, set CUDAToolkit_ROOT, or run tools/install_deps.sh cuda")
  endif()
else()
  message(STATUS "CUDA columns: no (INFLLM_CUDA=${INFLLM_CUDA})")
endif()

if(INFLLM_HAS_CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER "${INFLLM_NVCC}")
  endif()
  # CMake links a first program to look at the compiler; PyPI's toolkit keeps its libraries where
  # its nvcc does not look.
  cmake_path(GET INFLLM_CUDA_RUNTIME PARENT_PATH infllm_cuda_libraries)
  set(ENV{LIBRARY_PATH} "${infllm_cuda_libraries}:$ENV{LIBRARY_PATH}")
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80)
  endif()
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25.1 knows of none beyond C++17
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
    list(APPEND CMAKE_CUDA_COMPILE_FEATURES cuda_std_20)
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  set(CMAKE_CUDA_RUNTIME_LIBRARY None)  # linked by its path, below
  if(INFLLM_CCACHE)
    set(CMAKE_CUDA_COMPILER_LAUNCHER ${INFLLM_CCACHE})
  endif()
  # From Ampere on, as machine code for 8.0 and 9.0 and as PTX for what comes after; and the
  # instructions that only 9.0 has.
  set(infllm_cuda_general 80-real 90)
  set(infllm_cuda_hopper 90a-real)

  add_library(infllm_cuda_flags INTERFACE)
  target_compile_options(infllm_cuda_flags INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:\
--expt-relaxed-constexpr;-lineinfo;-Xcompiler=-Wall,-Wextra,-Wno-missing-field-initializers>")
  target_include_directories(infllm_cuda_flags SYSTEM INTERFACE "${INFLLM_CUDA_INCLUDE}")
  target_link_libraries(infllm_cuda_flags INTERFACE infllm_flags)
endif()
