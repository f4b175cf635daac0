// SPDX-License-Identifier: Apache-2.0
#include "infllm/model/checkpoint.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <system_error>

#include "infllm/core/json.h"
#include "infllm/core/mapped_file.h"
#include "infllm/model/printable.h"
#include "infllm/model/safetensors.h"

namespace infllm::model {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr const char* kConfigFile = "config.json";
constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";
constexpr std::size_t kMaxIndexBytes = std::size_t{64} << 20;
constexpr std::size_t kMaxTensors = 200'000;
constexpr std::size_t kMaxShards = 4096;

bool is_float(DType dtype) {
  return dtype == DType::kF64 || dtype == DType::kF32 || dtype == DType::kF16 ||
         dtype == DType::kBF16;
}

class Checkpoint : public WeightSource {
 public:
  explicit Checkpoint(std::string description) : description_(std::move(description)) {}

  Result<DType> check(const std::string& name, std::span<const std::int64_t> shape) const override {
    const Stored* stored = INFLLM_TRY(lookup(name, shape));
    return stored->view.dtype;
  }

  Result<WeightTensor> tensor(const std::string& name,
                              std::span<const std::int64_t> shape) const override {
    const Stored* stored = INFLLM_TRY(lookup(name, shape));
    return WeightTensor{stored->view, stored->owner};
  }

  std::vector<std::string> names() const override {
    std::vector<std::string> names;
    for (const auto& [name, stored] : tensors_) names.push_back(name);
    return names;
  }

  std::string description() const override { return description_; }

  // Adds a file's tensors. A name may come only once: two shards with the same tensor are refused.
  Status add(const fs::path& path) {
    const MappedFile file = INFLLM_TRY(MappedFile::open(path));
    std::vector<SafetensorsEntry> entries =
        INFLLM_TRY(parse_safetensors(file.bytes(), path.string()));
    for (SafetensorsEntry& entry : entries) {
      const auto [it, is_new] = tensors_.try_emplace(
          entry.name, Stored{entry.view, file.owner(), path.filename().string()});
      if (!is_new) {
        return data_error(fmt::format("{}: tensor {} is in {} and in {}, expected it once",
                                      description_, printable(entry.name), it->second.file,
                                      path.filename().string()));
      }
    }
    return {};
  }

  // Index and shards must agree, tensor by tensor.
  Status check_against(const ShardMap& index) const {
    for (const auto& [name, shard] : index) {
      const auto it = tensors_.find(name);
      if (it == tensors_.end() || it->second.file != shard) {
        return data_error(fmt::format("{}: the index puts tensor {} into {}, where it is not",
                                      description_, printable(name), shard));
      }
    }
    for (const auto& [name, stored] : tensors_) {
      const auto it = std::lower_bound(
          index.begin(), index.end(), name,
          [](const auto& entry, const std::string& wanted) { return entry.first < wanted; });
      if (it == index.end() || it->first != name) {
        return data_error(fmt::format("{}: tensor {} of {} is not in the index", description_,
                                      printable(name), stored.file));
      }
    }
    return {};
  }

 private:
  struct Stored {
    TensorView view;
    std::shared_ptr<const void> owner;
    std::string file;
  };

  Result<const Stored*> lookup(const std::string& name, std::span<const std::int64_t> shape) const {
    const auto it = tensors_.find(name);
    if (it == tensors_.end()) {
      return not_found(fmt::format("{}: no tensor {}, expected one of shape [{}]", description_,
                                   printable(name), fmt::join(shape, ", ")));
    }
    const TensorView& view = it->second.view;
    if (!std::equal(shape.begin(), shape.end(), view.shape.begin(),
                    view.shape.begin() + view.rank)) {
      return data_error(
          fmt::format("{}: tensor {} has the shape {}, expected [{}] from config.json",
                      description_, printable(name), shape_string(view), fmt::join(shape, ", ")));
    }
    if (!is_float(view.dtype)) {
      return data_error(fmt::format("{}: tensor {} holds {}, expected f64, f32, bf16 or f16",
                                    description_, printable(name), name_of(view.dtype)));
    }
    return &it->second;
  }

  std::string description_;
  std::map<std::string, Stored> tensors_;
};

// "owner/name" of letters, digits and ._- : how models are called on the Hugging Face hub.
bool looks_like_hub_id(const std::string& text) {
  const auto slash = text.find('/');
  if (slash == std::string::npos || slash == 0 || slash + 1 == text.size() || text[0] == '.') {
    return false;
  }
  return std::all_of(text.begin(), text.end(), [&, seen = 0](char c) mutable {
    if (c == '/') return ++seen == 1;
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '.' || c == '_' || c == '-';
  });
}

// A shard is named by a file from outside: the name must stay in the folder, and so must whatever a
// link of that name points to.
Status check_shard_place(const fs::path& folder, const std::string& shard) {
  std::error_code error;
  const fs::path root = fs::canonical(folder, error);
  const fs::path target = fs::canonical(folder / shard, error);
  if (error) {
    return not_found(
        fmt::format("{}: the index names the shard {}, which is not there; is the "
                    "download complete?",
                    folder.string(), shard));
  }
  const fs::path place = target.parent_path();
  const bool in_hub_cache = root.parent_path().filename() == "snapshots" &&
                            place == root.parent_path().parent_path() / "blobs";
  if (place == root || in_hub_cache) return {};
  return data_error(fmt::format("{}: the shard {} is a link that leaves the folder, to {}",
                                folder.string(), shard, target.string()));
}

// What a clone without Git LFS has in place of its large files.
bool is_lfs_pointer(const fs::path& path) {
  constexpr std::string_view kBeginning = "version https://git-lfs.github.com/spec/";
  std::array<char, kBeginning.size()> text{};
  std::ifstream file(path, std::ios::binary);
  return file.read(text.data(), text.size()) && std::ranges::equal(text, kBeginning);
}

// Why there is nothing to load: other formats, or nothing at all.
Status nothing_to_load(const fs::path& folder, const std::string& missing) {
  std::error_code error;
  std::string other;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    const std::string extension = entry.path().extension().string();
    if (extension == ".bin" || extension == ".gguf" || extension == ".pt" || extension == ".pth") {
      other = entry.path().filename().string();
    }
  }
  if (other.empty()) {
    return not_found(
        fmt::format("{}: {}; expected a Hugging Face checkpoint folder", folder.string(), missing));
  }
  return unsupported(fmt::format(
      "{}: the weights are in {}, expected {}; load the model with transformers and call "
      "save_pretrained(folder, safe_serialization=True)",
      folder.string(), other, kSingleFile));
}

}  // namespace

