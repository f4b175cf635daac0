// SPDX-License-Identifier: Apache-2.0
//
// The program from outside: exit codes, one clear line for each mistake, nothing but the answer on
// standard output, JSON that parses.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/source_folder.h"

namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

const std::string kModel = infllm::testing::source_folder() / "models/needle-32k";

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

struct Outcome {
  int code = -1;
  std::string out, err;
};

class CliTest : public ::testing::Test {
 protected:
  CliTest() : folder_(fs::temp_directory_path() / ("infllm_cli_" + std::to_string(getpid()))) {
    fs::create_directories(folder_);
  }
  ~CliTest() override { fs::remove_all(folder_); }

  fs::path write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name, std::ios::binary) << text;
    return folder_ / name;
  }

  // Starts the program; its streams are files.
  pid_t start(std::vector<std::string> arguments, const std::string& input) const {
    write("in", input);
    arguments.insert(arguments.begin(), INFLLM_BINARY);
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    const pid_t child = fork();
    if (child == 0) {
      const auto open_as = [&](const char* name, int flags, int descriptor) {
        dup2(open((folder_ / name).c_str(), flags, 0600), descriptor);
      };
      open_as("in", O_RDONLY, STDIN_FILENO);
      open_as("out", O_WRONLY | O_CREAT | O_TRUNC, STDOUT_FILENO);
      open_as("err", O_WRONLY | O_CREAT | O_TRUNC, STDERR_FILENO);
      execv(INFLLM_BINARY, argv.data());
      _exit(127);
    }
    return child;
  }
  Outcome wait(pid_t child) const {
    int status = 0;
    waitpid(child, &status, 0);
    const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
    return {code, read(folder_ / "out"), read(folder_ / "err")};
  }
  Outcome run(const std::vector<std::string>& arguments, const std::string& input = "") const {
    return wait(start(arguments, input));
  }

  // The mistake is told in one line on stderr (with the pointer to --help or to a download, in two
  // or three), and nothing else.
  void expect_refused(const std::vector<std::string>& arguments, int code, const std::string& part,
                      const std::string& input = "") const {
    const Outcome outcome = run(arguments, input);
    EXPECT_EQ(outcome.code, code) << outcome.err;
    EXPECT_EQ(outcome.out, "");
    EXPECT_THAT(outcome.err, StartsWith("error: "));
    EXPECT_THAT(outcome.err, HasSubstr(part));
    EXPECT_LE(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 3) << outcome.err;
  }

  fs::path folder_;
};

const std::vector<std::string> kCommands = {"run", "chat", "bench", "inspect", "tokenize", "eval"};

TEST_F(CliTest, HelpIsOneScreenWithExamples) {
  for (const std::string& command : kCommands) {
    const Outcome help = run({command, "--help"});
    EXPECT_EQ(help.code, 0);
    EXPECT_EQ(help.err, "");
    EXPECT_THAT(help.out, HasSubstr("  infllm " + command + " "));
    EXPECT_LE(std::count(help.out.begin(), help.out.end(), '\n'), 50) << command;
    std::istringstream lines(help.out);
    for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 110u) << line;
  }
  EXPECT_EQ(run({"--help"}).code, 0);
  EXPECT_EQ(run({"run", "-h"}).out, run({"run", "--help"}).out);
}

// Every option that a help page names exists: given a wrong value or none, the complaint is about
// the value, never about an unknown argument.
TEST_F(CliTest, HelpNamesNoOptionThatIsMissing) {
  for (const std::string& command : kCommands) {
    const std::string help = run({command, "--help"}).out;
    for (std::size_t at = help.find(" --"); at != std::string::npos;
         at = help.find(" --", at + 1)) {
      const std::size_t end = help.find_first_not_of("abcdefghijklmnopqrstuvwxyz-", at + 3);
      const std::string option = help.substr(at + 1, end - at - 1);
      if (option == "--" || option == "--help") continue;
      const Outcome outcome = run({command, "/nowhere", option});
      EXPECT_THAT(outcome.err, Not(HasSubstr("no option"))) << command << " " << option;
    }
  }
}

