// SPDX-License-Identifier: Apache-2.0
#include "infllm/model/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <optional>

#include "infllm/core/dtype.h"
#include "infllm/model/checkpoint.h"
#include "tests/support/model_rig.h"
#include "tests/support/rig.h"
#include "tests/support/safetensors_file.h"

namespace infllm::model {
namespace {

using ::infllm::testing::FileTensor;
using ::infllm::testing::golden_folder;
using ::infllm::testing::ModelRig;
using ::infllm::testing::Row;
using ::infllm::testing::safetensors_bytes;
using ::infllm::testing::TemporaryFolder;
using ::infllm::testing::write_file;
using ::testing::AllOf;
using ::testing::HasSubstr;

ModelConfig small_config() {
  ModelConfig c;
  c.architecture = Architecture::kMiniCpm4;
  c.hidden_size = 32;
  c.layers = 2;
  c.heads = 2;
  c.kv_heads = 1;
  c.head_dim = 64;
  c.intermediate_size = 48;
  c.vocab_size = 100;
  c.max_positions = 512;
  c.scale_emb = 12;
  c.scale_depth = 1.4;
  c.dim_model_base = 16;
  return c;
}

using Tensors = std::map<std::string, FileTensor>;

Tensors small_tensors() {
  Tensors tensors = {{"model.embed_tokens.weight", {.shape = {100, 32}}},
                     {"model.norm.weight", {.shape = {32}}},
                     {"lm_head.weight", {.shape = {100, 32}}}};
  for (const std::string layer : {"model.layers.0.", "model.layers.1."}) {
    tensors[layer + "input_layernorm.weight"].shape = {32};
    tensors[layer + "post_attention_layernorm.weight"].shape = {32};
    tensors[layer + "self_attn.q_proj.weight"].shape = {128, 32};
    tensors[layer + "self_attn.k_proj.weight"].shape = {64, 32};
    tensors[layer + "self_attn.v_proj.weight"].shape = {64, 32};
    tensors[layer + "self_attn.o_proj.weight"].shape = {32, 128};
    tensors[layer + "mlp.gate_proj.weight"].shape = {48, 32};
    tensors[layer + "mlp.up_proj.weight"].shape = {48, 32};
    tensors[layer + "mlp.down_proj.weight"].shape = {32, 48};
  }
  return tensors;
}

class WeightsTest : public ::testing::Test {
 protected:
  Result<Weights> load(const LoadOptions& options = {}) {
    write_file(folder_ / "model.safetensors", safetensors_bytes(tensors_));
    const auto source = open_checkpoint(folder_.path());
    if (!source.ok()) return source.status();
    return load_weights(backend_, config_, **source, options);
  }
  std::string message() {
    const Result<Weights> weights = load();
    return weights.ok() ? "accepted" : weights.status().message();
  }

