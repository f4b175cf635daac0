// SPDX-License-Identifier: Apache-2.0
#include "infllm/app/sampling.h"

#include <random>

#include "infllm/app/signals.h"

namespace infllm::app {

Result<engine::Request> base_request(const Session& session, const Options& options) {
  const SamplingOptions& flags = options.sampling;
  engine::Request request;
  engine::SamplingParams& sampling = request.sampling;
  sampling = session.generation.sampling;
  if (flags.temperature) sampling.temperature = *flags.temperature;
  if (flags.top_k) sampling.top_k = *flags.top_k;
  if (flags.top_p) sampling.top_p = *flags.top_p;
  if (flags.min_p) sampling.min_p = *flags.min_p;
  if (flags.repetition_penalty) sampling.repetition_penalty = *flags.repetition_penalty;
  if (flags.presence_penalty) sampling.presence_penalty = *flags.presence_penalty;
  if (flags.frequency_penalty) sampling.frequency_penalty = *flags.frequency_penalty;
  sampling.seed = flags.seed ? *flags.seed : std::random_device()();
  request.max_tokens =
      flags.max_tokens > 0 ? flags.max_tokens : session.generation.max_new_tokens.value_or(-1);
  request.stop = flags.stop;
  request.eos = session.eos();
  request.ignore_eos = flags.ignore_eos;
  request.cancelled = &interrupted();
  return request;
}

}  // namespace infllm::app
