// SPDX-License-Identifier: Apache-2.0
#include "tests/support/model_rig.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <utility>

#include "infllm/core/mapped_file.h"
#include "infllm/model/checkpoint.h"
#include "infllm/model/safetensors.h"
#include "infllm/ops/kernels.h"
#include "infllm/ops/transformer.h"
#include "tests/support/rig.h"
#include "tests/support/source_folder.h"

namespace infllm::testing {
namespace {

// A NaN in every floating-point type.
void poison(const Backend& backend, const Buffer& buffer) {
  const std::vector<std::byte> nan(buffer.bytes(), std::byte{0xff});
  must(copy_in(backend, buffer.data(), nan.data(), nan.size()));
}

}  // namespace

ModelRig::ModelRig(model::Model model, std::int32_t sequences, std::int32_t max_tokens)
    : model_(std::move(model)), sequences_(sequences), cached_(sequences, 0) {
  const KvLayout layout = model_.kv_layout();
  blocks_ = static_cast<std::int32_t>(layout.config.blocks_in(max_tokens));
  const std::int64_t page_bytes = kv_page_bytes(model_.backend(), layout);
  const auto bytes = static_cast<std::size_t>(page_bytes * blocks_ * sequences);
  for (std::int32_t i = 0; i < model_.config().layers; ++i) {
    memory_.push_back(must(allocate(model_.backend(), bytes)));
    poison(model_.backend(), memory_.back());
    pages_.push_back({memory_.back().data(), layout, page_bytes, blocks_ * sequences});
  }
  for (std::int32_t sequence = 0; sequence < sequences; ++sequence) {
    for (std::int32_t block = 0; block < blocks_; ++block) {
      page_table_.push_back((blocks_ - 1 - block) * sequences + sequence);
    }
  }
  const model::StepLimits limits{.max_tokens = sequences * max_tokens,
                                 .max_sequences = sequences,
                                 .max_kv_length = max_tokens,
                                 .max_logits = sequences * max_tokens};
  workspace_ = must(allocate(model_.backend(), model_.workspace_bytes(limits)));
}

Buffer ModelRig::upload(const void* data, std::size_t bytes) {
  Buffer buffer = must(allocate(model_.backend(), bytes));
  must(copy_in(model_.backend(), buffer.data(), data, bytes));
  return buffer;
}

std::vector<Row> ModelRig::step(const std::vector<Chunk>& chunks) {
  std::vector<std::int32_t> ids, positions, lengths, rows, table, kv_length;
  std::vector<std::int32_t> starts = {0};
  std::vector<std::uint8_t> sparse;
  Batch batch;
  for (const Chunk& chunk : chunks) {
    std::int32_t& cached = cached_[static_cast<std::size_t>(chunk.sequence)];
    const auto count = static_cast<std::int32_t>(chunk.tokens.size());
    const std::int32_t length = std::max(chunk.length, cached + count);
    for (const std::int32_t token : chunk.tokens) {
      ids.push_back(token);
      positions.push_back(cached++);
      lengths.push_back(length);
      rows.push_back(static_cast<std::int32_t>(rows.size()));
    }
    starts.push_back(static_cast<std::int32_t>(ids.size()));
    kv_length.push_back(cached);
    const auto& config = model_.config().sparse;
    sparse.push_back(config && config->is_sparse_at(length) ? 1 : 0);
    batch.any_sparse |= sparse.back() == 1;
    batch.max_query_length = std::max(batch.max_query_length, count);
    batch.max_kv_length = std::max(batch.max_kv_length, cached);
    const auto first = page_table_.begin() + std::ptrdiff_t{chunk.sequence} * blocks_;
    table.insert(table.end(), first, first + blocks_);
  }
  batch.num_sequences = static_cast<std::int32_t>(chunks.size());
  batch.num_tokens = starts.back();
  batch.max_pages = blocks_;
  const auto bytes_of = [](const auto& v) { return v.size() * sizeof(v[0]); };
  const Buffer starts_memory = upload(starts.data(), bytes_of(starts));
  const Buffer lengths_memory = upload(kv_length.data(), bytes_of(kv_length));
  const Buffer table_memory = upload(table.data(), bytes_of(table));
  const Buffer sparse_memory = upload(sparse.data(), bytes_of(sparse));
  const Buffer ids_memory = upload(ids.data(), bytes_of(ids));
  const Buffer positions_memory = upload(positions.data(), bytes_of(positions));
  const Buffer deciding_memory = upload(lengths.data(), bytes_of(lengths));
  const Buffer rows_memory = upload(rows.data(), bytes_of(rows));
  batch.query_start = starts_memory.as<std::int32_t>();
  batch.kv_length = lengths_memory.as<std::int32_t>();
  batch.page_table = table_memory.as<std::int32_t>();
  batch.sparse = sparse_memory.as<std::uint8_t>();

  // Exactly what the step asks for, so that a step that asks for too little is found out.
  const std::size_t needed = model_.workspace_bytes(batch, batch.num_tokens);
  EXPECT_LE(needed, workspace_.bytes()) << "a step within the limits needs more than they said";
  poison(model_.backend(), workspace_);
  const Buffer logits = must(allocate(model_.backend(), model_.logits_bytes(batch.num_tokens)));
  must(model_.forward({.batch = batch,
                       .token_ids = ids_memory.as<std::int32_t>(),
                       .positions = positions_memory.as<std::int32_t>(),
                       .lengths = deciding_memory.as<std::int32_t>(),
                       .pages = pages_,
                       .logit_rows = rows_memory.as<std::int32_t>(),
                       .num_logits = batch.num_tokens,
                       .logits = logits.data(),
                       .workspace = {workspace_.data(), needed},
                       .times = &times}));
  std::vector<Row> out;
  const std::int64_t vocab = model_.config().vocab_size;
  const std::int64_t row_bytes = vocab * size_of(model_.backend().kernels->activation);
  for (std::int32_t row = 0; row < batch.num_tokens; ++row) {
    out.emplace_back(vocab);
    must(read_floats(model_.backend(), logits.data() + row * row_bytes, vocab, out.back().data()));
  }
  return out;
}

std::vector<std::int32_t> ModelRig::greedy(std::int32_t sequence,
                                           const std::vector<std::int32_t>& prompt,
                                           std::int32_t count) {
  std::vector<std::int32_t> text;
  std::vector<std::int32_t> next = prompt;
  while (static_cast<std::int32_t>(text.size()) < count) {
    const Row logits = step({{.sequence = sequence, .tokens = next}}).back();
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    text.push_back(static_cast<std::int32_t>(best));
    next = {text.back()};
  }
  return text;
}

std::filesystem::path golden_folder(const std::string& name) {
  return source_folder() / "tests/golden/model" / name;
}

ModelGolden read_golden(const std::string& name) {
  std::ifstream in(golden_folder(name) / "golden.json");
  const nlohmann::json json = nlohmann::json::parse(in);
  ModelGolden golden;
  golden.prompt = json["prompt"].get<std::vector<std::int32_t>>();
  golden.rows = json["rows"].get<std::vector<std::int32_t>>();
  golden.greedy = json["greedy"].get<std::vector<std::int32_t>>();
  golden.margin = json["margin"].get<double>();
  golden.bf16_error = json.value("bf16_error", 0.0);
  const MappedFile file = must(MappedFile::open(golden_folder(name) / "golden.safetensors"));
  const TensorView logits = must(model::parse_safetensors(file.bytes(), name)).front().view;
  const auto* data = static_cast<const std::byte*>(logits.data);
  for (std::int64_t row = 0; row < logits.shape[0]; ++row) {
    Row& out = golden.logits.emplace_back(logits.shape[1]);
    std::memcpy(out.data(), data + row * logits.shape[1] * 4, out.size() * sizeof(float));
    for (const float value : out) {
      golden.largest = std::max(golden.largest, std::abs(static_cast<double>(value)));
    }
  }
  return golden;
}

model::Model load_golden(const Backend& backend, const std::string& name,
                         const model::Overrides& overrides, const model::LoadOptions& options) {
  const std::filesystem::path folder = golden_folder(name);
  model::ModelConfig config = must(model::read_config(folder));
  must(apply_overrides(config, overrides));
  const auto source = must(model::open_checkpoint(folder));
  return must(model::Model::load(backend, config, *source, options));
}

model::Overrides sparse_from(std::int32_t dense_len) {
  return {.sparse = true,
          .kernel_size = 8,
          .kernel_stride = 4,
          .init_blocks = 1,
          .block_size = 16,
          .window_size = 16,
          .topk = 3,
          .dense_len = dense_len};
}

std::vector<std::int32_t> random_tokens(std::int32_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(count));
  for (std::int32_t& token : tokens) {
    token = static_cast<std::int32_t>(random() % kGoldenVocabulary);
  }
  return tokens;
}

double distance(const std::vector<Row>& a, const std::vector<Row>& b) {
  constexpr double kNever = std::numeric_limits<double>::infinity();
  if (a.size() != b.size()) return kNever;
  double largest = 0;
  for (std::size_t row = 0; row < a.size(); ++row) {
    if (a[row].size() != b[row].size()) return kNever;
    for (std::size_t i = 0; i < a[row].size(); ++i) {
      const double difference = static_cast<double>(a[row][i]) - static_cast<double>(b[row][i]);
      if (!std::isfinite(difference)) return kNever;
      largest = std::max(largest, std::abs(difference));
    }
  }
  return largest;
}

std::vector<Row> pick(const std::vector<Row>& rows, const std::vector<std::int32_t>& which) {
  std::vector<Row> out;
  for (const std::int32_t row : which) out.push_back(rows.at(static_cast<std::size_t>(row)));
  return out;
}

}  // namespace infllm::testing