Result<ShardMap> parse_shard_index(std::string_view json, std::string_view what) {
  const Json document =
      INFLLM_TRY(parse_json(json, {.what = std::string(what),
                                   .max_bytes = kMaxIndexBytes,
                                   .max_depth = 4,
                                   .max_values = 2 * static_cast<std::int64_t>(kMaxTensors)}));
  if (!document.is_object() || !document.contains("weight_map") ||
      !document["weight_map"].is_object() || document["weight_map"].empty()) {
    return data_error(fmt::format("{}: no weight_map, expected an object of file names", what));
  }
  ShardMap map;
  for (const auto& [name, shard] : document["weight_map"].items()) {
    const std::string file = shard.is_string() ? shard.get<std::string>() : "";
    const bool plain = file.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
    if (!plain || file.size() > 255 || !file.ends_with(".safetensors") || file.starts_with('.')) {
      return data_error(fmt::format(
          "{}: tensor {} is in {}, expected the plain name of a .safetensors file beside the index",
          what, printable(name), printable(shard)));
    }
    if (map.size() == kMaxTensors) {
      return data_error(fmt::format("{}: more than {} tensors", what, kMaxTensors));
    }
    map.emplace_back(name, file);
  }
  return map;  // nlohmann keeps keys sorted
}

Status check_checkpoint_folder(const fs::path& folder) {
  std::error_code error;
  if (fs::is_directory(folder, error)) {
    for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
      if (!entry.is_regular_file(error) || !is_lfs_pointer(entry.path())) continue;
      return data_error(fmt::format(
          "{}: a pointer of Git LFS in place of the file; get the files with `git lfs pull` there",
          entry.path().string()));
    }
    return {};
  }
  const std::string text = folder.string();
  if (fs::exists(folder, error)) {
    return invalid_argument(
        fmt::format("{}: a file, expected the checkpoint's folder with config.json in it", text));
  }
  if (looks_like_hub_id(text)) {
    const std::string name = text.substr(text.find('/') + 1);
    return not_found(
        fmt::format("{}: no such folder. If it is a model of the Hugging Face hub, fetch it with\n"
                    "  hf download {} --local-dir {}\nand give the folder {}",
                    text, text, name, name));
  }
  return not_found(fmt::format("{}: no such folder, expected a checkpoint", text));
}

Status check_config_file(const fs::path& folder) {
  INFLLM_TRY(check_checkpoint_folder(folder));
  std::error_code error;
  if (fs::exists(folder / kConfigFile, error)) return {};
  return nothing_to_load(folder, fmt::format("no {} is there", kConfigFile));
}

Result<std::unique_ptr<WeightSource>> open_checkpoint(const fs::path& folder) {
  INFLLM_TRY(check_checkpoint_folder(folder));
  std::error_code error;
  auto checkpoint = std::make_unique<Checkpoint>(folder.string());
  if (fs::exists(folder / kSingleFile, error)) {
    INFLLM_TRY(checkpoint->add(folder / kSingleFile));
    return std::unique_ptr<WeightSource>(std::move(checkpoint));
  }
  if (!fs::exists(folder / kIndexFile, error)) {
    return nothing_to_load(folder,
                           fmt::format("neither {} nor {} is there", kSingleFile, kIndexFile));
  }
  const fs::path index_path = folder / kIndexFile;
  const MappedFile index_file = INFLLM_TRY(MappedFile::open(index_path));
  const ShardMap index = INFLLM_TRY(parse_shard_index(index_file.text(), index_path.string()));
  std::vector<std::string> shards;
  for (const auto& [name, shard] : index) shards.push_back(shard);
  std::sort(shards.begin(), shards.end());
  shards.erase(std::unique(shards.begin(), shards.end()), shards.end());
  if (shards.size() > kMaxShards) {
    return data_error(fmt::format("{}: {} shards, expected at most {}", index_path.string(),
                                  shards.size(), kMaxShards));
  }
  for (const std::string& shard : shards) {
    INFLLM_TRY(check_shard_place(folder, shard));
    INFLLM_TRY(checkpoint->add(folder / shard));
  }
  INFLLM_TRY(checkpoint->check_against(index));
  return std::unique_ptr<WeightSource>(std::move(checkpoint));
}

}  // namespace infllm::model