TEST_F(CliTest, VersionAndUsage) {
  EXPECT_THAT(run({"--version"}).out, StartsWith("infllm "));
  EXPECT_EQ(run({}).code, 2);
  EXPECT_EQ(run({}).out, "");
  expect_refused({"frobnicate"}, 2, "no command \"frobnicate\", expected one of: run, chat");
  expect_refused({"run", kModel, "hi", "--frobnicate"}, 2, "no option --frobnicate");
  expect_refused({"run", kModel, "hi", "there"}, 2, "\"there\" is one argument too many; put");
  expect_refused({"eval", kModel, "a", "b"}, 2, "\"b\" is one argument too many");
  expect_refused({"run"}, 2, "no model given");
}

TEST_F(CliTest, InvalidValues) {
  expect_refused({"run", kModel, "hi", "--top-p", "1.5"}, 2,
                 "--top-p: \"1.5\", expected a number from 0 to 1");
  expect_refused({"run", kModel, "hi", "--temp", "warm"}, 2,
                 "--temp: \"warm\", expected a number from 0 to 100");
  expect_refused({"bench", kModel, "-p", "many"}, 2, "\"many\", expected a whole number from 0 to");
  expect_refused({"bench", kModel, "-p", "2000000000"}, 2, "from 0 to 1073741823");
  expect_refused({"run", kModel, "hi", "--temp", "nan"}, 2, "\"nan\", expected a number from 0");
  expect_refused({"run", kModel, "hi", "--seed", "-1"}, 2, "--seed: \"-1\", expected a whole");
  expect_refused({"run", kModel, "hi", "--window-size", "64", "--block-window-size", "1"}, 2,
                 "--window-size excludes --block-window-size");
  expect_refused({"bench", kModel, "--jsonl", "/nowhere/x"}, 1, "/nowhere/x: cannot be written");
  expect_refused({"run", kModel, "hi", "--dtype", "float7"}, 2, "float7");
  expect_refused({"run", kModel, "hi", "--dtype", "int8:x"}, 2, "int8:32");
  expect_refused({"run", kModel, "hi", "--device", "abacus"}, 2, "\"abacus\", expected auto, cpu");
  expect_refused({"run", kModel, "hi", "--device", "cpu:abacus"}, 1, "no device \"cpu:abacus\"");
  expect_refused({"run", kModel, "hi", "--max-tokens", "0"}, 2, "--max-tokens");
  expect_refused({"run", kModel, "hi", "--block-size", "60"}, 2, "block_size");
  expect_refused({"bench", kModel, "--attention", "spares"}, 2, "spares");
  expect_refused({"bench", "--synthetic", "minicpm9"}, 2, "minicpm4-0.5b");
  expect_refused({"tokenize", kModel, "--decode", "5 x 7"}, 2, "\"x\" is no token id");
}

// An option is taken by the commands that do something with it, and by no others.
TEST_F(CliTest, NoOptionIsIgnored) {
  expect_refused({"bench", kModel, "--ctx-size", "64"}, 2, "no option --ctx-size");
  expect_refused({"inspect", kModel, "--ctx-size", "64"}, 2, "no option --ctx-size");
  expect_refused({"inspect", kModel, "--no-perf"}, 2, "no option --no-perf");
  expect_refused({"chat", kModel, "--json"}, 2, "no option --json");
  expect_refused({"tokenize", kModel, "hi", "--no-perf"}, 2, "no option --no-perf");
  const auto cache_bytes = [this](const std::string& type) {
    const Outcome outcome = run({"bench", kModel, "-p", "0", "-n", "2", "-r", "1", "--attention",
                                 "dense", "-o", "json", "--kv-dtype", type});
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    const nlohmann::json row = nlohmann::json::parse(outcome.out)[0];
    return row["cache_gbps"].get<double>() * row["ms"].get<double>();
  };
  EXPECT_NEAR(cache_bytes("float32") / cache_bytes("bfloat16"), 2, 1e-9);
}

TEST_F(CliTest, WhereTheAnswerCannotBeWritten) {
  fs::create_symlink("/dev/full", folder_ / "out");
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"run", kModel, "hi", "-n", "2"},
        {"inspect", kModel},
        {"--help"}}) {
    int status = 0;
    waitpid(start(arguments, ""), &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 1) << arguments[0];
    EXPECT_EQ(read(folder_ / "err"), "error: standard output: No space left on device\n");
  }
}

