// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/kv_pool.h"

#include <fmt/format.h>

#include <algorithm>
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
  pool.backend_ = backend;
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
  pool.owners_.resize(pages, 0);
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

std::int32_t KvPool::take() {
  const std::int32_t page = free_.back();
  free_.pop_back();
  owners_[page] = 1;
  return page;
}

bool KvPool::extend(std::vector<std::int32_t>& pages, std::int64_t tokens) {
  const std::int64_t wanted = pages_for(tokens) - static_cast<std::int64_t>(pages.size());
  if (wanted > free_pages()) return false;
  for (std::int64_t i = 0; i < wanted; ++i) pages.push_back(take());
  return true;
}

void KvPool::shrink(std::vector<std::int32_t>& pages, std::int64_t tokens) {
  const std::int64_t keep = pages_for(tokens);
  while (static_cast<std::int64_t>(pages.size()) > keep) {
    if (--owners_[pages.back()] == 0) free_.push_back(pages.back());
    pages.pop_back();
  }
}

std::vector<std::int32_t> KvPool::share(std::span<const std::int32_t> pages) {
  for (const std::int32_t page : pages) owners_[page] += 1;
  return {pages.begin(), pages.end()};
}

Result<bool> KvPool::own(std::vector<std::int32_t>& pages, std::int64_t first) {
  const auto begin = pages.begin() + std::min(first, std::ssize(pages));
  const auto is_shared = [&](std::int32_t page) { return owners_[page] > 1; };
  if (std::count_if(begin, pages.end(), is_shared) > free_pages()) return false;
  for (auto page = begin; page != pages.end(); ++page) {
    if (!is_shared(*page)) continue;
    const std::int32_t copy = free_.back();
    for (std::int32_t i = 0; i < layers_; ++i) {
      auto* const pages_of_layer = static_cast<std::byte*>(layer(i).data);
      INFLLM_TRY(copy_in(backend_, pages_of_layer + copy * page_bytes_,
                         pages_of_layer + *page * page_bytes_,
                         static_cast<std::size_t>(page_bytes_)));
    }
    owners_[*page] -= 1;
    *page = take();
  }
  return true;
}

std::int64_t KvPool::settled_pages(std::int64_t tokens) const {
  const SparseConfig& c = layout_.config;
  // From a page's first token to the end of the last fine, and of the last coarse window in it.
  const std::int64_t fine = c.block_size - c.kernel_stride + c.kernel_size;
  const std::int64_t coarse = c.block_size - 4 * c.kernel_stride + 4 * c.kernel_size;
  const std::int64_t reach = layout_.pooled_keys ? std::max(fine, coarse) : c.block_size;
  return tokens < reach ? 0 : (tokens - reach) / c.block_size + 1;
}

}  // namespace infllm::engine
