// SPDX-License-Identifier: Apache-2.0
//
// The next token from the logits of one sequence.
//
// Steps, in the order of Hugging Face's logits processors and warpers:
//   1. repetition_penalty r (Hugging Face): tokens of the prompt or the answer: l > 0 ? l / r : l *
//   r
//   2. presence and frequency penalty (OpenAI): tokens of the answer: l - presence - frequency *
//   count
//   3. temperature 0 ends here: the largest logit, of equals the smallest id. Else l / temperature
//   4. top_k: the k largest stay; 0 is off
//   5. top_p: the fewest tokens whose probabilities reach top_p stay; 1 is off
//   6. min_p: tokens with at least min_p times the largest probability stay; 0 is off
//   7. one token, drawn by its probability among those that stayed
// Equal logits rank by id, smaller first, so the result never depends on how a sort treats ties.
//
// Randomness is a function of (seed, position) alone, by the counter-based generator Philox
// 4x32-10: the same request draws the same tokens whatever else runs in its batch, and step n needs
// no step before it.
//
// Logits: minus infinity forbids a token. NaN and plus infinity mean that the model's computation
// went wrong, and are an error.
//
//   INFLLM_TRY(check(params));
//   Sampler sampler(params);
//   std::int32_t token = INFLLM_TRY(sampler.sample(logits, sequence, prompt_length));
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "infllm/core/status.h"
#include "infllm/ops/sampling.h"

namespace infllm::engine {

struct SamplingParams {
  float temperature = 1.0f;         // [0, 100]; 0 is greedy
  std::int32_t top_k = 0;           // >= 0; 0 is off
  float top_p = 1.0f;               // (0, 1]; 1 is off
  float min_p = 0.0f;               // [0, 1]; 0 is off
  float repetition_penalty = 1.0f;  // (0, 100]; 1 is off
  float presence_penalty = 0.0f;    // [-100, 100]; OpenAI allows [-2, 2]
  float frequency_penalty = 0.0f;   // [-100, 100]
  std::uint64_t seed = 0;
};

// kInvalidArgument names the field, its value and its range.
Status check(const SamplingParams& params);

class Sampler {
 public:
  explicit Sampler(const SamplingParams& params) : params_(params) {}

  // The token that follows `tokens`, of which the first `prompt_tokens` are the prompt. Its
  // position is tokens.size(). The logits are not changed; one per token of the vocabulary, O(V)
  // expected.
  Result<std::int32_t> sample(std::span<const float> logits, std::span<const std::int32_t> tokens,
                              std::int64_t prompt_tokens);
  // The same from the best logits alone, if they decide it: null when penalties may lift other
  // tokens, or when more tokens can be drawn than `best` has. Its weight must be that of the
  // parameters' temperature.
  Result<std::optional<std::int32_t>> sample(const TopLogits& best,
                                             std::span<const std::int32_t> tokens);

 private:
  struct Candidate {
    float logit;
    std::int32_t token;
  };

  Status load(std::span<const float> logits);
  bool has_penalties() const;
  void penalize(std::span<const std::int32_t> tokens, std::int64_t prompt_tokens);
  bool suffices(const TopLogits& best) const;
  // `row_total`: the weight of the whole row, when candidates_ are its best part only.
  std::int32_t draw(std::uint64_t position, std::optional<double> row_total = {});

  SamplingParams params_;
  std::vector<Candidate> candidates_;  // scratch, kept for its memory
  std::vector<double> weights_;
};

// Philox 4x32-10 (Salmon et al. 2011): four random words for a counter and a key.
std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                    std::array<std::uint32_t, 2> key);

}  // namespace infllm::engine