  Backend backend_ = infllm::testing::open("cpu", 1);
  TemporaryFolder folder_;
  ModelConfig config_ = small_config();
  Tensors tensors_ = small_tensors();
};

TEST_F(WeightsTest, FusesProjections) {
  const Result<Weights> weights = load();
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  ASSERT_EQ(weights->layers.size(), 2u);
  const LayerWeights& layer = weights->layers[1];
  EXPECT_EQ(layer.qkv.outputs, 256);
  EXPECT_EQ(layer.qkv.inputs, 32);
  EXPECT_EQ(layer.o.outputs, 32);
  EXPECT_EQ(layer.gate_up.outputs, 96);
  EXPECT_EQ(layer.down.inputs, 48);
  EXPECT_EQ(weights->head.outputs, 100);
  EXPECT_EQ(weights->embedding.values.shape[0], 100);
  EXPECT_EQ(weights->bytes(), weights->decode_bytes() + 100 * 32 * 4);
}

TEST_F(WeightsTest, MissingTensorsAreNamed) {
  for (const auto& [name, tensor] : small_tensors()) {
    tensors_ = small_tensors();
    tensors_.erase(name);
    EXPECT_THAT(message(), HasSubstr("no tensor \"" + name + "\", expected one of shape"));
  }
}

TEST_F(WeightsTest, MisshapenTensorsAreNamedBeforeAnythingIsAllocated) {
  for (const auto& [name, tensor] : small_tensors()) {
    tensors_ = small_tensors();
    tensors_[name].shape[0] += 1;
    EXPECT_THAT(message(), AllOf(HasSubstr("tensor \"" + name + "\" has the shape ["),
                                 HasSubstr("from config.json")));
  }
  // A config that would need terabytes is refused for its shapes, not for memory.
  tensors_ = small_tensors();
  config_.vocab_size = 1 << 20;
  config_.hidden_size = 1 << 17;
  EXPECT_THAT(message(), HasSubstr("has the shape [100, 32], expected [1048576, 131072]"));
}

TEST_F(WeightsTest, ExtraTensorsAreNamed) {
  tensors_["model.layers.0.self_attn.q_proj.bias"].shape = {128};
  EXPECT_THAT(message(), HasSubstr("tensor \"model.layers.0.self_attn.q_proj.bias\" is not part"));
  tensors_ = small_tensors();
  tensors_["model.layers.2.input_layernorm.weight"].shape = {32};
  EXPECT_THAT(message(), HasSubstr("\"model.layers.2.input_layernorm.weight\" is not part"));
  tensors_ = small_tensors();
  tensors_["model.layers.0.self_attn.rotary_emb.inv_freq"].shape = {32};
  EXPECT_EQ(message(), "accepted") << "a table that older checkpoints keep";
}

TEST_F(WeightsTest, IntegersAreNoWeights) {
  tensors_["model.norm.weight"].dtype = "I32";
  EXPECT_THAT(message(), HasSubstr("tensor \"model.norm.weight\" holds i32"));
}

TEST_F(WeightsTest, TiedHeadsAreTheTable) {
  config_.tied_embeddings = true;
  EXPECT_EQ(message(), "accepted") << "with a copy of the head in the file";
  tensors_.erase("lm_head.weight");
  const Result<Weights> weights = load();
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  EXPECT_EQ(weights->head.outputs, 100);
}

TEST_F(WeightsTest, FormatFollowsTheCheckpoint) {
  for (const auto& [dtype, expected] :
       {std::pair{"F32", WeightFormat::kF32}, std::pair{"F64", WeightFormat::kF32},
        std::pair{"BF16", WeightFormat::kBF16}, std::pair{"F16", WeightFormat::kBF16}}) {
    for (auto& [name, tensor] : tensors_) tensor.dtype = dtype;
    EXPECT_EQ(load().value().format, expected) << dtype;
    EXPECT_EQ(load({.format = WeightFormat::kI8}).value().head.format, WeightFormat::kI8);
  }
  // Half precision with norms in f32 is a half precision checkpoint.
  for (auto& [name, tensor] : tensors_) {
    tensor.dtype = tensor.shape.size() == 1 ? "F32" : "BF16";
  }
  EXPECT_EQ(load().value().format, WeightFormat::kBF16);
}

TEST_F(WeightsTest, ProgressCountsEveryByteOnce) {
  for (const bool tied : {false, true}) {
    config_.tied_embeddings = tied;
    std::int64_t last = 0;
    std::int64_t total = 0;
    const LoadOptions options{.on_progress = [&](std::int64_t done, std::int64_t of) {
      EXPECT_GT(done, last);
      last = done;
      total = of;
    }};
    ASSERT_TRUE(load(options).ok());
    EXPECT_EQ(last, total);
    EXPECT_EQ(total, 4 * (2 * 100 * 32 + 32 + 2 * (256 * 32 + 32 * 128 + 3 * 48 * 32 + 2 * 32)));
  }
}

TEST_F(WeightsTest, LoadingCanBeStopped) {
  int asked = 0;
  const Result<Weights> weights = load({.cancelled = [&] { return ++asked == 5; }});
  ASSERT_FALSE(weights.ok());
  EXPECT_EQ(weights.status().code(), StatusCode::kCancelled);
}

TEST_F(WeightsTest, Int8RefusesWeightsThatAreNotFinite) {
  const float bad = std::nanf("");
  tensors_["model.layers.1.mlp.up_proj.weight"].data =
      std::string(reinterpret_cast<const char*>(&bad), sizeof(bad));
  const Result<Weights> weights = load({.format = WeightFormat::kI8});
  ASSERT_FALSE(weights.ok());
  EXPECT_THAT(weights.status().message(), HasSubstr("model.layers.1.mlp"));
}

// A float16 file and an odd address: the same model as its float32 original, rounded.
TEST(Weights, HalfPrecisionFilesLoadLikeTheirValues) {
  const TemporaryFolder folder;
  ModelConfig config = small_config();
  Tensors half = small_tensors();
  Tensors wide = small_tensors();
  std::uint32_t state = 1;
  for (auto& [name, tensor] : half) {
    tensor.dtype = "F16";
    std::int64_t count = 1;
    for (const std::int64_t size : tensor.shape) count *= size;
    for (std::int64_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      // Values that bf16 holds too, so that neither file loses anything.
      const float value = static_cast<float>(static_cast<int>(state >> 24) - 128) / 512.0f;
      const F16 narrow(value);
      tensor.data.append(reinterpret_cast<const char*>(&narrow.bits), 2);
      wide[name].data.append(reinterpret_cast<const char*>(&value), 4);
    }
  }
  half["a.rotary_emb.inv_freq"] = {.dtype = "U8", .shape = {1}, .data = "x"};
  const Backend backend = infllm::testing::open("cpu", 1);
  const auto logits = [&](const Tensors& tensors) {
    write_file(folder / "model.safetensors", safetensors_bytes(tensors));
    const auto source = open_checkpoint(folder.path());
    ModelRig rig(Model::load(backend, config, **source, {.format = WeightFormat::kBF16}).value(), 1,
                 64);
    return rig.step({{.tokens = {1, 2, 3, 99}}});
  };
  EXPECT_EQ(infllm::testing::distance(logits(half), logits(wide)), 0);
}

TEST(SyntheticWeights, AreDeterministicAndSane) {
  const std::int64_t shape[] = {300, 64};
  const auto draw = [&](std::uint64_t seed, const char* name) {
    const WeightTensor tensor = synthetic_weights(seed)->tensor(name, shape).value();
    EXPECT_EQ(tensor.view.dtype, DType::kBF16);
    std::vector<BF16> values(300 * 64);
    std::memcpy(values.data(), tensor.view.data, values.size() * sizeof(BF16));
    return values;
  };
  const auto bits_differ = [](const std::vector<BF16>& a, const std::vector<BF16>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(BF16)) != 0;
  };
  const std::vector<BF16> one = draw(1, "model.layers.0.mlp.up_proj.weight");
  EXPECT_FALSE(bits_differ(one, draw(1, "model.layers.0.mlp.up_proj.weight")));
  EXPECT_TRUE(bits_differ(one, draw(2, "model.layers.0.mlp.up_proj.weight")));
  EXPECT_TRUE(bits_differ(one, draw(1, "model.layers.1.mlp.up_proj.weight")));
  EXPECT_NE(std::memcmp(one.data(), one.data() + 64, 128), 0) << "rows differ";