TEST_F(CliTest, Prompts) {
  expect_refused({"run", kModel, "-f", "/nowhere/x.txt"}, 1, "/nowhere/x.txt");
  expect_refused({"run", kModel, "-f", "/tmp"}, 2, "folder");
  expect_refused({"eval", kModel, "/tmp"}, 2, "/tmp: is a folder");
  expect_refused({"run", kModel, "-f", write("nothing", "\n")}, 2, "nothing: the text is empty");
  expect_refused({"run", kModel}, 2, "empty", "  \n");
  expect_refused({"run", kModel, "--document", kModel + "/config.json"}, 2, "--question");
  expect_refused({"run", kModel, "--document", "", "--question", "Who?"}, 2, "names no file");
  expect_refused({"run", kModel, "hi", "-f", "x"}, 2, "twice");
  expect_refused({"run", kModel, "--ctx-size", "20", "-"}, 2, "--ctx-size",
                 "one two three four five six seven eight nine ten eleven twelve thirteen");
}

TEST_F(CliTest, WhatIsNoCheckpoint) {
  expect_refused({"run", "/nowhere/model", "hi"}, 1, "/nowhere/model");
  expect_refused({"run", "openbmb/MiniCPM4-8B", "hi"}, 1, "openbmb/MiniCPM4-8B");
  expect_refused({"inspect", folder_.string()}, 1, "config.json");
  expect_refused({"tokenize", "openbmb/MiniCPM4-8B", "hi"}, 1, "openbmb/MiniCPM4-8B");
}

TEST_F(CliTest, AnswerAloneOnStandardOutput) {
  const std::string prompt =
      "The pass code of grey fox is 48213. What is the pass code of grey fox?";
  const Outcome given = run({"run", kModel, prompt, "--temp", "0", "-n", "12"});
  EXPECT_EQ(given.code, 0) << given.err;
  EXPECT_THAT(given.err, HasSubstr("prompt eval time ="));
  EXPECT_THAT(given.out, Not(HasSubstr("eval time")));
  EXPECT_TRUE(given.out.ends_with('\n'));
  EXPECT_EQ(std::count(given.out.begin(), given.out.end(), '\n'), 1);

  const Outcome piped = run({"run", kModel, "-", "--temp", "0", "-n", "12", "--no-perf"}, prompt);
  EXPECT_EQ(piped.out, given.out);
  EXPECT_EQ(piped.err, "");
  const Outcome file =
      run({"run", "-m", kModel, "-f", write("prompt", prompt), "--temp", "0", "-n", "12"});
  EXPECT_EQ(file.out, given.out);
}

TEST_F(CliTest, JsonIsTheSameAnswer) {
  const std::vector<std::string> base = {"run", kModel, "Hello", "--temp", "0", "-n", "8"};
  std::vector<std::string> with_json = base;
  with_json.push_back("--json");
  const Outcome json = run(with_json);
  ASSERT_EQ(json.code, 0) << json.err;
  const nlohmann::json object = nlohmann::json::parse(json.out);
  EXPECT_EQ(object["text"].get<std::string>() + "\n", run(base).out);
  EXPECT_EQ(object["generated_tokens"], object["tokens"].size());
  EXPECT_EQ(object["attention"]["kind"], "dense");
  EXPECT_GT(object["timings"]["prompt_ms"], 0.0);
  EXPECT_EQ(json.err, "");
}

TEST_F(CliTest, DocumentQuestionIsOneUserMessage) {
  const std::string document = "The limit of red owl is 77777.";
  const std::string question = "What is the limit of red owl?";
  const Outcome asked = run({"run", kModel, "--document", write("d.txt", document + "\n"),
                             "--question", question, "--temp", "0", "-n", "10", "--json"});
  const Outcome typed =
      run({"run", kModel, document + "\n\n" + question, "--temp", "0", "-n", "10", "--json"});
  ASSERT_EQ(asked.code, 0) << asked.err;
  EXPECT_EQ(nlohmann::json::parse(asked.out)["tokens"], nlohmann::json::parse(typed.out)["tokens"]);
}

