// SPDX-License-Identifier: Apache-2.0
#include "infllm/app/session.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/resource.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <filesystem>
#include <fstream>

#include "infllm/app/memory.h"
#include "infllm/app/progress.h"
#include "infllm/app/signals.h"
#include "infllm/backend/open.h"
#include "infllm/model/checkpoint.h"
#include "infllm/ops/kernels.h"

namespace infllm::app {
namespace {

Result<model::Overrides> overrides_from(const SparseOptions& sparse,
                                        const model::ModelConfig& config) {
  model::Overrides overrides;
  if (sparse.mode != "auto") overrides.sparse = sparse.mode == "on";
  overrides.kernel_size = sparse.kernel_size;
  overrides.kernel_stride = sparse.kernel_stride;
  overrides.init_blocks = sparse.init_blocks;
  overrides.block_size = sparse.block_size;
  overrides.window_size = sparse.window_size;
  overrides.topk = sparse.topk;
  overrides.dense_len = sparse.dense_len;
  if (sparse.window_blocks) {
    const std::int32_t block_size = sparse.block_size.value_or(
        config.sparse ? config.sparse->block_size : SparseConfig().block_size);
    overrides.window_size = *sparse.window_blocks * block_size;
  }
  if (sparse.use_nope) overrides.use_nope = true;
  if (sparse.legacy_window) overrides.legacy_window = true;
  if (sparse.compress_lse) overrides.lse_source = LseSource::kCoarse;
  if (sparse.lse) {
    overrides.lse_source = *sparse.lse == "fine" ? LseSource::kFine : LseSource::kCoarse;
  }
  return overrides;
}

std::string dtype_text(const model::Model& model, std::int32_t group_size) {
  switch (model.weights().format) {
    case WeightFormat::kF64:
      return "float64";
    case WeightFormat::kF32:
      return "float32";
    case WeightFormat::kBF16:
      return "bfloat16";
    case WeightFormat::kI8:
      return group_size > 0 ? fmt::format("int8:{}", group_size) : "int8";
  }
  return "?";
}

// Before minutes of loading, at whose end the system might kill the program.
Status check_room(const Backend& backend, const model::ModelConfig& config,
                  const model::LoadOptions& load) {
  const std::int64_t available = available_memory(backend);
  if (available == 0) return {};
  const bool is_wide = size_of(config.dtype) > 2;
  const std::int64_t needed =
      weight_bytes(config, load.format.value_or(model::default_format(backend, is_wide)));
  if (needed <= available) return {};
  return resource_exhausted(fmt::format(
      "the weights need {}, but {} has {} free; {}", bytes_text(static_cast<double>(needed)),
      backend.name, bytes_text(static_cast<double>(available)),
      is_device(backend) ? "choose another --device" : "--dtype int8 takes least"));
}

std::string folder_name(const std::string& path) {
  std::filesystem::path clean = std::filesystem::path(path).lexically_normal();
  if (!clean.has_filename()) clean = clean.parent_path();
  return clean.filename().string();
}

}  // namespace

Result<model::LoadOptions> parse_dtype(const std::string& dtype) {
  model::LoadOptions options;
  std::string name = dtype;
  if (const std::size_t colon = dtype.find(':'); colon != std::string::npos) {
    name = dtype.substr(0, colon);
    const char* begin = dtype.data() + colon + 1;
    const char* end = dtype.data() + dtype.size();
    const auto [last, error] = std::from_chars(begin, end, options.int8_group_size);
    if (error != std::errc() || last != end || options.int8_group_size < 1 || name != "int8") {
      return invalid_argument(
          fmt::format("--dtype {}: a group size goes with int8 only, e.g. int8:32", dtype));
    }
  }
  options.format = INFLLM_TRY(model::parse_weight_format(name));
  return options;
}

std::optional<DType> parse_kv_dtype(const std::string& name) {
  if (name == "auto") return std::nullopt;
  return name.starts_with('f') ? DType::kF32 : DType::kBF16;
}

std::vector<std::int32_t> Session::eos() const {
  std::vector<std::int32_t> ids = config().eos_tokens;
  if (tokenizer) ids.insert(ids.end(), tokenizer->eos_ids().begin(), tokenizer->eos_ids().end());
  std::ranges::sort(ids);
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

Result<model::ModelConfig> open_config(const ModelOptions& options, const std::string& synthetic) {
  model::ModelConfig config = INFLLM_TRY(synthetic.empty() ? model::read_config(options.path)
                                                           : model::named_config(synthetic));
  const model::Overrides overrides = INFLLM_TRY(overrides_from(options.sparse, config));
  INFLLM_TRY(model::apply_overrides(config, overrides));
  return config;
}

Result<std::unique_ptr<Session>> open_session(const ModelOptions& options,
                                              const std::string& synthetic) {
  const auto start = std::chrono::steady_clock::now();
  model::LoadOptions load = INFLLM_TRY(parse_dtype(options.dtype));
  const model::ModelConfig config = INFLLM_TRY(open_config(options, synthetic));
  auto session = std::make_unique<Session>();
  session->backend = INFLLM_TRY(open_backend(options.device, {.threads = options.threads}));
  INFLLM_TRY(check_room(session->backend, config, load));
  session->name = synthetic.empty() ? folder_name(options.path) : synthetic;
  std::unique_ptr<model::WeightSource> source;
  if (synthetic.empty()) {
    source = INFLLM_TRY(model::open_checkpoint(options.path));
    session->tokenizer = INFLLM_TRY(engine::Tokenizer::load(options.path));
    session->generation = INFLLM_TRY(engine::read_generation_config(options.path));
  } else {
    source = model::synthetic_weights();
  }
  std::optional<Progress> bar;
  load.on_progress = [&bar](std::int64_t done, std::int64_t total) {
    if (!bar) bar.emplace("load", Progress::Unit::kBytes, total);
    bar->update(done);
  };
  load.cancelled = [] { return interrupted().load(); };
  session->model = INFLLM_TRY(model::Model::load(session->backend, config, *source, load));
  bar.reset();
  session->dtype = dtype_text(*session->model, load.int8_group_size);
  session->load_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return session;
}

std::int32_t context_tokens(const Session& session, const ModelOptions& options) {
  return options.context > 0 ? options.context : session.config().max_positions;
}

Result<std::unique_ptr<engine::Engine>> open_engine(const Session& session,
                                                    const ModelOptions& options,
                                                    engine::EngineOptions wanted) {
  const std::int32_t limit = context_tokens(session, options);
  wanted.context = wanted.context > 0 ? std::min(wanted.context, limit) : limit;
  wanted.chunk_tokens = chunk_tokens(session.backend, options);
  wanted.kv_dtype = parse_kv_dtype(options.kv_dtype);
  wanted.memory_limit = available_memory(session.backend);
  return engine::Engine::create(*session.model, *session.tokenizer, wanted);
}

std::string attention_text(const model::ModelConfig& config) {
  if (!config.sparse) return "dense (no sparse_config; --sparse on adds the released numbers)";
  const SparseConfig& sparse = *config.sparse;
  const std::int32_t forced = sparse.init_blocks + sparse.local_blocks();
  return fmt::format("sparse {}: {} blocks of {} tokens ({} first, {} last, {} chosen)",
                     sparse.dense_len <= 0 ? "at every length"
                                           : fmt::format("from {} tokens on", sparse.dense_len),
                     sparse.budget_blocks(), sparse.block_size, sparse.init_blocks,
                     sparse.local_blocks(), std::max(0, sparse.budget_blocks() - forced));
}

void print_effective_values(const Session& session, const ModelOptions& options,
                            std::int32_t context) {
  if (!options.verbose) return;
  const model::ModelConfig& config = session.config();
  fmt::print(stderr, "model       {} ({}, {} layers, {:.1f} M parameters, {} weights)\n",
             session.name, model::name_of(config.architecture), config.layers,
             static_cast<double>(config.parameters()) / 1e6, session.dtype);
  fmt::print(stderr, "device      {}\n", device_text(session.backend));
  fmt::print(stderr, "context     {} tokens, chunks of {}, cache in {}\n", context,
             chunk_tokens(session.backend, options),
             name_of(parse_kv_dtype(options.kv_dtype).value_or(session.model->kv_dtype())));
  fmt::print(stderr, "attention   {}\n", attention_text(config));
  if (!config.sparse) return;
  const SparseConfig& s = *config.sparse;
  fmt::print(stderr,
             "sparse      dense_len {} topk {} window_size {} init_blocks {} block_size {} "
             "kernel_size {} kernel_stride {} lse {} use_nope {} legacy_window {}\n",
             s.dense_len, s.topk, s.window_size, s.init_blocks, s.block_size, s.kernel_size,
             s.kernel_stride, s.lse_source == LseSource::kFine ? "fine" : "coarse", s.use_nope,
             s.legacy_window);
}

std::string device_text(const Backend& backend) {
  const Result<DeviceInfo> info = device_info(backend);
  if (!info.ok() || info->total_bytes == 0) {
    return fmt::format("{} ({} threads)", backend.name, backend.pool ? backend.pool->size() : 1);
  }
  return fmt::format("{} ({}, {} of {} free)", backend.name, info->name,
                     bytes_text(static_cast<double>(info->free_bytes)),
                     bytes_text(static_cast<double>(info->total_bytes)));
}

std::int32_t chunk_tokens(const Backend& backend, const ModelOptions& options) {
  return options.chunk_tokens > 0 ? options.chunk_tokens : engine::default_chunk_tokens(backend);
}

std::int64_t available_memory(const Backend& backend) {
  const Result<DeviceInfo> info = device_info(backend);
  if (info.ok() && info->total_bytes > 0) return info->free_bytes;
  std::ifstream meminfo("/proc/meminfo");
  std::string key, unit;
  std::int64_t kilobytes = 0;
  while (meminfo >> key >> kilobytes && std::getline(meminfo, unit)) {
    if (key == "MemAvailable:") return kilobytes * 1024;
  }
  return 0;
}

std::int64_t peak_memory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return std::int64_t{usage.ru_maxrss} * 1024;
}

}  // namespace infllm::app
