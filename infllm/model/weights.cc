// SPDX-License-Identifier: Apache-2.0
#include "infllm/model/weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <unordered_set>

#include "infllm/model/printable.h"
#include "infllm/ops/kernels.h"

namespace infllm::model {
namespace {

// A tensor that the model needs: its name and the shape that the config implies.
struct Wanted {
  std::string name;
  std::vector<std::int64_t> shape;
};

struct WantedLayer {
  Wanted attention_norm, q, k, v, o, mlp_norm, gate, up, down;
};

// The table of names. MiniCPM4 and Llama checkpoints use the same ones.
struct WantedModel {
  Wanted embedding;
  std::vector<WantedLayer> layers;
  Wanted final_norm;
  std::optional<Wanted> head;  // none when tied

  explicit WantedModel(const ModelConfig& c) {
    const std::int64_t hidden = c.hidden_size;
    const std::int64_t q = std::int64_t{c.heads} * c.head_dim;
    const std::int64_t kv = std::int64_t{c.kv_heads} * c.head_dim;
    const std::int64_t inner = c.intermediate_size;
    embedding = {"model.embed_tokens.weight", {c.vocab_size, hidden}};
    for (std::int32_t i = 0; i < c.layers; ++i) {
      const std::string at = fmt::format("model.layers.{}.", i);
      layers.push_back({.attention_norm = {at + "input_layernorm.weight", {hidden}},
                        .q = {at + "self_attn.q_proj.weight", {q, hidden}},
                        .k = {at + "self_attn.k_proj.weight", {kv, hidden}},
                        .v = {at + "self_attn.v_proj.weight", {kv, hidden}},
                        .o = {at + "self_attn.o_proj.weight", {hidden, q}},
                        .mlp_norm = {at + "post_attention_layernorm.weight", {hidden}},
                        .gate = {at + "mlp.gate_proj.weight", {inner, hidden}},
                        .up = {at + "mlp.up_proj.weight", {inner, hidden}},
                        .down = {at + "mlp.down_proj.weight", {hidden, inner}}});
    }
    final_norm = {"model.norm.weight", {hidden}};
    if (!c.tied_embeddings) head = Wanted{"lm_head.weight", {c.vocab_size, hidden}};
  }

  std::vector<const Wanted*> all() const {
    std::vector<const Wanted*> list = {&embedding, &final_norm};
    if (head) list.push_back(&*head);
    for (const WantedLayer& l : layers) {
      list.insert(list.end(), {&l.attention_norm, &l.q, &l.k, &l.v, &l.o, &l.mlp_norm, &l.gate,
                               &l.up, &l.down});
    }
    return list;
  }
};

std::int64_t elements(const Wanted& wanted) {
  std::int64_t product = 1;
  for (const std::int64_t size : wanted.shape) product *= size;
  return product;
}

// A tensor that is not part of the model means that this is another model than config.json says.
// Two are harmless: tables that old files keep of RoPE, and the copy of a tied head.
Status refuse_extra(const WeightSource& source, const std::vector<const Wanted*>& wanted,
                    bool tied_embeddings) {
  std::unordered_set<std::string> known;
  for (const Wanted* tensor : wanted) known.insert(tensor->name);
  if (tied_embeddings) known.insert("lm_head.weight");
  for (const std::string& name : source.names()) {
    if (known.contains(name) || name.ends_with(".rotary_emb.inv_freq")) continue;
    return unsupported(fmt::format(
        "{}: tensor {} is not part of the model that config.json describes; biases, quantized "
        "weights and draft heads are not supported",
        source.description(), printable(name)));
  }
  return {};
}

class Loader {
 public:
  Loader(const Backend& backend, const WeightSource& source, const LoadOptions& options)
      : backend_(backend), source_(source), options_(options) {}

  // Everything that can be wrong without reading a weight. Nothing is allocated yet.
  Status check_all(const WantedModel& wanted, bool tied_embeddings) {
    const std::vector<const Wanted*> list = wanted.all();
    bool is_wide = false;
    for (const Wanted* tensor : list) {
      const DType dtype = INFLLM_TRY(source_.check(tensor->name, tensor->shape));
      total_ += elements(*tensor) * size_of(dtype);
      is_wide |= tensor->shape.size() == 2 && size_of(dtype) >= 4;
    }
    INFLLM_TRY(refuse_extra(source_, list, tied_embeddings));
    if (tied_embeddings) {
      const Wanted& table = wanted.embedding;  // read twice: as a table and as the head
      total_ += elements(table) * size_of(INFLLM_TRY(source_.check(table.name, table.shape)));
    }
    format_ = options_.format.value_or(default_format(backend_, is_wide));
    return {};
  }

  WeightFormat format() const { return format_; }

