// SPDX-License-Identifier: Apache-2.0
#include "infllm/app/report.h"

#include <fmt/format.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "infllm/app/progress.h"
#include "infllm/app/signals.h"

namespace infllm::app {
namespace {

void print_line(std::string_view name, double seconds, std::int32_t count, std::string_view unit) {
  if (count == 0) return;
  fmt::print(stderr,
             "{:>20} = {:10.2f} ms / {:6} {:6} ({:8.2f} ms per token, {:9.2f} tokens per second)\n",
             name, seconds * 1e3, count, unit, seconds * 1e3 / count, count / seconds);
}

void print_steps(std::string_view name, const model::ForwardTimes& times) {
  const StepTimes& attention = times.attention;
  fmt::print(stderr,
             "{:>20} = compress {:.1f}, score {:.1f}, select {:.1f}, attend {:.1f}, projections "
             "{:.1f}, mlp {:.1f}, other {:.1f} ms\n",
             name, attention.compress * 1e3, attention.score * 1e3, attention.select * 1e3,
             attention.attend * 1e3, times.projections * 1e3, times.mlp * 1e3,
             (times.embed + times.norm + times.rope + times.cache + times.head) * 1e3);
}

double rate(std::int32_t tokens, double seconds) { return seconds > 0 ? tokens / seconds : 0; }

}  // namespace

void print_timings(const Session& session, const engine::Completion& completion) {
  const engine::Timings& t = completion.timings;
  const double total = t.prompt_seconds + t.eval_seconds;
  fmt::print(stderr, "{:>20} = {:10.2f} ms\n", "load time", session.load_seconds * 1e3);
  print_line("prompt eval time", t.prompt_seconds, t.prompt_computed(), "tokens");
  print_line("eval time", t.eval_seconds, t.eval_tokens(), "runs");
  fmt::print(stderr, "{:>20} = {:10.2f} ms / {:6} tokens\n", "total time", total * 1e3,
             t.prompt_computed() + t.generated_tokens);
  if (t.reused_tokens > 0) {
    fmt::print(stderr, "{:>20} = {} of {} prompt tokens\n", "re-used from cache", t.reused_tokens,
               t.prompt_tokens);
  }
  fmt::print(stderr, "{:>20} = {:.1f}% of the prompt's keys, {:.1f}% of the answer's\n", "attended",
             100 * t.prompt_visible.share(), 100 * t.eval_visible.share());
  if (t.prompt_times.total() > 0) print_steps("prompt steps", t.prompt_times);
  if (t.eval_times.total() > 0) print_steps("answer steps", t.eval_times);
  fmt::print(stderr, "{:>20} = {}\n", "peak memory",
             bytes_text(static_cast<double>(peak_memory())));
}

nlohmann::json times_json(const model::ForwardTimes& times) {
  return {{"compress_ms", times.attention.compress * 1e3},
          {"score_ms", times.attention.score * 1e3},
          {"select_ms", times.attention.select * 1e3},
          {"attend_ms", times.attention.attend * 1e3},
          {"embed_ms", times.embed * 1e3},
          {"norm_ms", times.norm * 1e3},
          {"projections_ms", times.projections * 1e3},
          {"rope_ms", times.rope * 1e3},
          {"cache_ms", times.cache * 1e3},
          {"mlp_ms", times.mlp * 1e3},
          {"head_ms", times.head * 1e3}};
}

nlohmann::json completion_json(const Session& session, const engine::Completion& completion) {
  const engine::Timings& t = completion.timings;
  return {
      {"text", completion.text},
      {"finish_reason", engine::name_of(completion.reason)},
      {"tokens", completion.tokens},
      {"prompt_tokens", t.prompt_tokens},
      {"reused_tokens", t.reused_tokens},
      {"generated_tokens", t.generated_tokens},
      {"model", session.name},
      {"dtype", session.dtype},
      {"device", session.backend.name},
      {"threads", session.threads()},
      {"attention",
       {{"kind", t.prompt_visible.share() < 1 || t.eval_visible.share() < 1 ? "sparse" : "dense"},
        {"prompt_visible_share", t.prompt_visible.share()},
        {"answer_visible_share", t.eval_visible.share()},
        {"description", attention_text(session.config())}}},
      {"timings",
       {{"load_ms", session.load_seconds * 1e3},
        {"time_to_first_token_ms", (t.wait_seconds + t.prompt_seconds) * 1e3},
        {"prompt_ms", t.prompt_seconds * 1e3},
        {"prompt_tokens_per_second", rate(t.prompt_computed(), t.prompt_seconds)},
        {"answer_ms", t.eval_seconds * 1e3},
        {"answer_tokens_per_second", rate(t.eval_tokens(), t.eval_seconds)},
        {"prompt_steps", times_json(t.prompt_times)},
        {"answer_steps", times_json(t.eval_times)}}},
      {"peak_memory_bytes", peak_memory()},
  };
}

int report_failure(const Status& status) {
  if (status.code() == StatusCode::kCancelled) {
    fmt::print(stderr, "interrupted\n");
    return kExitInterrupted;
  }
  fmt::print(stderr, "error: {}\n", status.message());
  return status.code() == StatusCode::kInvalidArgument ? kExitUsage : kExitFailure;
}

Status write_stdout(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0) {
    return {};
  }
  return io_error(fmt::format("standard output: {}", std::strerror(errno)));
}

std::string dump(const nlohmann::json& json, int indent) {
  return json.dump(indent, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace infllm::app
