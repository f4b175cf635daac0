// SPDX-License-Identifier: Apache-2.0
//
// Rotary position embedding: from config.json's numbers to the step's tables of cos and sin.
//
//   angle(p, i) = p / factor_i * theta^(-2i/D)              i = 0 .. D/2 - 1
//   cos[p, i] = a cos(angle), sin[p, i] = a sin(angle)      a: attention factor, usually 1
//
//   default    factor_i = 1
//   linear     factor_i = factor
//   llama3     factor_i = 1 for short wavelengths, factor for long ones, blended in between
//   yarn       the same idea with a linear ramp between beta_fast and beta_slow turns
//   longrope   factor_i from the checkpoint: long_factor when the sequence is longer than
//              original_max_positions, else short_factor ("su" is its old name)
//
// Angles are float32 products in the order of the published models (p * (1 / factor_i), then times
// the inverse frequency); at position 100,000 another order differs in the third decimal of cos.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "infllm/core/status.h"
#include "infllm/ops/transformer.h"

namespace infllm::model {

enum class RopeType : std::uint8_t { kDefault, kLinear, kLlama3, kYarn, kLongRope };
std::string_view name_of(RopeType type);

struct RopeConfig {
  RopeType type = RopeType::kDefault;
  double theta = 10000;
  double factor = 1;  // linear, llama3, yarn; longrope: 0 means max / original positions
  std::int32_t original_max_positions = 0;       // llama3, yarn, longrope
  std::optional<double> attention_factor;        // null: the type's own rule
  double low_freq_factor = 1;                    // llama3
  double high_freq_factor = 4;                   // llama3
  double beta_fast = 32;                         // yarn
  double beta_slow = 1;                          // yarn
  double mscale = 0;                             // yarn; 0: absent
  double mscale_all_dim = 0;                     // yarn; 0: absent
  bool truncate = true;                          // yarn: whole dimensions as the ramp's ends
  std::vector<float> short_factor, long_factor;  // longrope, D / 2 each
};

// What is left of a RopeConfig for one head dimension. Cheap to copy around, immutable.
class Rope {
 public:
  // max_positions is max_position_embeddings: LongRoPE's attention factor compares it with
  // original_max_positions, sqrt(1 + ln(max / original) / ln(original)) when it is larger.
  Rope(const RopeConfig& config, std::int32_t head_dim, std::int32_t max_positions);

  float attention_factor() const { return attention_factor_; }
  // Sequences longer than this take the long factors; 0: there is only one set.
  std::int32_t switch_length() const { return switch_length_; }

  // What a backend needs in its memory: scales [2, D / 2], short and long, then frequencies
  // [D / 2].
  std::span<const float> numbers() const { return numbers_; }
  // The parameters of a step's tables over a copy of numbers(); the arrays of the step are missing.
  RopeTableParams tables(const float* numbers) const;

  // One row of the tables: cos[D / 2] and sin[D / 2] of the token at `position` of a sequence of
  // `length` tokens (see ForwardParams::lengths).
  void row(std::int32_t position, std::int32_t length, float* cos, float* sin) const;

 private:
  // 1 / factor_i twice, then theta^(-2i/D), stretched by the type's rule.
  std::vector<float> numbers_;
  std::int32_t switch_length_ = 0;
  float attention_factor_ = 1;
};

}  // namespace infllm::model
