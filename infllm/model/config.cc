// SPDX-License-Identifier: Apache-2.0
#include "infllm/model/config.h"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "infllm/core/json.h"
#include "infllm/core/mapped_file.h"
#include "infllm/model/checkpoint.h"
#include "infllm/model/json_fields.h"

namespace infllm::model {
namespace {

using Json = nlohmann::json;

// Far above any model, and small enough that no product of two of them overflows 64 bits.
constexpr std::int32_t kMaxLayers = 1024;
constexpr std::int32_t kMaxHeads = 1024;
constexpr std::int32_t kMaxHeadDim = 1024;
constexpr std::int32_t kMaxHidden = 1 << 17;
constexpr std::int32_t kMaxIntermediate = 1 << 20;
constexpr std::int32_t kMaxVocab = 1 << 20;
constexpr std::int32_t kMaxPositions = 1 << 26;

constexpr std::string_view kFile = "config.json";

Result<Architecture> read_architecture(const JsonFields& fields) {
  const std::string type = INFLLM_TRY(fields.text("model_type", ""));
  if (type == "minicpm" || type == "minicpm4") return Architecture::kMiniCpm4;
  if (type == "llama") return Architecture::kLlama;
  constexpr std::string_view kExpected = "\"minicpm\", \"minicpm4\" or \"llama\"";
  if (!type.empty()) return fields.unexpected("model_type", kExpected);

  const Json* classes = fields.find("architectures");
  const Json first =
      classes && classes->is_array() && !classes->empty() ? classes->front() : Json();
  if (first == "MiniCPMForCausalLM" || first == "MiniCPM4ForCausalLM") {
    return Architecture::kMiniCpm4;
  }
  if (first == "LlamaForCausalLM") return Architecture::kLlama;
  return fields.unexpected("model_type", kExpected);
}

// What changes the result and is not implemented.
Status refuse_unsupported(const JsonFields& fields) {
  for (const char* name : {"attention_bias", "mlp_bias", "use_qk_norm"}) {
    if (INFLLM_TRY(fields.boolean(name, false))) {
      return unsupported(
          fmt::format("{}: {} is true, expected false: this is not implemented", kFile, name));
    }
  }
  if (fields.has("num_experts")) {
    INFLLM_TRY(fields.integer("num_experts", {.min = 0, .max = 0}));
  }
  const std::string activation = INFLLM_TRY(fields.text("hidden_act", "silu"));
  if (activation != "silu" && activation != "swish") {
    return fields.unexpected("hidden_act", "\"silu\"");
  }
  const Json* quantization = INFLLM_TRY(fields.object("quantization_config"));
  if (quantization != nullptr) {
    const std::string method =
        INFLLM_TRY(JsonFields(*quantization, "config.json: quantization_config")
                       .text("quant_method", "unnamed"));
    return unsupported(
        fmt::format("{}: quantization_config names the method \"{:.32}\", expected unquantized "
                    "weights; take the unquantized checkpoint and quantize on load with int8",
                    kFile, method));
  }
  return {};
}

Result<DType> read_dtype(const JsonFields& fields) {
  const char* name = fields.has("dtype") ? "dtype" : "torch_dtype";
  std::string dtype = INFLLM_TRY(fields.text(name, "bfloat16"));
  if (dtype.starts_with("torch.")) dtype.erase(0, 6);
  if (dtype == "bfloat16") return DType::kBF16;
  if (dtype == "float16") return DType::kF16;
  if (dtype == "float32") return DType::kF32;
  if (dtype == "float64") return DType::kF64;
  return fields.unexpected(name, "\"bfloat16\", \"float16\", \"float32\" or \"float64\"");
}

Result<RopeType> read_rope_type(const JsonFields& fields) {
  const char* name = fields.has("rope_type") ? "rope_type" : "type";
  const std::string type = INFLLM_TRY(fields.text(name, "default"));
  if (type == "su") return RopeType::kLongRope;
  for (const RopeType known : {RopeType::kDefault, RopeType::kLinear, RopeType::kLlama3,
                               RopeType::kYarn, RopeType::kLongRope}) {
    if (type == name_of(known)) return known;
  }
  return fields.unexpected(
      name, "\"default\", \"linear\", \"llama3\", \"yarn\" or \"longrope\" (\"su\")");
}

// rope_parameters is the newer name of rope_scaling, and holds rope_theta too.
Result<RopeConfig> read_rope(const JsonFields& fields, const ModelConfig& config) {
  const char* name = fields.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  const Json* object = INFLLM_TRY(fields.object(name));
  const Json empty = Json::object();
  const JsonFields rope(object != nullptr ? *object : empty, fmt::format("{}: {}", kFile, name));

  RopeConfig out;
  const NumberField theta{.min = 1.001, .max = 1e12, .fallback = 10000.0};
  out.theta = INFLLM_TRY((rope.has("rope_theta") ? rope : fields).number("rope_theta", theta));
  out.type = INFLLM_TRY(read_rope_type(rope));
  for (const JsonFields& place : {fields, rope}) {
    INFLLM_TRY(place.number("partial_rotary_factor", {.min = 1, .max = 1, .fallback = 1.0}));
  }
  if (out.type == RopeType::kDefault) return out;

  const bool long_rope = out.type == RopeType::kLongRope;
  NumberField factor{.min = 1, .max = 1e6};
  if (long_rope) factor.fallback = 0.0;
  out.factor = INFLLM_TRY(rope.number("factor", factor));
  const IntegerField original{.min = 2, .max = kMaxPositions, .fallback = config.max_positions};
  constexpr const char* kOriginal = "original_max_position_embeddings";
  out.original_max_positions =
      INFLLM_TRY((rope.has(kOriginal) ? rope : fields).integer(kOriginal, original));
  if (rope.has("attention_factor")) {
    out.attention_factor = INFLLM_TRY(rope.number("attention_factor", {.min = 1e-3, .max = 1e3}));
  }
  const auto half = static_cast<std::size_t>(config.head_dim / 2);
  if (long_rope) {
    out.short_factor = INFLLM_TRY(rope.factors("short_factor", half));
    out.long_factor = INFLLM_TRY(rope.factors("long_factor", half));
  } else if (out.type == RopeType::kLlama3) {
    out.low_freq_factor = INFLLM_TRY(rope.number("low_freq_factor", {.min = 1e-3, .max = 1e3}));
    const NumberField high{.min = out.low_freq_factor * 1.001, .max = 1e6};
    out.high_freq_factor = INFLLM_TRY(rope.number("high_freq_factor", high));
  } else if (out.type == RopeType::kYarn) {
    out.beta_slow =
        INFLLM_TRY(rope.number("beta_slow", {.min = 1e-3, .max = 1e3, .fallback = 1.0}));
    const NumberField fast{.min = out.beta_slow, .max = 1e6, .fallback = 32.0};
    out.beta_fast = INFLLM_TRY(rope.number("beta_fast", fast));
    const NumberField mscale{.min = 0, .max = 100, .fallback = 0.0};
    out.mscale = INFLLM_TRY(rope.number("mscale", mscale));
    out.mscale_all_dim = INFLLM_TRY(rope.number("mscale_all_dim", mscale));
    out.truncate = INFLLM_TRY(rope.boolean("truncate", true));
  }
  return out;
}

Result<std::optional<SparseConfig>> read_sparse(const JsonFields& fields) {
  const Json* object = INFLLM_TRY(fields.object("sparse_config"));
  if (object == nullptr) return std::optional<SparseConfig>();
  const JsonFields sparse(*object, fmt::format("{}: sparse_config", kFile));
  SparseConfig out;
  const auto read = [&](const char* name, std::int32_t& value) -> Status {
    value = INFLLM_TRY(sparse.integer(name, {.min = -1, .fallback = value}));
    return {};
  };
  INFLLM_TRY(read("kernel_size", out.kernel_size));
  INFLLM_TRY(read("kernel_stride", out.kernel_stride));
  INFLLM_TRY(read("init_blocks", out.init_blocks));
  INFLLM_TRY(read("block_size", out.block_size));
  INFLLM_TRY(read("window_size", out.window_size));
  INFLLM_TRY(read("topk", out.topk));
  INFLLM_TRY(read("dense_len", out.dense_len));
  out.use_nope = INFLLM_TRY(sparse.boolean("use_nope", out.use_nope));
  const Status valid = check(out);
  if (!valid.ok()) return data_error(fmt::format("{}: {}", kFile, valid.message()));
  return std::optional<SparseConfig>(out);
}

Status read_shape(const JsonFields& fields, ModelConfig& c) {
  c.hidden_size = INFLLM_TRY(fields.integer("hidden_size", {.min = 1, .max = kMaxHidden}));
  c.layers = INFLLM_TRY(fields.integer("num_hidden_layers", {.min = 1, .max = kMaxLayers}));
  c.heads = INFLLM_TRY(fields.integer("num_attention_heads", {.min = 1, .max = kMaxHeads}));
  c.kv_heads = INFLLM_TRY(
      fields.integer("num_key_value_heads", {.min = 1, .max = c.heads, .fallback = c.heads}));
  if (c.heads % c.kv_heads != 0) {
    return fields.unexpected("num_key_value_heads",
                             fmt::format("a divisor of num_attention_heads = {}", c.heads));
  }
  if (!fields.has("head_dim") && c.hidden_size % c.heads != 0) {
    return fields.unexpected(
        "hidden_size",
        fmt::format("a multiple of num_attention_heads = {}, or a head_dim beside it", c.heads));
  }
  const std::int32_t even_split = c.hidden_size / c.heads;
  c.head_dim = INFLLM_TRY(
      fields.integer("head_dim", {.min = 2, .max = kMaxHeadDim, .fallback = even_split}));
  if (c.head_dim < 2 || c.head_dim > kMaxHeadDim || c.head_dim % 2 != 0) {
    return data_error(
        fmt::format("{}: the head dimension is {}, expected an even number from 2 to "
                    "{}; it is head_dim, or hidden_size / num_attention_heads",
                    kFile, c.head_dim, kMaxHeadDim));
  }
  c.intermediate_size =
      INFLLM_TRY(fields.integer("intermediate_size", {.min = 1, .max = kMaxIntermediate}));
  c.vocab_size = INFLLM_TRY(fields.integer("vocab_size", {.min = 1, .max = kMaxVocab}));
  c.max_positions = INFLLM_TRY(fields.integer("max_position_embeddings",
                                              {.min = 2, .max = kMaxPositions, .fallback = 32768}));
  c.rms_norm_eps = static_cast<float>(
      INFLLM_TRY(fields.number("rms_norm_eps", {.min = 0, .max = 1, .fallback = 1e-6})));
  return {};
}

Status read_scalings(const JsonFields& fields, ModelConfig& c) {
  const bool mup = c.architecture == Architecture::kMiniCpm4;
  c.tied_embeddings = INFLLM_TRY(fields.boolean("tie_word_embeddings", mup));
  c.scale_depth = std::sqrt(c.layers);
  c.dim_model_base = c.hidden_size;
  if (!mup) return {};
  // Absent means the class default, null means "no scaling".
  const auto read = [&](const char* name, double absent, double null, double& value) -> Status {
    const double fallback = fields.is_null(name) ? null : absent;
    value = INFLLM_TRY(fields.number(name, {.min = 1e-6, .max = 1e9, .fallback = fallback}));
    return {};
  };
  INFLLM_TRY(read("scale_emb", 12, 1, c.scale_emb));
  INFLLM_TRY(read("scale_depth", 1.4, c.scale_depth, c.scale_depth));
  return read("dim_model_base", 256, c.hidden_size, c.dim_model_base);
}

}  // namespace

Result<ModelConfig> parse_config(std::string_view json) {
  const Json document = INFLLM_TRY(parse_json(
      json,
      {.what = std::string(kFile), .max_bytes = 1 << 20, .max_depth = 16, .max_values = 100'000}));
  if (!document.is_object()) {
    return data_error(fmt::format("{}: not a JSON object", kFile));
  }
  const JsonFields fields(document, std::string(kFile));
  ModelConfig config;
  config.architecture = INFLLM_TRY(read_architecture(fields));
  INFLLM_TRY(refuse_unsupported(fields));
  INFLLM_TRY(read_shape(fields, config));
  INFLLM_TRY(read_scalings(fields, config));
  config.rope = INFLLM_TRY(read_rope(fields, config));
  config.sparse = INFLLM_TRY(read_sparse(fields));
  config.dtype = INFLLM_TRY(read_dtype(fields));
  const std::vector<std::int32_t> bos =
      INFLLM_TRY(fields.tokens("bos_token_id", config.vocab_size));
  if (!bos.empty()) config.bos_token = bos.front();
  config.eos_tokens = INFLLM_TRY(fields.tokens("eos_token_id", config.vocab_size));
  return config;
}

Result<ModelConfig> read_config(const std::filesystem::path& folder) {
  INFLLM_TRY(check_config_file(folder));
  const MappedFile file = INFLLM_TRY(MappedFile::open(folder / kFile));
  Result<ModelConfig> config = parse_config(file.text());
  if (!config.ok()) return config.status().with_context(folder.string());
  return config;
}

}  // namespace infllm::model