  Result<WeightTensor> fetch(const Wanted& wanted) const {
    if (options_.cancelled && options_.cancelled()) return cancelled("loading was stopped");
    return source_.tensor(wanted.name, wanted.shape);
  }

  Result<LinearWeight> linear(std::initializer_list<const Wanted*> parts) {
    std::vector<WeightTensor> tensors;  // keeps the owners until the matrix is packed
    std::vector<TensorView> views;
    for (const Wanted* part : parts) {
      tensors.push_back(INFLLM_TRY(fetch(*part)));
      views.push_back(tensors.back().view);
    }
    const std::int32_t group = format_ == WeightFormat::kI8 ? options_.int8_group_size : 0;
    Result<LinearWeight> packed = pack_linear(backend_, views, format_, group);
    if (!packed.ok()) return packed.status().with_context((*parts.begin())->name);
    for (const TensorView& view : views) count(view);
    return packed;
  }

  Result<Buffer> vector(const Wanted& wanted) {
    const WeightTensor tensor = INFLLM_TRY(fetch(wanted));
    Buffer buffer = INFLLM_TRY(upload_vector(backend_, tensor.view));
    count(tensor.view);
    return buffer;
  }

  Result<LayerWeights> layer(const WantedLayer& wanted) {
    LayerWeights layer;
    layer.attention_norm = INFLLM_TRY(vector(wanted.attention_norm));
    layer.qkv = INFLLM_TRY(linear({&wanted.q, &wanted.k, &wanted.v}));
    layer.o = INFLLM_TRY(linear({&wanted.o}));
    layer.mlp_norm = INFLLM_TRY(vector(wanted.mlp_norm));
    layer.gate_up = INFLLM_TRY(linear({&wanted.gate, &wanted.up}));
    layer.down = INFLLM_TRY(linear({&wanted.down}));
    return layer;
  }

  void count(const TensorView& view) {
    done_ += view.bytes();
    if (options_.on_progress) options_.on_progress(done_, total_);
  }

 private:
  const Backend& backend_;
  const WeightSource& source_;
  const LoadOptions& options_;
  WeightFormat format_ = WeightFormat::kF32;
  std::int64_t done_ = 0;
  std::int64_t total_ = 0;
};

}  // namespace

WeightFormat default_format(const Backend& backend, bool is_wide) {
  return is_wide && size_of(backend.kernels->activation) > 2 ? WeightFormat::kF32
                                                             : WeightFormat::kBF16;
}

DType default_kv_dtype(const Backend& backend, WeightFormat format) {
  const DType activation = backend.kernels->activation;
  return format == WeightFormat::kF32 || size_of(activation) == 2 ? activation : DType::kBF16;
}

std::int64_t Weights::decode_bytes() const {
  std::int64_t bytes = head.bytes() + static_cast<std::int64_t>(final_norm.bytes());
  for (const LayerWeights& layer : layers) {
    bytes += static_cast<std::int64_t>(layer.attention_norm.bytes() + layer.mlp_norm.bytes());
    bytes += layer.qkv.bytes() + layer.o.bytes() + layer.gate_up.bytes() + layer.down.bytes();
  }
  return bytes;
}

std::int64_t Weights::bytes() const { return decode_bytes() + embedding.values.bytes(); }

Result<Weights> load_weights(const Backend& backend, const ModelConfig& config,
                             const WeightSource& source, const LoadOptions& options) {
  const WantedModel wanted(config);
  Loader loader(backend, source, options);
  INFLLM_TRY(loader.check_all(wanted, config.tied_embeddings));
  Weights weights;
  weights.format = loader.format();
  const WeightTensor table = INFLLM_TRY(loader.fetch(wanted.embedding));
  weights.embedding = INFLLM_TRY(upload_table(backend, table.view));
  if (weights.embedding.storage.data() == nullptr) weights.embedding_owner = table.owner;
  loader.count(table.view);
  for (const WantedLayer& layer : wanted.layers) {
    weights.layers.push_back(INFLLM_TRY(loader.layer(layer)));
  }
  weights.final_norm = INFLLM_TRY(loader.vector(wanted.final_norm));
  weights.head = INFLLM_TRY(loader.linear({wanted.head ? &*wanted.head : &wanted.embedding}));
  return weights;
}

Result<std::optional<WeightFormat>> parse_weight_format(std::string_view name) {
  if (name == "auto") return std::optional<WeightFormat>();
  if (name == "float32" || name == "f32") return std::optional(WeightFormat::kF32);
  if (name == "bfloat16" || name == "bf16") return std::optional(WeightFormat::kBF16);
  if (name == "int8" || name == "i8") return std::optional(WeightFormat::kI8);
  return invalid_argument(
      fmt::format("weight format \"{:.32}\", expected auto, float32, bfloat16 or int8", name));
}

}  // namespace infllm::model
