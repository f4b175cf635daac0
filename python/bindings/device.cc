// SPDX-License-Identifier: Apache-2.0
#include "python/bindings/device.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "infllm/backend/open.h"

namespace infllm::python {

namespace nb = nanobind;

void bind_device(nb::module_& module) {
  module.def("available", &available_backends, "Full names of the devices here, slowest first.");
  nb::class_<Device>(module, "Device", "An opened backend; see infllm/backend/open.h for names.")
      .def(
          "__init__",
          [](Device* self, const std::string& name, int threads) {
            Result<Backend> backend = [&] {
              const cuda::KeepCurrentDevice keep;
              return open_backend(name, {.threads = threads});
            }();
            new (self) Device(value_or_raise(std::move(backend)));
          },
          nb::arg("name"), nb::arg("threads") = 0)
      .def_prop_ro("name", [](const Device& self) { return self.backend().name; })
      .def_prop_ro("activation", [](const Device& self) {
        return std::string(name_of(self.backend().kernels->activation));
      });
}

}  // namespace infllm::python