  const auto deviation = [](const std::vector<BF16>& values) {
    double square = 0;
    for (const BF16 value : values) square += std::pow(static_cast<double>(float(value)), 2);
    return std::sqrt(square / static_cast<double>(values.size()));
  };
  EXPECT_NEAR(deviation(one), 1 / 8.0, 0.005) << "1 / sqrt(inputs)";
  EXPECT_NEAR(deviation(draw(1, "lm_head.weight")), 0.1, 0.005);
}

TEST(SyntheticWeights, MakeAModelWithFiniteLogits) {
  ModelConfig config = small_config();
  config.layers = 24;
  config.sparse = SparseConfig{.dense_len = -1};
  const auto source = synthetic_weights();
  ModelRig rig(Model::load(infllm::testing::open("cpu", 1), config, *source).value(), 1, 256);
  std::vector<std::int32_t> tokens(256);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::int32_t>(i % 100);
  const std::vector<Row> logits = rig.step({{.tokens = tokens}});
  EXPECT_EQ(infllm::testing::distance(logits, logits), 0) << "every logit is finite";
  const auto [low, high] = std::minmax_element(logits.back().begin(), logits.back().end());
  EXPECT_GT(*high - *low, 0.1f) << "and they differ";
  EXPECT_LT(*high - *low, 100.0f);
}

TEST(WeightFormatName, IsTheOptionOfTheCommandLine) {
  EXPECT_EQ(parse_weight_format("auto").value(), std::nullopt);
  EXPECT_EQ(parse_weight_format("float32").value(), WeightFormat::kF32);
  EXPECT_EQ(parse_weight_format("bf16").value(), WeightFormat::kBF16);
  EXPECT_EQ(parse_weight_format("int8").value(), WeightFormat::kI8);
  EXPECT_THAT(parse_weight_format("int4").status().message(),
              HasSubstr("\"int4\", expected auto, float32, bfloat16 or int8"));
}

}  // namespace
}  // namespace infllm::model
