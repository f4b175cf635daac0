// SPDX-License-Identifier: Apache-2.0
//
// The weights of a checkpoint folder: model.safetensors, or model.safetensors.index.json and the
// shards it names.
//
//   std::unique_ptr<WeightSource> source = INFLLM_TRY(open_checkpoint("MiniCPM4-8B"));
//
// Shard names must be plain file names, and may not be links that leave the folder (a Hugging Face
// cache, whose snapshots link into ../../blobs, is the one exception: links to a "blobs" folder of
// the same repository are followed). Every tensor of the index must be in the shard that the index
// says, and every tensor of a shard in the index.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "infllm/core/status.h"
#include "infllm/model/weight_source.h"

namespace infllm::model {

// Opens and checks all headers; tensor memory stays untouched. A path that does not exist but looks
// like a hub id gets the command that downloads it; a folder with other formats only is told so.
Result<std::unique_ptr<WeightSource>> open_checkpoint(const std::filesystem::path& folder);

// That `folder` is a folder, or the message above, and that its files are there and not Git LFS's
// pointers to them. Whoever reads one of its files calls it first.
Status check_checkpoint_folder(const std::filesystem::path& folder);
// The same, and that config.json is there; a folder with other formats only is told so.
Status check_config_file(const std::filesystem::path& folder);

// The weight_map of an index: (tensor, shard), sorted by tensor.
using ShardMap = std::vector<std::pair<std::string, std::string>>;
Result<ShardMap> parse_shard_index(std::string_view json, std::string_view what);

}  // namespace infllm::model