TEST_F(CliTest, SparseKnobsTakeBothNames) {
  const auto config = [this](const std::vector<std::string>& flags) {
    std::vector<std::string> arguments = {"inspect", kModel, "--json"};
    arguments.insert(arguments.end(), flags.begin(), flags.end());
    const Outcome outcome = run(arguments);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return nlohmann::json::parse(outcome.out)["sparse_config"];
  };
  EXPECT_EQ(
      config({"--topk", "7", "--dense-len", "-1", "--window-size", "128", "--init-blocks", "2"}),
      config({"--sparse-topk-k", "7", "--sparse-switch", "-1", "--block-window-size", "2",
              "--sink-window-size", "2"}));
  EXPECT_EQ(config({"--topk", "7"})["topk"], 7);
  EXPECT_EQ(config({"--sparse", "off"}), nullptr);
  EXPECT_EQ(config({"--lse", "fine"})["lse"], "fine");
}

TEST_F(CliTest, EnvironmentAndConfigFileGiveDefaults) {
  setenv("INFLLM_TOPK", "5", 1);
  EXPECT_EQ(nlohmann::json::parse(run({"inspect", kModel, "--json"}).out)["sparse_config"]["topk"],
            5);
  EXPECT_EQ(nlohmann::json::parse(
                run({"inspect", kModel, "--json", "--topk", "9"}).out)["sparse_config"]["topk"],
            9);
  unsetenv("INFLLM_TOPK");
  const std::string file = write("infllm.toml", "[inspect]\ntopk = 6\n");
  EXPECT_EQ(nlohmann::json::parse(
                run({"--config", file, "inspect", kModel, "--json"}).out)["sparse_config"]["topk"],
            6);
  expect_refused({"--config", write("bad.toml", "[run]\nwarmth = 1\n"), "run", kModel, "hi"}, 2,
                 "--config: \"run.warmth\", expected an option");
}

TEST_F(CliTest, TokensComeBack) {
  const std::string text = "Grüße, 世界 🙂 123";
  const Outcome ids = run({"tokenize", kModel, text, "--no-special"});
  ASSERT_EQ(ids.code, 0) << ids.err;
  EXPECT_EQ(run({"tokenize", kModel, "--decode"}, ids.out).out, text + "\n");
  const nlohmann::json json = nlohmann::json::parse(run({"tokenize", kModel, text, "--json"}).out);
  EXPECT_EQ(json["ids"].size(), json["pieces"].size());
  EXPECT_EQ(run({"tokenize", kModel, text, "--count"}).out,
            std::to_string(json["ids"].size()) + "\n");
}

TEST_F(CliTest, ChatAnswersEachLine) {
  const Outcome chat = run({"chat", kModel, "--temp", "0", "-n", "6"},
                           "Hello\n/nonsense\nHow are you?\n/clear\nHello\n/exit\nnever read\n");
  EXPECT_EQ(chat.code, 0) << chat.err;
  EXPECT_THAT(chat.err, HasSubstr("/nonsense"));
  std::vector<std::string> lines;
  std::istringstream out(chat.out);
  for (std::string line; std::getline(out, line);) lines.push_back(line);
  ASSERT_GE(lines.size(), 3u);
  EXPECT_EQ(lines.front(), lines.back()) << "/clear did not forget";
}

TEST_F(CliTest, BenchFormats) {
  const std::vector<std::string> base = {"bench", kModel, "-p", "64",   "-n",          "2",
                                         "-r",    "2",    "-d", "0,64", "--dense-len", "64"};
  const auto with = [&](const std::string& format) {
    std::vector<std::string> arguments = base;
    arguments.insert(arguments.end(), {"-o", format});
    const Outcome outcome = run(arguments);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return outcome.out;
  };
  const nlohmann::json rows = nlohmann::json::parse(with("json"));
  ASSERT_EQ(rows.size(), 8u);  // pp and tg, two depths, two kinds of attention
  EXPECT_EQ(rows[0]["test"], "pp64");
  EXPECT_EQ(rows[2]["test"], "pp64 @ d64");
  EXPECT_EQ(rows[0]["attended_sparsely"], false);
  EXPECT_EQ(rows[4]["attention"], "sparse");
  EXPECT_EQ(rows[4]["attended_sparsely"], true);
  for (const auto& row : rows) EXPECT_GT(row["avg_ts"], 0.0);
  const std::string csv = with("csv");
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 9);
  EXPECT_THAT(with("md"), HasSubstr("| tg2 @ d64 |"));
}

