// SPDX-License-Identifier: Apache-2.0
//
// The paged cache of every layer in one buffer, and who owns which page. A page holds one block
// (64 tokens with the released numbers) of one sequence in each of the layers, under one number.
//
//   KvPool pool = INFLLM_TRY(KvPool::create(backend, layout, layers, pages));
//   std::vector<std::int32_t> mine;
//   if (!pool.extend(mine, tokens)) ...   // too few free pages; nothing changed
//   pool.shrink(mine, 100);               // keeps the pages of the first 100 tokens
//   std::vector<std::int32_t> yours = pool.share(mine);   // read by both, written by neither
//   if (!INFLLM_TRY(pool.own(yours, 1))) ...   // all but the first copied, so that it may write
//   pool.shrink(mine, 0);                      // what nobody else has is free again
//
// The pool holds no computation. Pages are not cleared: what a sequence may read is stated by its
// length.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "infllm/ops/backend.h"
#include "infllm/ops/kv_cache.h"

namespace infllm::engine {

class KvPool {
 public:
  // Allocates `pages` pages for each of `layers` layers. kResourceExhausted names the bytes that
  // were needed.
  static Result<KvPool> create(const Backend& backend, const KvLayout& layout, std::int32_t layers,
                               std::int32_t pages);

  // What create() would allocate: keys, values and pooled keys.
  static std::int64_t bytes(const Backend& backend, const KvLayout& layout, std::int32_t layers,
                            std::int64_t pages);

  // The cache of one layer, as the model reads and writes it.
  KvPages layer(std::int32_t index) const;

  // Gives `pages` what it lacks to hold `tokens` tokens. False, and no change, when too few pages
  // are free.
  bool extend(std::vector<std::int32_t>& pages, std::int64_t tokens);
  // Takes back what `pages` has beyond `tokens` tokens.
  void shrink(std::vector<std::int32_t>& pages, std::int64_t tokens);

  // The same pages for one more list. Each is free again when all its lists have given it back.
  std::vector<std::int32_t> share(std::span<const std::int32_t> pages);
  // Puts copies in place of what `pages` shares with others from place `first` on. False, and no
  // change, when too few pages are free.
  Result<bool> own(std::vector<std::int32_t>& pages, std::int64_t first);
  // How many leading pages a sequence with `tokens` cached tokens will not write any more: all of
  // their windows end among those.
  std::int64_t settled_pages(std::int64_t tokens) const;

  std::int32_t total_pages() const { return total_; }
  std::int32_t free_pages() const { return static_cast<std::int32_t>(free_.size()); }
  std::int32_t page_tokens() const { return layout_.config.block_size; }
  std::int64_t pages_for(std::int64_t tokens) const { return layout_.config.blocks_in(tokens); }
  std::int64_t bytes() const { return static_cast<std::int64_t>(buffer_.bytes()); }
  const KvLayout& layout() const { return layout_; }

 private:
  std::int32_t take();

  Backend backend_;
  KvLayout layout_;
  std::int64_t page_bytes_ = 0;
  std::int32_t layers_ = 0;
  std::int32_t total_ = 0;
  Buffer buffer_;                     // [layers, total, page_bytes]
  std::vector<std::int32_t> free_;    // a stack: the page freed last is the warmest
  std::vector<std::int32_t> owners_;  // lists that have the page
};

}  // namespace infllm::engine
