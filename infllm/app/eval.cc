// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <nlohmann/json.hpp>
#include <tuple>

#include "infllm/app/commands.h"
#include "infllm/app/progress.h"
#include "infllm/app/prompt.h"
#include "infllm/app/record.h"
#include "infllm/app/report.h"
#include "infllm/app/samples.h"
#include "infllm/app/sampling.h"
#include "infllm/app/signals.h"

namespace infllm::app {
namespace {

constexpr std::int32_t kSpareTokens = 8;   // beyond the longest expected answer
constexpr std::int64_t kSpareCache = 256;  // for the template, and for pages that are begun

// What was right in one task, at one length, under one kind of attention.
struct Score {
  std::int32_t correct = 0;
  std::int32_t total = 0;
  double seconds = 0;          // an equal share of its document's for each question
  engine::Visibility visible;  // by the tokens of the answer

  double share() const { return total > 0 ? static_cast<double>(correct) / total : 0; }
};
using Cell = std::tuple<std::string, std::int32_t, std::string>;  // task, length, attention
using Scores = std::map<Cell, Score>;

std::string trimmed(const std::string& text) {
  constexpr char kSpace[] = " \t\r\n";
  const std::size_t first = text.find_first_not_of(kSpace);
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

std::int32_t longest_answer(const Session& session, const std::vector<Sample>& samples) {
  std::size_t longest = 0;
  for (const Sample& sample : samples) {
    for (const Question& question : sample.questions) {
      longest = std::max(longest, session.tokenizer->encode(question.answer, {}).size());
    }
  }
  return static_cast<std::int32_t>(longest) + kSpareTokens;
}

class Evaluation {
 public:
  Evaluation(const Session& session, const Options& options, const Prompter& prompter)
      : session_(session), options_(options), prompter_(prompter) {}

  // Every question under one kind of attention, those of a document together: the engine reads it
  // once and lends its keys to all of them.
  Status run(const std::vector<Sample>& samples, const std::string& mode, Progress& bar) {
    const std::unique_ptr<engine::Engine> engine =
        INFLLM_TRY(open_engine(session_, options_.model, engine_options(samples, mode)));
    for (const Sample& sample : samples) {
      const Status status = ask(*engine, sample, mode, bar);
      if (!status.ok()) return status.with_context(fmt::format("sample {}", sample.id));
    }
    return {};
  }

  const Scores& scores() const { return scores_; }

 private:
  // Room for the longest document, and for a question and its answer beside each one more.
  engine::EngineOptions engine_options(const std::vector<Sample>& samples,
                                       const std::string& mode) const {
    std::size_t together = 1;
    std::size_t longest = 0;
    for (const Sample& sample : samples) {
      together = std::max(together, sample.questions.size());
      for (const Question& question : sample.questions) {
        longest = std::max(longest, session_.tokenizer->encode(question.question, {}).size());
      }
    }
    const auto sequences = static_cast<std::int32_t>(
        std::min(together, static_cast<std::size_t>(options_.eval.parallel)));
    const std::int64_t each =
        static_cast<std::int64_t>(longest) + options_.sampling.max_tokens + kSpareCache;
    return {.max_sequences = sequences,
            .cache_tokens = context_tokens(session_, options_.model) + (sequences - 1) * each,
            .dense = mode == "dense"};
  }

  Status ask(engine::Engine& engine, const Sample& sample, const std::string& mode, Progress& bar) {
    std::vector<engine::Completion> answers(sample.questions.size());
    for (std::size_t i = 0; i < answers.size(); ++i) {
      engine::Request request = INFLLM_TRY(base_request(session_, options_));
      request.prompt = INFLLM_TRY(
          prompter_.ask(document_message(sample.document, sample.questions[i].question)));
      request.on_done = [&answers, i](const engine::Completion& done) { answers[i] = done; };
      INFLLM_TRY(engine.submit(std::move(request)));
    }
    const auto start = std::chrono::steady_clock::now();
    while (!engine.idle()) INFLLM_TRY(engine.step());
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    for (std::size_t i = 0; i < answers.size(); ++i) {
      if (answers[i].reason == engine::FinishReason::kCancelled) return cancelled("interrupted");
      judge(sample, sample.questions[i], mode, answers[i],
            taken.count() / static_cast<double>(answers.size()));
    }
    bar.update(done_, fmt::format("{}, {} of {} right", mode, correct_, done_));
    return {};
  }

  void judge(const Sample& sample, const Question& question, const std::string& mode,
             const engine::Completion& answer, double seconds) {
    const bool is_right = trimmed(answer.text) == trimmed(question.answer);
    if (options_.model.verbose && !is_right) {
      fmt::print(stderr, "{} {} {}: \"{}\" -> \"{}\", expected \"{}\"\n", sample.id, question.task,
                 mode, question.question, answer.text, question.answer);
    }
    Score& score = scores_[{question.task, sample.length, mode}];
    score.correct += is_right ? 1 : 0;
    score.total += 1;
    score.seconds += seconds;
    score.visible.attended += answer.timings.eval_visible.attended;
    score.visible.causal += answer.timings.eval_visible.causal;
    correct_ += is_right ? 1 : 0;
    done_ += 1;
  }

  const Session& session_;
  const Options& options_;
  const Prompter& prompter_;
  Scores scores_;
  std::int64_t done_ = 0;
  std::int64_t correct_ = 0;
};

std::string table(const Scores& scores, const std::vector<std::string>& modes) {
  std::string text = "| task | length |";
  std::string rule = "|---|---:|";
  for (const std::string& mode : modes) {
    text += fmt::format(" {} | attended | s |", mode);
    rule += "---:|---:|---:|";
  }
  text += "\n" + rule + "\n";
  for (const auto& [cell, unused] : scores) {
    const auto& [task, length, mode] = cell;
    if (mode != modes.front()) continue;  // one row for all modes
    text += fmt::format("| {} | {} |", task, length);
    for (const std::string& each : modes) {
      const auto found = scores.find({task, length, each});
      if (found == scores.end()) {  // ended before
        text += " - | - | - |";
        continue;
      }
      const Score& score = found->second;
      text += fmt::format(" {:.1f}% ({}/{}) | {:.1f}% | {:.3g} |", 100 * score.share(),
                          score.correct, score.total, 100 * score.visible.share(), score.seconds);
    }
    text += "\n";
  }
  return text;
}

std::vector<nlohmann::json> records(const Session& session, const Scores& scores) {
  std::vector<nlohmann::json> lines;
  for (const auto& [cell, score] : scores) {
    nlohmann::json line = record_header(session, "eval.needle");
    line["model"] = session.name;
    line["dtype"] = session.dtype;
    line["task"] = std::get<0>(cell);
    line["length"] = std::get<1>(cell);
    line["attention"] = std::get<2>(cell);
    line["correct"] = score.correct;
    line["total"] = score.total;
    line["visible_share"] = score.visible.share();
    line["seconds"] = score.seconds;
    lines.push_back(std::move(line));
  }
  return lines;
}

Status eval(const Options& given) {
  const std::vector<std::string> modes = INFLLM_TRY(parse_attention_list(given.eval.attention));
  const std::vector<Sample> samples =
      INFLLM_TRY(read_samples(given.eval.samples, given.eval.limit));
  if (!given.eval.jsonl_file.empty()) {
    INFLLM_TRY(append_records(given.eval.jsonl_file, {}));  // told before the work
  }
  const std::unique_ptr<Session> session = INFLLM_TRY(open_session(given.model));
  print_effective_values(*session, given.model, context_tokens(*session, given.model));
  if (std::ranges::count(modes, "sparse") > 0 && !session->config().sparse) {
    return invalid_argument("this model has no sparse attention; add --sparse on");
  }
  Options options = given;
  options.sampling.temperature = 0;  // greedy
  if (options.sampling.max_tokens < 0) {
    options.sampling.max_tokens = longest_answer(*session, samples);
  }
  const Prompter prompter = INFLLM_TRY(Prompter::create(*session, options.prompt));

  std::int64_t questions = 0;
  for (const Sample& sample : samples)
    questions += static_cast<std::int64_t>(sample.questions.size());
  Progress bar("eval", Progress::Unit::kItems, questions * static_cast<std::int64_t>(modes.size()));
  bar.update(0);
  Evaluation evaluation(*session, options, prompter);
  Status ended;
  for (const std::string& mode : modes) {
    ended = evaluation.run(samples, mode, bar);
    if (!ended.ok()) break;
  }
  bar.finish();

  if (evaluation.scores().empty()) return ended;
  // What was answered until then is kept.
  if (!options.eval.jsonl_file.empty()) {  // first: the reader of the table may have gone
    INFLLM_TRY(append_records(options.eval.jsonl_file, records(*session, evaluation.scores())));
  }
  INFLLM_TRY(write_stdout(table(evaluation.scores(), modes)));
  return ended;
}

}  // namespace

int eval_command(const Options& options) {
  const Status status = eval(options);
  return status.ok() ? kExitOk : report_failure(status);
}

}  // namespace infllm::app
