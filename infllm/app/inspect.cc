// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <nlohmann/json.hpp>

#include "infllm/app/commands.h"
#include "infllm/app/memory.h"
#include "infllm/app/progress.h"
#include "infllm/app/report.h"
#include "infllm/app/session.h"
#include "infllm/app/signals.h"
#include "infllm/backend/open.h"
#include "infllm/engine/timings.h"
#include "infllm/model/checkpoint.h"
#include "infllm/ops/kernels.h"

namespace infllm::app {
namespace {

// Everything `inspect` says, before it is text or JSON.
struct Findings {
  model::ModelConfig config;
  std::string source;        // where the weights are
  std::int64_t tensors = 0;  // 0: generated
  std::optional<engine::Tokenizer> tokenizer;
  Backend backend;
  WeightFormat format = WeightFormat::kBF16;
  DType kv_dtype = DType::kBF16;
  struct AtLength {
    std::int32_t tokens = 0;
    MemoryNeed memory;
    bool sparse = false;
    double prompt_share = 1;  // of the keys that a prompt of this length attends to
    double answer_share = 1;  // and its first answer token
  };
  std::vector<AtLength> lengths;
};

Findings::AtLength at_length(const Findings& f, std::int32_t tokens, std::int32_t chunk_tokens) {
  Findings::AtLength at{.tokens = tokens};
  at.memory = memory_need(f.backend, f.config, f.format, f.kv_dtype, tokens, chunk_tokens);
  at.sparse = f.config.sparse && f.config.sparse->is_sparse_at(tokens);
  const SparseConfig* sparse = at.sparse ? &*f.config.sparse : nullptr;
  engine::Visibility prompt, answer;
  prompt.add(0, tokens, sparse);
  answer.add(tokens - 1, tokens, sparse);
  at.prompt_share = prompt.share();
  at.answer_share = answer.share();
  return at;
}

std::vector<std::int32_t> default_lengths(const model::ModelConfig& config) {
  std::vector<std::int32_t> lengths;
  for (std::int32_t tokens = 4096; tokens < config.max_positions; tokens *= 2) {
    lengths.push_back(tokens);
  }
  lengths.push_back(config.max_positions);
  return lengths;
}

Result<Findings> find(const Options& options) {
  Findings f;
  f.config = INFLLM_TRY(open_config(options.model, options.bench.synthetic));
  f.backend = INFLLM_TRY(open_backend(options.model.device, {.threads = options.model.threads}));
  if (options.bench.synthetic.empty()) {
    const auto source = INFLLM_TRY(model::open_checkpoint(options.model.path));
    f.source = source->description();
    f.tensors = static_cast<std::int64_t>(source->names().size());
    f.tokenizer = INFLLM_TRY(engine::Tokenizer::load(options.model.path));
  } else {
    f.source = "generated weights";
  }
  const model::LoadOptions load = INFLLM_TRY(parse_dtype(options.model.dtype));
  f.format = load.format.value_or(model::default_format(f.backend, size_of(f.config.dtype) > 2));
  f.kv_dtype =
      parse_kv_dtype(options.model.kv_dtype).value_or(model::default_kv_dtype(f.backend, f.format));
  INFLLM_TRY(check(f.backend, f.config.kv_layout(f.kv_dtype)));
  const std::vector<std::int32_t> lengths =
      options.lengths.empty() ? default_lengths(f.config) : options.lengths;
  for (const std::int32_t tokens : lengths) {
    f.lengths.push_back(at_length(f, tokens, chunk_tokens(f.backend, options.model)));
  }
  return f;
}

nlohmann::json sparse_json(const std::optional<SparseConfig>& config) {
  if (!config) return nullptr;
  const SparseConfig& s = *config;
  return {{"dense_len", s.dense_len},
          {"topk", s.topk},
          {"window_size", s.window_size},
          {"init_blocks", s.init_blocks},
          {"block_size", s.block_size},
          {"kernel_size", s.kernel_size},
          {"kernel_stride", s.kernel_stride},
          {"use_nope", s.use_nope},
          {"legacy_window", s.legacy_window},
          {"lse", s.lse_source == LseSource::kFine ? "fine" : "coarse"},
          {"budget_blocks", s.budget_blocks()},
          {"local_blocks", s.local_blocks()}};
}

nlohmann::json as_json(const Findings& f) {
  const model::ModelConfig& c = f.config;
  nlohmann::json json = {
      {"architecture", model::name_of(c.architecture)},
      {"source", f.source},
      {"tensors", f.tensors},
      {"parameters", c.parameters()},
      {"dtype", name_of(c.dtype)},
      {"hidden_size", c.hidden_size},
      {"layers", c.layers},
      {"heads", c.heads},
      {"kv_heads", c.kv_heads},
      {"head_dim", c.head_dim},
      {"intermediate_size", c.intermediate_size},
      {"vocab_size", c.vocab_size},
      {"max_positions", c.max_positions},
      {"tied_embeddings", c.tied_embeddings},
      {"rope", {{"type", model::name_of(c.rope.type)}, {"theta", c.rope.theta}}},
      {"eos_tokens", c.eos_tokens},
      {"device", f.backend.name},
      {"device_memory_bytes", available_memory(f.backend)},
      {"sparse_config", sparse_json(c.sparse)},
      {"attention", attention_text(c)},
  };
  if (f.tokenizer) {
    json["tokenizer"] = {{"vocab_size", f.tokenizer->vocab_size()},
                         {"bos", f.tokenizer->bos_id()},
                         {"eos", f.tokenizer->eos_ids()},
                         {"has_chat_template", !f.tokenizer->chat_templates().empty()}};
  }
  json["memory"] = nlohmann::json::array();
  for (const Findings::AtLength& at : f.lengths) {
    json["memory"].push_back({{"tokens", at.tokens},
                              {"attention", at.sparse ? "sparse" : "dense"},
                              {"prompt_visible_share", at.prompt_share},
                              {"answer_visible_share", at.answer_share},
                              {"weights_bytes", at.memory.weights},
                              {"keys_values_bytes", at.memory.keys_values},
                              {"pooled_keys_bytes", at.memory.pooled_keys},
                              {"workspace_bytes", at.memory.workspace},
                              {"total_bytes", at.memory.total()}});
  }
  return json;
}

std::string as_text(const Findings& f) {
  const model::ModelConfig& c = f.config;
  std::string text = fmt::format(
      "model       {}, {} layers, hidden {}, {} query heads over {} key-value heads of {}, MLP "
      "{}\n",
      model::name_of(c.architecture), c.layers, c.hidden_size, c.heads, c.kv_heads, c.head_dim,
      c.intermediate_size);
  text += fmt::format("weights     {:.2f} M parameters in {}, {}{}\n",
                      static_cast<double>(c.parameters()) / 1e6, name_of(c.dtype), f.source,
                      f.tensors > 0 ? fmt::format(", {} tensors", f.tensors) : "");
  text += fmt::format(
      "            {} head; scale_emb {:g}, residual scale {:.6g}, logit scale {:g}\n",
      c.tied_embeddings ? "tied" : "separate", c.scale_emb, c.residual_scale(), c.logit_scale());
  text += fmt::format("positions   {}, rope {} with theta {:g}\n", c.max_positions,
                      model::name_of(c.rope.type), c.rope.theta);
  if (f.tokenizer) {
    text += fmt::format(
        "tokenizer   {} tokens, begin {}, end {}, {}\n", f.tokenizer->vocab_size(),
        f.tokenizer->bos_id(), fmt::join(f.tokenizer->eos_ids(), " "),
        f.tokenizer->chat_templates().empty() ? "no chat template" : "with chat template");
  }
  text +=
      fmt::format("device      {}\nattention   {}\n", device_text(f.backend), attention_text(c));
  if (c.sparse) {
    const SparseConfig& s = *c.sparse;
    text += fmt::format(
        "            keys pooled over {} tokens every {} and {} every {}{}; topk {}, window_size "
        "{}\n",
        s.kernel_size, s.kernel_stride, s.coarse_size(), s.coarse_stride(),
        s.use_nope ? ", before rope" : "", s.topk, s.window_size);
  }
  text += fmt::format("\n{:>9} {:>9} {:>14} {:>14} {:>10} {:>10} {:>11} {:>10} {:>10}\n", "tokens",
                      "attention", "prompt attends", "answer attends", "weights", "KV cache",
                      "pooled keys", "workspace", "total");
  for (const Findings::AtLength& at : f.lengths) {
    const auto bytes = [](std::int64_t count) { return bytes_text(static_cast<double>(count)); };
    text += fmt::format("{:>9} {:>9} {:>13.1f}% {:>13.1f}% {:>10} {:>10} {:>11} {:>10} {:>10}\n",
                        at.tokens, at.sparse ? "sparse" : "dense", 100 * at.prompt_share,
                        100 * at.answer_share, bytes(at.memory.weights),
                        bytes(at.memory.keys_values), bytes(at.memory.pooled_keys),
                        bytes(at.memory.workspace), bytes(at.memory.total()));
  }
  return text;
}

}  // namespace

int inspect_command(const Options& options) {
  const Result<Findings> findings = find(options);
  if (!findings.ok()) return report_failure(findings.status());
  const Status written =
      write_stdout(options.json ? dump(as_json(*findings), 2) + "\n" : as_text(*findings));
  return written.ok() ? kExitOk : report_failure(written);
}

}  // namespace infllm::app
