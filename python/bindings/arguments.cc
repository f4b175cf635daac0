// SPDX-License-Identifier: Apache-2.0
#include "python/bindings/arguments.h"

#include <fmt/format.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string>
#include <vector>

namespace infllm::python {
namespace {

namespace nb = nanobind;

Result<DType> dtype_of(const std::string& name) {
  for (const DType dtype : {DType::kF64, DType::kF32, DType::kBF16, DType::kF16}) {
    if (name == name_of(dtype)) return dtype;
  }
  return invalid_argument(fmt::format("dtype \"{}\", expected f64, f32, bf16 or f16", name));
}

// In the order of SparseConfig.numbers() in python/infllm/config.py.
Result<SparseConfig> config_of(const std::vector<std::int32_t>& n) {
  constexpr std::size_t kNumbers = 11;
  if (n.size() != kNumbers) {
    return invalid_argument(
        fmt::format("sparse_config: {} numbers, expected {}", n.size(), kNumbers));
  }
  SparseConfig config{.kernel_size = n[0],
                      .kernel_stride = n[1],
                      .init_blocks = n[2],
                      .block_size = n[3],
                      .window_size = n[4],
                      .topk = n[5],
                      .use_nope = n[7] != 0,
                      .dense_len = n[6],
                      .lse_source = n[8] != 0 ? LseSource::kFine : LseSource::kCoarse,
                      .score_rounding = n[9] != 0 ? ScoreRounding::kNone : ScoreRounding::kBF16,
                      .legacy_window = n[10] != 0};
  INFLLM_TRY(check(config));
  return config;
}

}  // namespace

Status settle(const Device& device, const KvPages& pages, Batch& batch) {
  if (!device.is_host()) return {};
  INFLLM_TRY(check(batch));
  const std::int32_t bound = batch.max_query_length;
  std::int32_t longest = 0;
  bool any_sparse = false;
  for (std::int32_t s = 0; s < batch.num_sequences; ++s) {
    longest = std::max(longest, batch.query_start[s + 1] - batch.query_start[s]);
    any_sparse |= batch.sparse != nullptr && batch.sparse[s] != 0;
  }
  if (longest > bound) {
    return invalid_argument(
        fmt::format("max_seqlen_q = {}, but the longest sequence has {} tokens; pass at least that",
                    bound, longest));
  }
  batch.max_query_length = longest;
  batch.any_sparse = any_sparse;
  return check_contents(batch, pages.layout.config.block_size, pages.num_pages);
}

void bind_arguments(nb::module_& module) {
  nb::class_<SparseConfig>(module, "SparseConfig")
      .def(
          "__init__",
          [](SparseConfig* self, const std::vector<std::int32_t>& numbers) {
            new (self) SparseConfig(value_or_raise(config_of(numbers)));
          },
          nb::arg("numbers"));
  nb::class_<KvLayout>(module, "KvLayout")
      .def(
          "__init__",
          [](KvLayout* self, const std::string& dtype, std::int32_t kv_heads, std::int32_t head_dim,
             bool pooled_keys, const SparseConfig& config) {
            new (self) KvLayout{.dtype = value_or_raise(dtype_of(dtype)),
                                .kv_heads = kv_heads,
                                .head_dim = head_dim,
                                .pooled_keys = pooled_keys,
                                .config = config};
          },
          nb::arg("dtype"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("pooled_keys"),
          nb::arg("config"))
      .def(
          "page_bytes",
          [](const KvLayout& self, const Device& device) {
            raise_if_failed(check(device.backend(), self));
            return kv_page_bytes(device.backend(), self);
          },
          nb::arg("device"), "Bytes of a page of config.block_size tokens; refuses the layout.");
  nb::class_<KvPages>(module, "KvPages")
      .def(
          "__init__",
          [](KvPages* self, std::uintptr_t data, const KvLayout& layout, std::int64_t page_bytes,
             std::int32_t num_pages) {
            new (self) KvPages{pointer(data), layout, page_bytes, num_pages};
          },
          nb::arg("data"), nb::arg("layout"), nb::arg("page_bytes"), nb::arg("num_pages"));
  nb::class_<Batch>(module, "Batch")
      .def(
          "__init__",
          [](Batch* self, std::int32_t num_sequences, std::int32_t num_tokens,
             std::uintptr_t query_start, std::uintptr_t kv_length, std::uintptr_t page_table,
             std::int32_t max_pages, std::uintptr_t sparse, std::int32_t max_query_length,
             std::int32_t max_kv_length) {
            new (self) Batch{.num_sequences = num_sequences,
                             .num_tokens = num_tokens,
                             .query_start = pointer<const std::int32_t>(query_start),
                             .kv_length = pointer<const std::int32_t>(kv_length),
                             .page_table = pointer<const std::int32_t>(page_table),
                             .max_pages = max_pages,
                             .sparse = pointer<const std::uint8_t>(sparse),
                             .any_sparse = sparse != 0,
                             .max_query_length = max_query_length,
                             .max_kv_length = max_kv_length};
          },
          nb::arg("num_sequences"), nb::arg("num_tokens"), nb::arg("query_start"),
          nb::arg("kv_length"), nb::arg("page_table"), nb::arg("max_pages"), nb::arg("sparse"),
          nb::arg("max_query_length"), nb::arg("max_kv_length"));
}

}  // namespace infllm::python
