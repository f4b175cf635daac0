// SPDX-License-Identifier: Apache-2.0
//
// The only file that sees CLI11. Long names that several tools use for one thing are accepted as
// synonyms; help_text() shows the first of them.
#include "infllm/app/cli.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <array>
#include <limits>
#include <type_traits>

#include "infllm/app/signals.h"
#include "infllm/app/version.h"
#include "infllm/model/config.h"

namespace infllm::app {
namespace {

constexpr std::int32_t kMaxTokens = std::numeric_limits<std::int32_t>::max() / 2;

// A number from `low` to `high`.
template <typename Number>
CLI::Validator between(Number low, Number high) {
  const auto check = [low, high](const std::string& text) {
    Number value{};
    const bool is_signed = text.starts_with('-');  // CLI11 would wrap it around
    if (CLI::detail::lexical_cast(text, value) && low <= value && value <= high &&
        (std::is_signed_v<Number> || !is_signed)) {
      return std::string();
    }
    const std::string kind = std::is_integral_v<Number> ? "whole number" : "number";
    return fmt::format("\"{}\", expected a {} from {} to {}", text, kind, low, high);
  };
  return {check, "", ""};
}

const CLI::Validator kPositive = between(1, kMaxTokens);
const CLI::Validator kNatural = between(0, kMaxTokens);

// A device, by how its name begins; whether this machine has it is seen when it is opened.
const CLI::Validator kDevice(
    [](const std::string& text) {
      const std::string kind = text.substr(0, text.find(':'));
      if (text == "auto" || kind == "cpu" || kind == "cuda" || kind == "reference") {
        return std::string();
      }
      return fmt::format("\"{}\", expected auto, cpu, cuda, cuda:N or reference", text);
    },
    "", "");

template <typename T>
CLI::Option* option(CLI::App* app, const std::string& names, T& value) {
  CLI::Option* added = app->add_option(names, value);
  const std::string& longest = added->get_lnames().empty() ? names : added->get_lnames().front();
  std::string variable = "INFLLM_" + longest;
  for (char& c : variable) c = c == '-' ? '_' : static_cast<char>(std::toupper(c));
  if (!added->get_lnames().empty()) added->envname(variable);
  return added;
}

void add_sparse_options(CLI::App* app, SparseOptions& sparse) {
  option(app, "--sparse", sparse.mode)->check(CLI::IsMember({"auto", "on", "off"}));
  option(app, "--dense-len,--sparse-switch", sparse.dense_len)->check(between(-1, kMaxTokens));
  option(app, "--topk,--sparse-topk-k", sparse.topk)->check(kNatural);
  CLI::Option* window = option(app, "--window-size", sparse.window_size)->check(kNatural);
  option(app, "--block-window-size", sparse.window_blocks)
      ->check(between(0, 1 << 20))
      ->excludes(window);
  option(app, "--init-blocks,--sink-window-size", sparse.init_blocks)->check(kNatural);
  option(app, "--kernel-size", sparse.kernel_size)->check(kPositive);
  option(app, "--kernel-stride", sparse.kernel_stride)->check(kPositive);
  option(app, "--block-size", sparse.block_size)->check(kPositive);
  CLI::Option* lse = option(app, "--lse", sparse.lse)->check(CLI::IsMember({"coarse", "fine"}));
  app->add_flag("--use-compress-lse", sparse.compress_lse)->excludes(lse);
  app->add_flag("--use-nope", sparse.use_nope);
  app->add_flag("--legacy-window", sparse.legacy_window);
}

void add_model_options(CLI::App* app, ModelOptions& model) {
  option(app, "model,-m,--model,--model-path", model.path);
  option(app, "--device", model.device)->check(kDevice);
  option(app, "-t,--threads", model.threads)->check(between(0, 1024));
  option(app, "--dtype", model.dtype);
  option(app, "--kv-dtype", model.kv_dtype)
      ->check(CLI::IsMember({"auto", "float32", "f32", "bfloat16", "bf16"}));
  option(app, "--chunk-size,--chunk-length,--max-num-batched-tokens", model.chunk_tokens)
      ->check(between(1, 1 << 20));
  add_sparse_options(app, model.sparse);
}

void add_context_option(CLI::App* app, ModelOptions& model) {
  option(app, "-c,--ctx-size,--max-model-len,--context-length", model.context)->check(kNatural);
}

void add_verbose_option(CLI::App* app, ModelOptions& model) {
  app->add_flag("-v,--verbose", model.verbose);
}

void add_sampling_options(CLI::App* app, SamplingOptions& sampling) {
  option(app, "--temp,--temperature", sampling.temperature)->check(between(0.0, 100.0));
  option(app, "--top-k", sampling.top_k)->check(kNatural);
  option(app, "--top-p", sampling.top_p)->check(between(0.0, 1.0));
  option(app, "--min-p", sampling.min_p)->check(between(0.0, 1.0));
  option(app, "--repeat-penalty,--repetition-penalty", sampling.repetition_penalty)
      ->check(between(0.01, 100.0));
  option(app, "--presence-penalty", sampling.presence_penalty)->check(between(-100.0, 100.0));
  option(app, "--frequency-penalty", sampling.frequency_penalty)->check(between(-100.0, 100.0));
  option(app, "-s,--seed,--random-seed", sampling.seed)
      ->check(between<std::uint64_t>(0, std::numeric_limits<std::uint64_t>::max()));
  option(app, "-n,--max-tokens,--predict,--num-generate", sampling.max_tokens)
      ->check(between(-1, kMaxTokens))
      ->check([](const std::string& text) {
        return text == "0" ? std::string("an answer has at least one token") : std::string();
      });
  app->add_option("--stop", sampling.stop)->allow_extra_args(false);
  app->add_flag("--ignore-eos", sampling.ignore_eos);
}

// Flags of the chat template.
void add_template_options(CLI::App* app, PromptOptions& prompt) {
  option(app, "--system", prompt.system);
  app->add_flag_callback("--enable-thinking", [&prompt] { prompt.enable_thinking = true; });
  app->add_flag_callback("--no-thinking", [&prompt] { prompt.enable_thinking = false; });
}

void add_run(CLI::App* app, Options& options) {
  add_model_options(app, options.model);
  add_context_option(app, options.model);
  add_verbose_option(app, options.model);
  app->add_option("prompt,-p,--prompt", options.prompt.text);
  CLI::Option* file = app->add_option("-f,--file", options.prompt.file);
  CLI::Option* document = app->add_option("--document", options.prompt.document);
  CLI::Option* question = app->add_option("--question", options.prompt.question);
  document->needs(question)->excludes(file);
  question->needs(document);
  app->add_flag_callback("--no-chat", [&options] { options.prompt.chat = false; });
  add_template_options(app, options.prompt);
  add_sampling_options(app, options.sampling);
  app->add_flag("--json", options.json);
  app->add_flag_callback("--no-perf", [&options] { options.perf = false; });
}

void add_chat(CLI::App* app, Options& options) {
  add_model_options(app, options.model);
  add_context_option(app, options.model);
  add_verbose_option(app, options.model);
  add_template_options(app, options.prompt);
  add_sampling_options(app, options.sampling);
}

void add_bench(CLI::App* app, Options& options) {
  BenchOptions& bench = options.bench;
  add_model_options(app, options.model);
  add_verbose_option(app, options.model);
  option(app, "-p,--n-prompt", bench.prompt_tokens)
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(kNatural);
  option(app, "-n,--n-gen", bench.generated_tokens)
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(kNatural);
  option(app, "-d,--n-depth", bench.depths)
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(kNatural);
  option(app, "-r,--repetitions", bench.repetitions)->check(between(1, 1000));
  option(app, "-o,--output", bench.output)->check(CLI::IsMember({"md", "csv", "json", "jsonl"}));
  option(app, "--attention", bench.attention);
  option(app, "--synthetic", bench.synthetic)->check(CLI::IsMember(model::named_configs()));
  option(app, "--jsonl", bench.jsonl_file);
  option(app, "--repeat", bench.repeat)->check(between(1, 1024));
  app->add_flag("--fill", bench.fill);
  app->add_flag_callback("--no-warmup", [&bench] { bench.warmup = false; });
  app->add_flag_callback("--no-steps", [&bench] { bench.steps = false; });
}

void add_inspect(CLI::App* app, Options& options) {
  add_model_options(app, options.model);
  option(app, "-l,--lengths", options.lengths)
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(kPositive);
  option(app, "--synthetic", options.bench.synthetic)->check(CLI::IsMember(model::named_configs()));
  app->add_flag("--json", options.json);
}

void add_tokenize(CLI::App* app, Options& options) {
  option(app, "model,-m,--model,--model-path", options.model.path);
  app->add_option("text,-p,--prompt", options.prompt.text);
  app->add_option("-f,--file", options.prompt.file);
  app->add_flag("--decode", options.decode);
  app->add_flag("--count", options.count_only);
  app->add_flag_callback("--no-special", [&options] { options.prompt.chat = false; });
  app->add_flag("--json", options.json);
}

void add_eval(CLI::App* app, Options& options) {
  add_model_options(app, options.model);
  add_context_option(app, options.model);
  add_verbose_option(app, options.model);
  add_template_options(app, options.prompt);
  app->add_option("samples,--samples", options.eval.samples);
  option(app, "--attention", options.eval.attention);
  option(app, "--jsonl", options.eval.jsonl_file);
  option(app, "--limit", options.eval.limit)->check(kNatural);
  option(app, "--parallel", options.eval.parallel)->check(between(1, 1024));
  option(app, "-n,--max-tokens,--predict,--num-generate", options.sampling.max_tokens)
      ->check(kPositive);
}

// What CLI11 cannot see by looking at one option.
std::string find_conflict(const Options& options) {
  const PromptOptions& prompt = options.prompt;
  if (options.command != Command::kBench && options.command != Command::kInspect &&
      options.model.path.empty()) {
    return "no model given; name a checkpoint folder";
  }
  if ((options.command == Command::kBench || options.command == Command::kInspect) &&
      options.model.path.empty() == options.bench.synthetic.empty()) {
    return "give either a checkpoint folder or --synthetic SHAPE";
  }
  if (!prompt.text.empty() && !prompt.file.empty()) {
    return "the text is given twice, as an argument and with --file; choose one";
  }
  if (!prompt.document.empty() && !prompt.text.empty()) {
    return "--document takes its prompt from --question; leave out the other prompt";
  }
  if (prompt.document.empty() && !prompt.question.empty()) {
    return "--document names no file";
  }
  if (!prompt.document.empty() && !prompt.chat) {
    return "--document asks through the chat template; leave out --no-chat";
  }
  if (options.command == Command::kEval && options.eval.samples.empty()) {
    return "no samples given; name a file of JSON lines";
  }
  return "";
}

struct Sub {
  const char* name;
  Command command;
  void (*add)(CLI::App*, Options&);
};

constexpr Sub kSubs[] = {
    {"run", Command::kRun, add_run},
    {"chat", Command::kChat, add_chat},
    {"bench", Command::kBench, add_bench},
    {"inspect", Command::kInspect, add_inspect},
    {"tokenize", Command::kTokenize, add_tokenize},
    {"eval", Command::kEval, add_eval},
};

// Of a line of the --config file. CLI11 names neither the file nor what is wrong.
std::string explain_config(std::string_view message) {
  constexpr std::string_view kBefore = "INI was not able to parse ";
  if (!message.starts_with(kBefore)) return std::string(message);
  return fmt::format("--config: \"{}\", expected an option of a command, as in [run] temp = 0",
                     message.substr(kBefore.size()));
}

// Of an argument that no option takes.
std::string explain_extra(const std::string& command, const Options& options,
                          const std::string& argument) {
  if (argument.starts_with("-")) return fmt::format("no option {}", argument);
  if (command.empty()) {
    std::string names;
    for (const Sub& sub : kSubs) names += fmt::format("{}{}", names.empty() ? "" : ", ", sub.name);
    return fmt::format("no command \"{}\", expected one of: {}", argument, names);
  }
  if (!options.prompt.text.empty()) {
    return fmt::format("\"{}\" is one argument too many; put the whole text in quotes", argument);
  }
  return fmt::format("\"{}\" is one argument too many", argument);
}

}  // namespace

Parsed parse_command_line(int argc, char** argv) {
  Parsed parsed;
  CLI::App app;
  app.set_help_flag("");
  bool help = false;
  bool version = false;
  app.add_flag("-h,--help", help);
  app.add_flag("--version", version);
  app.set_config("--config");
  app.allow_config_extras(CLI::config_extras_mode::error);
  // Each command has options of its own: the environment and the config file set those of all.
  std::array<Options, std::size(kSubs)> options;
  for (std::size_t i = 0; i < std::size(kSubs); ++i) {
    CLI::App* command = app.add_subcommand(kSubs[i].name);
    command->set_help_flag("");
    command->add_flag("-h,--help", help);
    command->fallthrough();
    kSubs[i].add(command, options[i]);
  }
  std::string chosen;
  const auto usage_error = [&](const std::string& message) {
    parsed.exit_code = kExitUsage;
    parsed.text = fmt::format("error: {}\nsee: infllm {}{}--help\n", message, chosen,
                              chosen.empty() ? "" : " ");
    return parsed;
  };
  std::string error;
  std::vector<std::string> extra;
  try {
    app.parse(argc, argv);
  } catch (const CLI::ExtrasError& failure) {
    error = failure.what();
    extra = app.remaining(true);
  } catch (const CLI::ConfigError& failure) {
    error = explain_config(failure.what());
  } catch (const CLI::ParseError& failure) {
    error = failure.what();
  }
  for (std::size_t i = 0; i < std::size(kSubs); ++i) {
    if (!app.got_subcommand(kSubs[i].name)) continue;
    chosen = kSubs[i].name;
    parsed.options = options[i];
    parsed.options.command = kSubs[i].command;
  }
  if (help || version) {
    parsed.exit_code = kExitOk;
    parsed.text = help ? help_text(chosen) : fmt::format("infllm {}\n", kVersion);
    return parsed;
  }
  if (!extra.empty()) error = explain_extra(chosen, parsed.options, extra.front());
  if (!error.empty()) return usage_error(error);
  if (chosen.empty()) {
    parsed.exit_code = kExitUsage;
    parsed.text = help_text("");
    return parsed;
  }
  const std::string conflict = find_conflict(parsed.options);
  if (!conflict.empty()) return usage_error(conflict);
  return parsed;
}

}  // namespace infllm::app
