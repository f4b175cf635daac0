// SPDX-License-Identifier: Apache-2.0
#include "infllm/model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

namespace infllm::model {
namespace {

// theta^(-2i/D), rounded to float twice like the published code: the power, then its reciprocal.
std::vector<float> inverse_frequencies(double theta, std::int32_t head_dim) {
  std::vector<float> inverse(static_cast<std::size_t>(head_dim / 2));
  for (std::size_t i = 0; i < inverse.size(); ++i) {
    const double exponent = 2.0 * static_cast<double>(i) / head_dim;
    inverse[i] = 1.0f / static_cast<float>(std::pow(theta, exponent));
  }
  return inverse;
}

// Wavelengths above original / low_freq_factor are stretched by `factor`, those below original /
// high_freq_factor are kept, and the frequencies in between are blended.
void stretch_llama3(const RopeConfig& config, std::vector<float>& inverse) {
  const double original = config.original_max_positions;
  for (float& frequency : inverse) {
    const double turns = original * frequency / (2 * std::numbers::pi);  // within the original
    const double keep = std::clamp(
        (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor), 0.0,
        1.0);
    frequency = static_cast<float>((1 - keep) * frequency / config.factor + keep * frequency);
  }
}

// The dimension whose frequency makes `turns` turns within the original context.
double yarn_dimension(const RopeConfig& config, std::int32_t head_dim, double turns) {
  return head_dim * std::log(config.original_max_positions / (turns * 2 * std::numbers::pi)) /
         (2 * std::log(config.theta));
}

// Dimensions that make more than beta_fast turns are kept, those with less than beta_slow are
// stretched, with a linear ramp over the dimensions in between.
void stretch_yarn(const RopeConfig& config, std::int32_t head_dim, std::vector<float>& inverse) {
  double low = yarn_dimension(config, head_dim, config.beta_fast);
  double high = yarn_dimension(config, head_dim, config.beta_slow);
  if (config.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, head_dim - 1.0);
  if (low == high) high += 0.001;
  for (std::size_t i = 0; i < inverse.size(); ++i) {
    const double stretch = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    inverse[i] =
        static_cast<float>(inverse[i] / config.factor * stretch + inverse[i] * (1 - stretch));
  }
}

double yarn_magnitude(double factor, double mscale) {
  return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1;
}

double attention_factor_of(const RopeConfig& config, std::int32_t max_positions) {
  if (config.attention_factor) return *config.attention_factor;
  if (config.type == RopeType::kYarn) {
    if (config.mscale > 0 && config.mscale_all_dim > 0) {
      return yarn_magnitude(config.factor, config.mscale) /
             yarn_magnitude(config.factor, config.mscale_all_dim);
    }
    return yarn_magnitude(config.factor, 1);
  }
  if (config.type == RopeType::kLongRope) {
    const double original = config.original_max_positions;
    const double factor = config.factor > 0 ? config.factor : max_positions / original;
    return factor <= 1 ? 1.0 : std::sqrt(1 + std::log(factor) / std::log(original));
  }
  return 1;
}

std::vector<float> reciprocals(const std::vector<float>& factors) {
  std::vector<float> scale(factors.size());
  std::transform(factors.begin(), factors.end(), scale.begin(), [](float f) { return 1.0f / f; });
  return scale;
}

}  // namespace

std::string_view name_of(RopeType type) {
  switch (type) {
    case RopeType::kDefault:
      return "default";
    case RopeType::kLinear:
      return "linear";
    case RopeType::kLlama3:
      return "llama3";
    case RopeType::kYarn:
      return "yarn";
    case RopeType::kLongRope:
      return "longrope";
  }
  return "?";
}

Rope::Rope(const RopeConfig& config, std::int32_t head_dim, std::int32_t max_positions)
    : attention_factor_(static_cast<float>(attention_factor_of(config, max_positions))) {
  std::vector<float> inverse = inverse_frequencies(config.theta, head_dim);
  std::vector<float> short_scale(inverse.size(), 1.0f);
  switch (config.type) {
    case RopeType::kDefault:
      break;
    case RopeType::kLinear:
      for (float& frequency : inverse) frequency /= static_cast<float>(config.factor);
      break;
    case RopeType::kLlama3:
      stretch_llama3(config, inverse);
      break;
    case RopeType::kYarn:
      stretch_yarn(config, head_dim, inverse);
      break;
    case RopeType::kLongRope:
      short_scale = reciprocals(config.short_factor);
      if (config.long_factor != config.short_factor) {
        switch_length_ = config.original_max_positions;
      }
      break;
  }
  const std::vector<float> long_scale =
      switch_length_ > 0 ? reciprocals(config.long_factor) : short_scale;
  for (const std::vector<float>* part :
       {&std::as_const(short_scale), &long_scale, &std::as_const(inverse)}) {
    numbers_.insert(numbers_.end(), part->begin(), part->end());
  }
}

RopeTableParams Rope::tables(const float* numbers) const {
  const std::size_t half = numbers_.size() / 3;
  return {.head_dim = static_cast<std::int32_t>(2 * half),
          .scales = numbers,
          .frequencies = numbers + 2 * half,
          .switch_length = switch_length_,
          .factor = attention_factor_};
}

void Rope::row(std::int32_t position, std::int32_t length, float* cos, float* sin) const {
  RopeTableParams params = tables(numbers_.data());
  params.tokens = 1;
  params.positions = &position;
  params.lengths = &length;
  params.cos = cos;
  params.sin = sin;
  fill_rope_row(params, 0);
}

}  // namespace infllm::model
