// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/kv_pool.h"

#include <fmt/format.h>

#include <numeric>

namespace infllm::engine {

std::int64_t KvPool::bytes(const Backend& backend, const KvLayout& layout, std::int32_t layers,
                           std::int64_t pages) {
  return kv_page_bytes(backend, layout) * layers * pages;
}

Result<KvPool> KvPool::create(const Backend& backend, const KvLayout& layout, std::int32_t layers,
                              std::int32_t pages) {
  INFLLM_CHECK(layers > 0 && pages > 0, "a pool needs layers and pages");
  KvPool pool;
  pool.layout_ = layout;
  pool.page_bytes_ = kv_page_bytes(backend, layout);
  pool.layers_ = layers;
  pool.total_ = pages;
  const std::int64_t needed = bytes(backend, layout, layers, pages);
  Result<Buffer> buffer = allocate(backend, static_cast<std::size_t>(needed));
  if (!buffer.ok()) {
    return buffer.status().with_context(
        fmt::format("key-value cache of {} tokens", std::int64_t{pages} * pool.page_tokens()));
  }
  pool.buffer_ = std::move(buffer).value();
  pool.free_.resize(pages);
  std::iota(pool.free_.rbegin(), pool.free_.rend(), 0);  // page 0 is handed out first
  return pool;
}

KvPages KvPool::layer(std::int32_t index) const {
  INFLLM_CHECK(0 <= index && index < layers_, "no such layer");
  return {.data = buffer_.data() + std::int64_t{index} * total_ * page_bytes_,
          .layout = layout_,
          .page_bytes = page_bytes_,
          .num_pages = total_};
}

bool KvPool::extend(std::vector<std::int32_t>& pages, std::int64_t tokens) {
  const std::int64_t wanted = pages_for(tokens) - static_cast<std::int64_t>(pages.size());
  if (wanted > free_pages()) return false;
  for (std::int64_t i = 0; i < wanted; ++i) {
    pages.push_back(free_.back());
    free_.pop_back();
  }
  return true;
}

void KvPool::shrink(std::vector<std::int32_t>& pages, std::int64_t tokens) {
  const std::int64_t keep = pages_for(tokens);
  while (static_cast<std::int64_t>(pages.size()) > keep) {
    free_.push_back(pages.back());
    pages.pop_back();
  }
}

}  // namespace infllm::engine
