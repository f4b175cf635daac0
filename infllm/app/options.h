// SPDX-License-Identifier: Apache-2.0
//
// The command line as plain structs: what cli.cc fills and the commands read. An empty optional
// means that the flag was not given, so the checkpoint's own value or the default stands.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace infllm::app {

// Sparse attention, in Hugging Face's and CPM.cu's names.
struct SparseOptions {
  std::string mode = "auto";  // auto: as the checkpoint says; on: also without it; off: dense
  std::optional<std::int32_t> dense_len;
  std::optional<std::int32_t> topk;
  std::optional<std::int32_t> window_size;    // tokens
  std::optional<std::int32_t> window_blocks;  // the same in blocks
  std::optional<std::int32_t> init_blocks;
  std::optional<std::int32_t> kernel_size;
  std::optional<std::int32_t> kernel_stride;
  std::optional<std::int32_t> block_size;
  std::optional<std::string> lse;  // coarse, fine
  bool compress_lse = false;       // CPM.cu's spelling of coarse
  bool use_nope = false;
  bool legacy_window = false;
};

struct ModelOptions {
  std::string path;
  std::string device = "auto";
  std::int32_t threads = 0;       // 0: one per hardware thread
  std::string dtype = "auto";     // auto, float32, bfloat16, int8, int8:GROUP
  std::string kv_dtype = "auto";  // auto, float32, bfloat16
  std::int32_t context = 0;       // 0: what the model was made for
  std::int32_t chunk_tokens = 0;  // 0: 512 on a host, 8192 on a device
  SparseOptions sparse;
  bool verbose = false;
};

struct SamplingOptions {
  std::optional<float> temperature;
  std::optional<std::int32_t> top_k;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<float> repetition_penalty;
  std::optional<float> presence_penalty;
  std::optional<float> frequency_penalty;
  std::optional<std::uint64_t> seed;
  std::int32_t max_tokens = -1;  // -1: until the model stops or the context is full
  std::vector<std::string> stop;
  bool ignore_eos = false;
};

struct PromptOptions {
  std::string text;      // "-": stdin
  std::string file;      // -f
  std::string document;  // a file; with `question` one user message
  std::string question;
  std::string system;
  bool chat = true;                     // through the checkpoint's chat template
  std::optional<bool> enable_thinking;  // the template's argument; not given: not defined
};

struct BenchOptions {
  std::vector<std::int32_t> prompt_tokens = {512};
  std::vector<std::int32_t> generated_tokens = {128};
  std::vector<std::int32_t> depths = {0};
  std::int32_t repetitions = 5;
  std::string output = "md";               // md, csv, json, jsonl
  std::string attention = "dense,sparse";  // columns
  std::string synthetic;                   // a shape instead of a checkpoint
  std::string jsonl_file;                  // benchmark records are appended here
  std::int32_t repeat = 1;                 // times that each made-up token comes in a row
  bool fill = false;                       // made-up keys and values in front, too
  bool warmup = true;
  bool steps = true;  // of a device: one more run that tells the steps' times
};

struct EvalOptions {
  std::string samples;  // JSON lines
  std::string attention = "dense,sparse";
  std::string jsonl_file;
  std::int32_t limit = 0;      // documents; 0: all
  std::int32_t parallel = 16;  // questions of a document that are asked at a time
};

enum class Command { kNone, kRun, kChat, kBench, kInspect, kTokenize, kEval };

struct Options {
  Command command = Command::kNone;
  ModelOptions model;
  SamplingOptions sampling;
  PromptOptions prompt;
  BenchOptions bench;
  EvalOptions eval;
  std::vector<std::int32_t> lengths;  // inspect: where to state memory
  bool decode = false;                // tokenize: ids to text
  bool count_only = false;            // tokenize
  bool json = false;
  bool perf = true;  // timing lines
};

}  // namespace infllm::app
