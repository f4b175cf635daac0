# SPDX-License-Identifier: Apache-2.0
#
# cmake -DBUILD=DIR -DEXAMPLE=DIR -P test_install.cmake: installs BUILD below itself, and builds and
# runs the example as a stranger would.
function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ERROR_IS_FATAL ANY)
endfunction()
set(work "${BUILD}/install_test")
file(REMOVE_RECURSE "${work}")
run("${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${work}/prefix")
run("${CMAKE_COMMAND}" -S "${EXAMPLE}" -B "${work}/build" -DCMAKE_BUILD_TYPE=Release
  "-DCMAKE_PREFIX_PATH=${work}/prefix")
run("${CMAKE_COMMAND}" --build "${work}/build")
run("${work}/build/one_layer" 8192)
