// SPDX-License-Identifier: Apache-2.0
#include "bench/support/trace.h"

#include <fmt/format.h>

#include "bench/support/attention_data.h"
#include "infllm/core/arena.h"
#include "infllm/engine/kv_pool.h"
#include "infllm/engine/plan.h"
#include "infllm/engine/text_file.h"
#include "infllm/engine/tokenizer.h"
#include "infllm/model/checkpoint.h"
#include "infllm/model/layer.h"
#include "infllm/model/model.h"
#include "infllm/ops/kernels.h"
#include "infllm/ops/overlap.h"

namespace infllm::bench {
namespace {

constexpr std::size_t kMostText = std::size_t{64} << 20;

Result<std::vector<std::int32_t>> read_tokens(const TraceOptions& options) {
  const engine::Tokenizer tokenizer = INFLLM_TRY(engine::Tokenizer::load(options.model));
  const std::string text = INFLLM_TRY(engine::read_text_file(options.text, kMostText));
  const std::vector<std::int32_t> once = tokenizer.encode(text, {});
  if (once.empty()) return data_error(fmt::format("{}: no text", options.text));
  std::vector<std::int32_t> tokens;
  while (static_cast<std::int32_t>(tokens.size()) < options.tokens) {
    tokens.insert(tokens.end(), once.begin(), once.end());
  }
  tokens.resize(static_cast<std::size_t>(options.tokens));
  return tokens;
}

// The step's first hidden states and rotary tables, as Model::forward() makes them.
Status begin(const model::Step& step, const model::Model& model, const engine::Plan& plan) {
  const model::ModelConfig& config = model.config();
  const model::Rope rope(config.rope, config.head_dim, config.max_positions);
  const std::span<const float> numbers = rope.numbers();
  const Buffer on_device = INFLLM_TRY(allocate(step.backend, numbers.size_bytes()));
  INFLLM_TRY(copy_in(step.backend, on_device.data(), numbers.data(), numbers.size_bytes()));
  RopeTableParams tables = rope.tables(on_device.as<float>());
  tables.tokens = step.batch.num_tokens;
  tables.positions = plan.positions();
  tables.lengths = plan.lengths();
  tables.cos = step.floats_at(step.plan.cos);
  tables.sin = step.floats_at(step.plan.sin);
  INFLLM_TRY(rope_tables(step.backend, tables));
  INFLLM_TRY(embed(step.backend, {.table = &model.weights().embedding,
                                  .tokens = step.batch.num_tokens,
                                  .token_ids = plan.token_ids(),
                                  .scale = static_cast<float>(config.scale_emb),
                                  .y = step.at(step.plan.hidden)}));
  return synchronize(step.backend);  // before the numbers go
}

}  // namespace

Result<Trace> trace_selection(const Backend& backend, const SparseConfig& config,
                              const TraceOptions& options) {
  model::ModelConfig model_config = INFLLM_TRY(model::read_config(options.model));
  model_config.sparse = config;
  model_config.sparse->dense_len = -1;
  if (options.layer < 0 || options.layer >= model_config.layers) {
    return invalid_argument(fmt::format("{}: no layer {}, expected 0 to {}", options.model,
                                        options.layer, model_config.layers - 1));
  }
  const auto source = INFLLM_TRY(model::open_checkpoint(options.model));
  const model::Model model = INFLLM_TRY(model::Model::load(backend, model_config, *source));

  // One step holds all tokens.
  const KvLayout layout = model.kv_layout();
  const auto pages = static_cast<std::int32_t>(layout.config.blocks_in(options.tokens));
  engine::KvPool pool =
      INFLLM_TRY(engine::KvPool::create(backend, layout, model_config.layers, pages));
  engine::Plan plan = INFLLM_TRY(engine::Plan::create(backend, {.max_tokens = options.tokens,
                                                                .max_sequences = 1,
                                                                .max_pages = pages,
                                                                .max_kv_length = options.tokens}));
  const engine::ModeRule rule{.sparse = model_config.sparse};
  engine::Sequence sequence;
  sequence.restart(INFLLM_TRY(read_tokens(options)), rule, pool);
  INFLLM_CHECK(pool.extend(sequence.pages, options.tokens), "the pool holds the text");
  const engine::Work work{&sequence, options.tokens};
  INFLLM_TRY(plan.build({&work, 1}, rule, pool));

  const std::size_t bytes = model.workspace_bytes(plan.batch(), 1);
  const Buffer memory = INFLLM_TRY(allocate(backend, bytes));
  model::Step step{.backend = backend, .config = model_config, .batch = plan.batch()};
  step.plan = model::plan_activations(model_config, size_of(backend.kernels->activation),
                                      options.tokens, 1);
  step.activations = memory.data();
  step.workspace = std::span(memory.data(), bytes).subspan(align_up(step.plan.bytes));
  INFLLM_TRY(begin(step, model, plan));
  for (std::int32_t i = 0; i < options.layer; ++i) {
    INFLLM_TRY(model::attention_layer(step, model.weights().layers[i], pool.layer(i)));
    INFLLM_TRY(model::mlp_layer(step, model.weights().layers[i]));
  }
  // After its attention the layer's queries are still in their place.
  const KvPages layer = pool.layer(options.layer);
  INFLLM_TRY(model::attention_layer(step, model.weights().layers[options.layer], layer));
  const AttentionShape shape{"", model_config.heads, model_config.kv_heads, model_config.head_dim};
  Chooser chooser =
      INFLLM_TRY(Chooser::create(backend, shape, *model_config.sparse, layer, plan.batch()));
  INFLLM_TRY(chooser.run(backend, step.at(step.plan.q)));
  Trace trace{.selection = INFLLM_TRY(chooser.read(backend)),
              .heads_kv = model_config.kv_heads,
              .columns = chooser.columns()};
  trace.overlap = neighbours_overlap(*model_config.sparse, trace.selection, trace.heads_kv,
                                     options.tokens, trace.columns, options.tokens);
  return trace;
}

}  // namespace infllm::bench
