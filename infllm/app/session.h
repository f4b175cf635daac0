// SPDX-License-Identifier: Apache-2.0
//
// What every command needs first: an open backend, a loaded model, its tokenizer and template.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "infllm/app/options.h"
#include "infllm/engine/engine.h"
#include "infllm/engine/generation_config.h"
#include "infllm/engine/tokenizer.h"
#include "infllm/model/model.h"
#include "infllm/ops/backend.h"

namespace infllm::app {

struct Session {
  Backend backend;
  std::optional<model::Model> model;
  std::optional<engine::Tokenizer> tokenizer;  // absent for generated weights
  engine::GenerationConfig generation;
  std::string name;   // the folder's last part, or the shape's name
  std::string dtype;  // of the weights: "bfloat16", "int8:32"
  double load_seconds = 0;

  const model::ModelConfig& config() const { return model->config(); }
  bool is_device() const { return infllm::is_device(backend); }
  int threads() const { return backend.pool && !is_device() ? backend.pool->size() : 1; }
  std::vector<std::int32_t> eos() const;  // every token that ends an answer
};

// --dtype: TYPE or int8:GROUP. --kv-dtype: null for auto.
Result<model::LoadOptions> parse_dtype(const std::string& dtype);
std::optional<DType> parse_kv_dtype(const std::string& name);

// config.json (or a named shape) with the command line's sparse options applied.
Result<model::ModelConfig> open_config(const ModelOptions& options, const std::string& synthetic);

// Opens the device and loads the checkpoint, or generates weights of the shape `synthetic`, with a
// progress bar.
Result<std::unique_ptr<Session>> open_session(const ModelOptions& options,
                                              const std::string& synthetic = "");

// Tokens of prompt and answer together: the option, or what the model was made for.
std::int32_t context_tokens(const Session& session, const ModelOptions& options);

// The engine for this session: `wanted` with what the command line says filled in. A context of 0
// is context_tokens(), a larger one than that is cut down to it.
Result<std::unique_ptr<engine::Engine>> open_engine(const Session& session,
                                                    const ModelOptions& options,
                                                    engine::EngineOptions wanted = {});

// "sparse from 8192 tokens on: 96 blocks of 64 (1 first, 33 last, 62 chosen)" or why not.
std::string attention_text(const model::ModelConfig& config);
// "cpu:avx2 (8 threads)", "cuda:0:sm90 (NVIDIA H200, 138.2 GiB of 139.8 GiB free)".
std::string device_text(const Backend& backend);
// The values in effect, on stderr, with --verbose; the cache will hold `context` tokens.
void print_effective_values(const Session& session, const ModelOptions& options,
                            std::int32_t context);

// Prompt tokens of a step: the option, or the device's default.
std::int32_t chunk_tokens(const Backend& backend, const ModelOptions& options);

// Bytes that the device, or the machine, can still give; 0 when it does not say.
std::int64_t available_memory(const Backend& backend);
std::int64_t peak_memory();

}  // namespace infllm::app
