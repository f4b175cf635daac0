// SPDX-License-Identifier: Apache-2.0
#include "infllm/model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

namespace infllm::model {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Json = nlohmann::json;

// MiniCPM4.1-8B, as published.
Json published() {
  Json json = {{"architectures", {"MiniCPMForCausalLM"}},
               {"model_type", "minicpm"},
               {"hidden_size", 4096},
               {"num_hidden_layers", 32},
               {"num_attention_heads", 32},
               {"num_key_value_heads", 2},
               {"intermediate_size", 16384},
               {"vocab_size", 73448},
               {"hidden_act", "silu"},
               {"rms_norm_eps", 1e-6},
               {"max_position_embeddings", 65536},
               {"scale_emb", 12},
               {"scale_depth", 1.4},
               {"dim_model_base", 256},
               {"tie_word_embeddings", false},
               {"attention_bias", false},
               {"bos_token_id", 1},
               {"eos_token_id", {2, 73440}},
               {"torch_dtype", "bfloat16"},
               {"use_cache", true},
               {"auto_map", {{"AutoModel", "modeling_minicpm.MiniCPMModel"}}}};
  json["sparse_config"] = {{"kernel_size", 32}, {"kernel_stride", 16}, {"init_blocks", 1},
                           {"block_size", 64},  {"window_size", 2048}, {"topk", 64},
                           {"use_nope", false}, {"dense_len", 8192}};
  json["rope_scaling"] = {{"rope_type", "longrope"},
                          {"long_factor", Json::array()},
                          {"short_factor", Json::array()},
                          {"original_max_position_embeddings", 65536}};
  for (int i = 0; i < 64; ++i) {
    json["rope_scaling"]["long_factor"].push_back(1 + i);
    json["rope_scaling"]["short_factor"].push_back(1 + 0.5 * i);
  }
  return json;
}

// The published config with some fields changed; a discarded value removes the field.
Json changed(const Json& changes) {
  Json json = published();
  for (const auto& [name, value] : changes.items()) json[name] = value;
  return json;
}

Json without(const std::string& name) {
  Json json = published();
  json.erase(name);
  return json;
}

Result<ModelConfig> parse(const Json& json) { return parse_config(json.dump()); }

std::string refusal(const Json& json) {
  const Result<ModelConfig> config = parse(json);
  return config.ok() ? "accepted" : config.status().message();
}

TEST(Config, ReadsThePublishedFields) {
  const Result<ModelConfig> result = parse(published());
  ASSERT_TRUE(result.ok()) << result.status().message();
  const ModelConfig& c = *result;
  EXPECT_EQ(c.architecture, Architecture::kMiniCpm4);
  EXPECT_EQ(c.hidden_size, 4096);
  EXPECT_EQ(c.layers, 32);
  EXPECT_EQ(c.heads, 32);
  EXPECT_EQ(c.kv_heads, 2);
  EXPECT_EQ(c.head_dim, 128);
  EXPECT_EQ(c.group(), 16);
  EXPECT_EQ(c.intermediate_size, 16384);
  EXPECT_EQ(c.vocab_size, 73448);
  EXPECT_EQ(c.max_positions, 65536);
  EXPECT_FLOAT_EQ(c.rms_norm_eps, 1e-6f);
  EXPECT_FLOAT_EQ(c.residual_scale(), static_cast<float>(1.4 / std::sqrt(32.0)));
  EXPECT_FLOAT_EQ(c.logit_scale(), 1.0f / 16);
  EXPECT_FLOAT_EQ(c.attention_scale(), static_cast<float>(1 / std::sqrt(128.0)));
  EXPECT_EQ(c.scale_emb, 12);
  EXPECT_FALSE(c.tied_embeddings);
  EXPECT_EQ(c.bos_token, 1);
  EXPECT_THAT(c.eos_tokens, ElementsAre(2, 73440));
  EXPECT_EQ(c.dtype, DType::kBF16);
  EXPECT_EQ(c.rope.type, RopeType::kLongRope);
  EXPECT_EQ(c.rope.original_max_positions, 65536);
  EXPECT_EQ(c.rope.long_factor.back(), 64.0f);
  EXPECT_EQ(c.rope.short_factor.back(), 32.5f);
  ASSERT_TRUE(c.sparse.has_value());
  EXPECT_EQ(c.sparse->topk, 64);
  EXPECT_EQ(c.sparse->budget_blocks(), 96);
  EXPECT_EQ(c.sparse->dense_len, 8192);
}

TEST(Config, AbsentAndNullFollowTheConfigClass) {
  Json json = published();
  for (const char* name :
       {"scale_emb", "scale_depth", "dim_model_base", "tie_word_embeddings", "num_key_value_heads",
        "rope_scaling", "sparse_config", "bos_token_id", "eos_token_id", "torch_dtype"}) {
    json.erase(name);
  }
  ModelConfig c = parse(json).value();
  EXPECT_EQ(c.scale_emb, 12);
  EXPECT_EQ(c.scale_depth, 1.4);
  EXPECT_EQ(c.dim_model_base, 256);
  EXPECT_TRUE(c.tied_embeddings);
  EXPECT_EQ(c.kv_heads, 32);
  EXPECT_EQ(c.rope.type, RopeType::kDefault);
  EXPECT_EQ(c.rope.theta, 10000);
  EXPECT_FALSE(c.sparse.has_value());
  EXPECT_FALSE(c.kv_layout(DType::kBF16).pooled_keys);
  EXPECT_EQ(c.bos_token, -1);
  EXPECT_TRUE(c.eos_tokens.empty());

  for (const char* name : {"scale_depth", "dim_model_base", "num_key_value_heads", "sparse_config",
                           "rope_scaling", "head_dim"}) {
    json[name] = nullptr;
  }
  c = parse(json).value();
  EXPECT_FLOAT_EQ(c.residual_scale(), 1);
  EXPECT_FLOAT_EQ(c.logit_scale(), 1);
  EXPECT_EQ(c.kv_heads, 32);
  EXPECT_FALSE(c.sparse.has_value());
}

TEST(Config, LlamaHasNoScalings) {
  Json json = without("sparse_config");
  json["model_type"] = "llama";
  json.erase("tie_word_embeddings");
  const ModelConfig c = parse(json).value();
  EXPECT_EQ(c.architecture, Architecture::kLlama);
  EXPECT_EQ(c.scale_emb, 1);
  EXPECT_EQ(c.residual_scale(), 1);
  EXPECT_EQ(c.logit_scale(), 1);
  EXPECT_FALSE(c.tied_embeddings);
}

TEST(Config, ArchitecturesStandInForModelType) {
  for (const auto& [name, expected] : {std::pair{"MiniCPMForCausalLM", Architecture::kMiniCpm4},
                                       std::pair{"MiniCPM4ForCausalLM", Architecture::kMiniCpm4},
                                       std::pair{"LlamaForCausalLM", Architecture::kLlama}}) {
    Json json = without("model_type");
    json["architectures"] = {name};
    EXPECT_EQ(parse(json).value().architecture, expected) << name;
  }
  Json json = without("model_type");
  json["architectures"] = Json::array();
  EXPECT_THAT(refusal(json), HasSubstr("model_type is missing, expected \"minicpm\""));
  EXPECT_THAT(
      refusal(changed({{"model_type", "qwen3"}})),
      HasSubstr("model_type is \"qwen3\", expected \"minicpm\", \"minicpm4\" or \"llama\""));
}

TEST(Config, OneTokenIdOrSeveral) {
  EXPECT_THAT(parse(changed({{"eos_token_id", 2}})).value().eos_tokens, ElementsAre(2));
  EXPECT_THAT(refusal(changed({{"eos_token_id", {2, 73448}}})),
              HasSubstr("eos_token_id is a list of 2, expected a token id below 73448"));
  EXPECT_THAT(refusal(changed({{"eos_token_id", -1}})), HasSubstr("eos_token_id is -1"));
}

struct BadField {
  const char* name;
  Json value;
  const char* message;
};

TEST(Config, EveryFieldHasARange) {
  const BadField fields[] = {
      {"hidden_size", 0, "hidden_size is 0, expected an integer from 1 to 131072"},
      {"hidden_size", "4096", "hidden_size is \"4096\", expected an integer"},
      {"hidden_size", 4096.5, "hidden_size is 4096.5, expected an integer"},
      {"hidden_size", nullptr, "hidden_size is missing, expected an integer"},
      {"hidden_size", 4097, "hidden_size is 4097, expected a multiple of num_attention_heads = 32"},
      {"num_hidden_layers", 0, "num_hidden_layers is 0, expected an integer from 1 to 1024"},
      {"num_hidden_layers", 1025, "num_hidden_layers is 1025"},
      {"num_hidden_layers", 18446744073709551615u, "num_hidden_layers is 18446744073709551615"},
      {"num_attention_heads", -32, "num_attention_heads is -32"},
      {"num_key_value_heads", 0, "num_key_value_heads is 0"},
      {"num_key_value_heads", 3,
       "num_key_value_heads is 3, expected a divisor of num_attention_heads = 32"},
      {"num_key_value_heads", 64, "num_key_value_heads is 64, expected an integer from 1 to 32"},
      {"head_dim", 127, "the head dimension is 127, expected an even number"},
      {"head_dim", 4096, "head_dim is 4096, expected an integer from 2 to 1024"},
      {"intermediate_size", 0, "intermediate_size is 0"},
      {"vocab_size", 1 << 21, "vocab_size is 2097152, expected an integer from 1 to 1048576"},
      {"max_position_embeddings", 1, "max_position_embeddings is 1"},
      {"rms_norm_eps", -1e-6, "rms_norm_eps is -1e-06, expected a number from 0 to 1"},
      {"rms_norm_eps", true, "rms_norm_eps is true"},
      {"rope_theta", 0, "rope_theta is 0"},
      {"scale_emb", 0, "scale_emb is 0"},
      {"scale_depth", -1.4, "scale_depth is -1.4"},
      {"dim_model_base", "256", "dim_model_base is \"256\""},
      {"tie_word_embeddings", 1, "tie_word_embeddings is 1, expected true or false"},
      {"hidden_act", "gelu", "hidden_act is \"gelu\", expected \"silu\""},
      {"hidden_act", 3, "hidden_act is 3, expected a string"},
      {"attention_bias", true, "attention_bias is true, expected false"},
      {"mlp_bias", true, "mlp_bias is true, expected false"},
      {"num_experts", 8, "num_experts is 8, expected an integer from 0 to 0"},
      {"partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5"},
      {"torch_dtype", "int4", "torch_dtype is \"int4\", expected \"bfloat16\""},
      {"quantization_config", {{"quant_method", "gptq"}}, "the method \"gptq\""},
      {"sparse_config", 7, "sparse_config is 7, expected an object"},
      {"rope_scaling", "longrope", "rope_scaling is \"longrope\", expected an object"},
      {"model_type", 7, "model_type is 7, expected a string"},
  };
  for (const BadField& field : fields) {
    const Json json = changed({{field.name, field.value}});
    EXPECT_THAT(refusal(json), AllOf(HasSubstr("config.json"), HasSubstr(field.message)))
        << field.name;
  }
}

TEST(Config, SparseConfigIsChecked) {
  const BadField fields[] = {
      {"topk", 0, "topk = 0, expected 1"},
      {"topk", -2, "sparse_config: topk is -2"},
      {"kernel_size", 33, "kernel_size = 33, expected a multiple of kernel_stride = 16"},
      {"kernel_stride", 0, "kernel_stride = 0"},
      {"block_size", 65, "block_size = 65, expected a multiple of"},
      {"window_size", 2049, "window_size = 2049, expected a multiple of block_size = 64"},
      {"init_blocks", -1, "init_blocks = -1"},
      {"dense_len", -2, "sparse_config: dense_len is -2"},
      {"use_nope", 1, "use_nope is 1, expected true or false"},
  };
  for (const BadField& field : fields) {
    Json json = published();
    json["sparse_config"][field.name] = field.value;
    EXPECT_THAT(refusal(json), HasSubstr(field.message)) << field.name;
  }
  Json json = published();
  json["sparse_config"] = Json::object();
  EXPECT_EQ(parse(json).value().sparse->topk, 64) << "absent fields have the released values";
}

TEST(Config, RopeSpellings) {
  Json json = published();
  json["rope_parameters"] = json["rope_scaling"];
  json.erase("rope_scaling");
  json["rope_parameters"].erase("rope_type");
  json["rope_parameters"]["type"] = "su";
  json["rope_parameters"]["rope_theta"] = 500000;
  ModelConfig c = parse(json).value();
  EXPECT_EQ(c.rope.type, RopeType::kLongRope);
  EXPECT_EQ(c.rope.theta, 500000);

  json["rope_parameters"] = {{"rope_type", "llama3"},
                             {"factor", 8.0},
                             {"low_freq_factor", 1.0},
                             {"high_freq_factor", 4.0},
                             {"original_max_position_embeddings", 8192}};
  c = parse(json).value();
  EXPECT_EQ(c.rope.type, RopeType::kLlama3);
  EXPECT_EQ(c.rope.factor, 8);

  json["rope_parameters"] = {{"rope_type", "dynamic"}, {"factor", 2.0}};
  EXPECT_THAT(refusal(json), HasSubstr("rope_parameters: rope_type is \"dynamic\", expected"));
  json["rope_parameters"] = {{"rope_type", "linear"}};
  EXPECT_THAT(refusal(json), HasSubstr("rope_parameters: factor is missing"));
  json["rope_parameters"] = {{"rope_type", "llama3"},
                             {"factor", 8.0},
                             {"low_freq_factor", 4.0},
                             {"high_freq_factor", 4.0}};
  EXPECT_THAT(refusal(json), HasSubstr("high_freq_factor is 4.0"));
}

TEST(Config, LongRopeFactorsMatchTheHeadDimension) {
  Json json = published();
  json["rope_scaling"]["long_factor"].erase(0);
  EXPECT_THAT(refusal(json),
              HasSubstr("long_factor is a list of 63, expected a list of 64 positive numbers"));
  json = published();
  json["rope_scaling"]["short_factor"][7] = 0;
  EXPECT_THAT(refusal(json), HasSubstr("short_factor[7] is 0"));
  json["rope_scaling"]["short_factor"][7] = "one";
  EXPECT_THAT(refusal(json), HasSubstr("short_factor[7] is \"one\""));
  json["rope_scaling"].erase("short_factor");
  EXPECT_THAT(refusal(json), HasSubstr("short_factor is missing"));
}

TEST(Config, HostileTextIsRefused) {
  const auto message = [](std::string_view text) {
    const Result<ModelConfig> config = parse_config(text);
    return config.ok() ? "accepted" : config.status().message();
  };
  EXPECT_THAT(message(""), HasSubstr("config.json: not valid JSON at byte"));
  EXPECT_THAT(message("[]"), HasSubstr("not a JSON object"));
  EXPECT_THAT(message(std::string(100'000, '[')), HasSubstr("nested deeper than 16"));
  EXPECT_THAT(message("{\"hidden_size\": 1, \"hidden_size\": 2}"), HasSubstr("appears twice"));
  EXPECT_THAT(message(std::string((1 << 20) + 1, ' ')), HasSubstr("bytes of JSON"));
  EXPECT_THAT(message("{\"vocab_size\": 1e999}"), HasSubstr("not valid JSON"));
}

TEST(Overrides, ChangeTheSparseConfig) {
  ModelConfig c = parse(published()).value();
  ASSERT_TRUE(apply_overrides(c, {.topk = 8, .dense_len = -1, .legacy_window = true}).ok());
  EXPECT_EQ(c.sparse->topk, 8);
  EXPECT_EQ(c.sparse->dense_len, -1);
  EXPECT_TRUE(c.sparse->legacy_window);
  EXPECT_EQ(c.sparse->block_size, 64);

  ASSERT_TRUE(apply_overrides(c, {.sparse = false}).ok());
  EXPECT_FALSE(c.sparse.has_value());
  ASSERT_TRUE(apply_overrides(c, {.sparse = true}).ok());
  EXPECT_EQ(c.sparse->topk, 64) << "the released numbers";
  ASSERT_TRUE(apply_overrides(c, {.sparse = false}).ok());
  ASSERT_TRUE(apply_overrides(c, {.window_size = 512}).ok());
  EXPECT_EQ(c.sparse->window_size, 512) << "setting a field switches sparse attention on";
}

TEST(Overrides, AreCheckedAndLeaveTheConfigAloneOnFailure) {
  ModelConfig c = parse(published()).value();
  const auto message = [&](const Overrides& overrides) {
    return apply_overrides(c, overrides).message();
  };
  EXPECT_THAT(message({.topk = 0}), HasSubstr("topk = 0"));
  EXPECT_THAT(message({.sparse = false, .topk = 8}), HasSubstr("switched off and configured"));
  EXPECT_EQ(c.sparse->topk, 64);
}

TEST(NamedConfigs, HaveTheParameterCountsOfThePublishedModels) {
  // Of the files' sizes, two bytes a parameter.
  const std::pair<const char*, double> expected[] = {{"minicpm4-0.5b", 0.4338e9},
                                                     {"minicpm4-8b", 8.19e9},
                                                     {"minicpm4.1-8b", 8.19e9},
                                                     {"bitcpm4-1b", 1.36e9}};
  for (const auto& [name, parameters] : expected) {
    const ModelConfig c = named_config(name).value();
    EXPECT_NEAR(static_cast<double>(c.parameters()) / parameters, 1, 0.002) << name;
    EXPECT_EQ(c.hidden_size, c.heads * c.head_dim) << name;
    EXPECT_EQ(c.vocab_size, 73448) << name;
  }
  EXPECT_EQ(named_configs().size(), std::size(expected));
  EXPECT_THAT(named_config("minicpm9").status().message(),
              AllOf(HasSubstr("\"minicpm9\""), HasSubstr("minicpm4.1-8b")));
}

TEST(ReadConfig, MessagesNameTheFolder) {
  const std::filesystem::path folder = ::testing::TempDir() + "infllm_config_test";
  std::filesystem::create_directories(folder);
  std::filesystem::remove(folder / "config.json");
  EXPECT_EQ(read_config(folder).status().code(), StatusCode::kNotFound);
  EXPECT_THAT(read_config(folder).status().message(), HasSubstr("no config.json is there"));
  std::ofstream(folder / "model.gguf") << "GGUF";
  EXPECT_THAT(read_config(folder).status().message(), HasSubstr("the weights are in model.gguf"));
  std::ofstream(folder / "config.json") << "{}";
  EXPECT_THAT(read_config(folder).status().message(), HasSubstr(folder.string()));
  EXPECT_THAT(read_config("openbmb/MiniCPM4-8B").status().message(),
              HasSubstr("hf download openbmb/MiniCPM4-8B --local-dir MiniCPM4-8B"));
  EXPECT_THAT(read_config(folder / "config.json").status().message(), HasSubstr("a file"));
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace infllm::model
