# SPDX-License-Identifier: Apache-2.0
#
# infllm_module(NAME DEPS a b ... LINK x y ... WITHOUT folder ...)
#
# One folder, one static library: every .cc below infllm/NAME becomes the target infllm_NAME (a
# slash in NAME becomes an underscore). DEPS are other modules, LINK are outside libraries that only
# this module's sources see, WITHOUT are folders that are built elsewhere.
function(infllm_module name)
  cmake_parse_arguments(arg "" "" "DEPS;LINK;WITHOUT" ${ARGN})
  string(REPLACE "/" "_" target "infllm_${name}")
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/infllm/${name}/*.cc")
  foreach(folder IN LISTS arg_WITHOUT)
    list(FILTER sources EXCLUDE REGEX "/infllm/${name}/${folder}/")
  endforeach()
  add_library(${target} STATIC ${sources})
  set_target_properties(${target} PROPERTIES EXPORT_NAME "${name}")
  target_include_directories(${target} PUBLIC "$<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}>"
    "$<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>")
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_link_libraries(${target} PRIVATE infllm_flags ${arg_LINK})
  foreach(dep IN LISTS arg_DEPS)
    string(REPLACE "/" "_" dep_target "infllm_${dep}")
    target_link_libraries(${target} PUBLIC ${dep_target})
  endforeach()
endfunction()
