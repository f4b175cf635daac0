// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/sampler.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <unordered_map>

namespace infllm::engine {
namespace {

// A uniform number in [0, 1) for a step of a request, of 53 random bits.
double uniform(std::uint64_t seed, std::uint64_t at) {
  const auto words =
      philox({static_cast<std::uint32_t>(at), static_cast<std::uint32_t>(at >> 32), 0, 0},
             {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
  const std::uint64_t bits = (std::uint64_t{words[1]} << 32) | words[0];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

Status in_range(const char* name, float value, float low, bool with_low, float high) {
  const bool above = with_low ? value >= low : value > low;
  if (above && value <= high) return {};  // false for NaN
  return invalid_argument(fmt::format("{} = {}, expected a value {} {} and at most {}", name, value,
                                      with_low ? "of at least" : "above", low, high));
}

Status broken_logit(std::int64_t token, std::string_view value) {
  return data_error(fmt::format(
      "the logit of token {} is {}: the model's computation overflowed or its weights are damaged",
      token, value));
}

}  // namespace

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                    std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * counter[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57} * counter[2];
    counter = {
        static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
        static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

Status check(const SamplingParams& p) {
  INFLLM_TRY(in_range("temperature", p.temperature, 0, true, 100));
  INFLLM_TRY(in_range("top_p", p.top_p, 0, false, 1));
  INFLLM_TRY(in_range("min_p", p.min_p, 0, true, 1));
  INFLLM_TRY(in_range("repetition_penalty", p.repetition_penalty, 0, false, 100));
  INFLLM_TRY(in_range("presence_penalty", p.presence_penalty, -100, true, 100));
  INFLLM_TRY(in_range("frequency_penalty", p.frequency_penalty, -100, true, 100));
  if (p.top_k < 0) {
    return invalid_argument(fmt::format("top_k = {}, expected 0 (off) or more", p.top_k));
  }
  return {};
}

Status Sampler::load(std::span<const float> logits) {
  candidates_.clear();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const float logit = logits[i];
    if (std::isnan(logit) || logit == INFINITY) {
      return broken_logit(static_cast<std::int64_t>(i), fmt::to_string(logit));
    }
    candidates_.push_back({logit, static_cast<std::int32_t>(i)});
  }
  return {};
}

bool Sampler::has_penalties() const {
  return params_.repetition_penalty != 1.0f || params_.presence_penalty != 0 ||
         params_.frequency_penalty != 0;
}

void Sampler::penalize(std::span<const std::int32_t> tokens, std::int64_t prompt_tokens) {
  if (!has_penalties()) return;
  const float r = params_.repetition_penalty;
  std::unordered_map<std::int32_t, std::int32_t> answered;  // token -> times in the answer
  const auto prompt = static_cast<std::size_t>(std::max<std::int64_t>(prompt_tokens, 0));
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    answered[tokens[i]] += i >= prompt ? 1 : 0;
  }
  for (const auto& [token, count] : answered) {
    if (token < 0 || static_cast<std::size_t>(token) >= candidates_.size()) continue;
    float& logit = candidates_[token].logit;  // candidates are still in the order of their ids
    if (r != 1.0f) logit = logit > 0 ? logit / r : logit * r;
    if (count > 0) {
      logit -= params_.presence_penalty + params_.frequency_penalty * static_cast<float>(count);
    }
  }
}

Result<std::int32_t> Sampler::sample(std::span<const float> logits,
                                     std::span<const std::int32_t> tokens,
                                     std::int64_t prompt_tokens) {
  INFLLM_TRY(load(logits));
  penalize(tokens, prompt_tokens);
  std::erase_if(candidates_, [](const Candidate& c) { return c.logit == -INFINITY; });
  if (candidates_.empty()) {
    return data_error(fmt::format("none of the {} tokens is allowed: every logit is minus infinity",
                                  logits.size()));
  }
  return draw(tokens.size());
}

Result<std::optional<std::int32_t>> Sampler::sample(const TopLogits& best,
                                                    std::span<const std::int32_t> tokens) {
  if (best.broken >= 0) return broken_logit(best.broken, "no number or infinite");
  if (best.count == 0) {
    return data_error("none of the tokens is allowed: every logit is minus infinity");
  }
  if (has_penalties() || !suffices(best)) return std::optional<std::int32_t>();
  candidates_.clear();
  for (std::int32_t i = 0; i < best.count; ++i) {
    candidates_.push_back({best.logit[i], best.token[i]});
  }
  if (params_.top_k == 0 && params_.top_p >= 1) {  // a draw from the whole row goes by id
    std::ranges::sort(candidates_, {}, &Candidate::token);
  }
  return std::optional(
      draw(tokens.size(), params_.top_k == 0 ? std::optional(best.weight) : std::nullopt));
}

// Whether every token that can be drawn is among the best.
bool Sampler::suffices(const TopLogits& best) const {
  if (params_.temperature == 0 || best.count < TopLogits::kMost) return true;
  if (params_.top_k > 0) return params_.top_k <= best.count;
  const auto weight = [&](std::int32_t i) {
    return std::exp((static_cast<double>(best.logit[i]) - best.logit[0]) / params_.temperature);
  };
  if (weight(best.count - 1) < params_.min_p) return true;
  if (params_.top_p >= 1) return false;
  double reached = 0;
  for (std::int32_t i = 0; i < best.count; ++i) reached += weight(i);
  return reached >= params_.top_p * best.weight;
}

std::int32_t Sampler::draw(std::uint64_t position, std::optional<double> row_total) {
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
  };
  const Candidate best = *std::min_element(candidates_.begin(), candidates_.end(), better);
  if (params_.temperature == 0) return best.token;

  std::size_t count = candidates_.size();
  const auto k = static_cast<std::size_t>(params_.top_k);
  if (k > 0 && k < count) {
    std::nth_element(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(k) - 1,
                     candidates_.end(), better);
    count = k;
    candidates_.resize(count);
  }
  // Probabilities up to their common factor, in double: 1 for the best.
  const auto weight = [&](const Candidate& c) {
    return std::exp((static_cast<double>(c.logit) - best.logit) / params_.temperature);
  };
  if (params_.top_p < 1) {
    // The order matters from here on: sort as many as top_p needs, doubling while it needs more.
    double total = row_total.value_or(0);
    if (!row_total) {
      for (const Candidate& c : candidates_) total += weight(c);
    }
    double reached = 0;
    std::size_t sorted = 0, kept = 0;
    while (kept < count && reached < params_.top_p * total) {
      if (kept == sorted) {
        sorted = std::min(count, std::max<std::size_t>(64, 2 * sorted));
        std::partial_sort(candidates_.begin() + static_cast<std::ptrdiff_t>(kept),
                          candidates_.begin() + static_cast<std::ptrdiff_t>(sorted),
                          candidates_.end(), better);
      }
      reached += weight(candidates_[kept++]);
    }
    count = kept;
  } else if (k > 0) {
    // nth_element leaves no particular order; a draw must not depend on it.
    std::sort(candidates_.begin(), candidates_.end(), better);
  }
  candidates_.resize(count);
  weights_.clear();
  double total = 0;
  for (const Candidate& c : candidates_) {
    const double w = weight(c);
    weights_.push_back(w >= params_.min_p ? w : 0);
    total += weights_.back();
  }
  double left = uniform(params_.seed, position) * total;
  std::int32_t token = best.token;
  for (std::size_t i = 0; i < candidates_.size(); ++i) {
    if (weights_[i] == 0) continue;
    token = candidates_[i].token;  // also the answer when rounding leaves a rest at the end
    left -= weights_[i];
    if (left < 0) break;
  }
  return token;
}

}  // namespace infllm::engine