TEST_F(CliTest, EvalCountsRightAnswers) {
  const std::string prompt_document = "The pass code of grey fox is 48213.";
  const std::string system = "The pass code of grey fox is 77777.";  // which changes the answer
  const nlohmann::json answer = nlohmann::json::parse(
      run({"run", kModel, "--document", write("d.txt", prompt_document), "--question", "Which?",
           "--temp", "0", "-n", "10", "--system", system, "--json"})
          .out);
  nlohmann::json sample = {
      {"id", "a"},
      {"length", 64},
      {"document", prompt_document},
      {"questions",
       {{{"task", "echo"}, {"question", "Which?"}, {"answer", answer["text"]}},
        {{"task", "wrong"}, {"question", "Which?"}, {"answer", "no model says this"}}}}};
  const fs::path samples = write("samples.jsonl", sample.dump() + "\n\n");
  const fs::path records = folder_ / "records.jsonl";
  const Outcome outcome =
      run({"eval", kModel, samples, "-n", "10", "--system", system, "--jsonl", records});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("| echo | 64 | 100.0% (1/1)"));
  EXPECT_THAT(outcome.out, HasSubstr("| wrong | 64 | 0.0% (0/1)"));
  std::istringstream lines(read(records));
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    const nlohmann::json record = nlohmann::json::parse(line);
    EXPECT_EQ(record["name"], "eval.needle");
    EXPECT_EQ(record["total"], 1);
  }
  EXPECT_EQ(count, 4);
  expect_refused({"eval", kModel, write("bad.jsonl", "{\"length\": 3}\n")}, 1, "bad.jsonl:1");
}

TEST_F(CliTest, AnEvaluationThatFailsKeepsWhatWasAnswered) {
  const auto sample = [](const char* id, const std::string& document) {
    return nlohmann::json{{"id", id},
                          {"length", 64},
                          {"document", document},
                          {"questions", {{{"task", "any"}, {"question", "?"}, {"answer", "x"}}}}}
        .dump();
  };
  std::string too_long;
  for (int i = 0; i < 2000; ++i) too_long += "word ";
  const fs::path samples =
      write("samples.jsonl", sample("short", "Hello.") + "\n" + sample("long", too_long) + "\n");
  const fs::path records = folder_ / "records.jsonl";
  const Outcome outcome = run({"eval", kModel, samples, "-n", "4", "--ctx-size", "512",
                               "--attention", "dense,sparse", "--jsonl", records});
  EXPECT_EQ(outcome.code, 2);  // the prompt is too long
  EXPECT_THAT(outcome.err, HasSubstr("sample long: "));
  EXPECT_THAT(outcome.out, HasSubstr("(0/1)"));
  EXPECT_THAT(outcome.out, HasSubstr("| - | - | - |"));  // the second kind did not begin
  const nlohmann::json record = nlohmann::json::parse(read(records));
  EXPECT_EQ(record["attention"], "dense");
  EXPECT_EQ(record["total"], 1);
}

TEST_F(CliTest, QuestionsAskedTogetherAreAnsweredAsOneByOne) {
  const std::string samples = INFLLM_SOURCE_DIR "/examples/needle/sample_cases.jsonl";
  const auto scores = [&](const std::string& parallel) {
    const fs::path file = folder_ / ("scores-" + parallel);
    const Outcome outcome = run({"eval", kModel, samples, "--parallel", parallel, "-v", "--device",
                                 "cpu", "--attention", "dense,sparse", "--jsonl", file});
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    std::vector<nlohmann::json> records;
    std::istringstream lines(read(file));
    for (std::string line; std::getline(lines, line);) {
      records.push_back(nlohmann::json::parse(line));
      for (const char* changes : {"seconds", "commit", "date"}) records.back().erase(changes);
    }
    return records;
  };
  const std::vector<nlohmann::json> one_by_one = scores("1");
  EXPECT_EQ(one_by_one.size(), 8u);
  EXPECT_EQ(scores("5"), one_by_one);
  EXPECT_EQ(scores("16"), one_by_one);
}

TEST_F(CliTest, InterruptEndsTheAnswerWith130) {
  const pid_t child = start({"run", kModel, "Hello", "--ignore-eos", "-n", "30000"}, "");
  while (read(folder_ / "out").empty()) std::this_thread::sleep_for(std::chrono::milliseconds(20));
  kill(child, SIGINT);
  const Outcome outcome = wait(child);
  EXPECT_EQ(outcome.code, 130) << outcome.err;
  EXPECT_THAT(outcome.err, HasSubstr("total time"));
}

}  // namespace
