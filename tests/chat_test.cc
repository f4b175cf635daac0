// SPDX-License-Identifier: Apache-2.0
//
// A conversation at a terminal, and the keys that a pipe has not: Ctrl-C and Ctrl-D.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

namespace infllm {
namespace {

using testing::HasSubstr;

constexpr char kInterrupt[] = "\x03";   // Ctrl-C
constexpr char kEndOfInput[] = "\x04";  // Ctrl-D
constexpr int kPatience = 60'000;       // milliseconds, for a machine with much else to do

// The program as its user sees it: what is typed goes in, what the terminal shows comes out.
class Terminal {
 public:
  explicit Terminal(std::vector<std::string> options) {
    std::vector<std::string> arguments = {INFLLM_BINARY, "chat",
                                          INFLLM_SOURCE_DIR "/models/needle-32k"};
    arguments.insert(arguments.end(), options.begin(), options.end());
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    child_ = forkpty(&terminal_, nullptr, nullptr, nullptr);
    if (child_ == 0) {
      setenv("TERM", "dumb", 1);
      execv(INFLLM_BINARY, argv.data());
      _exit(127);
    }
  }
  ~Terminal() {
    if (child_ > 0) {
      kill(child_, SIGKILL);
      waitpid(child_, nullptr, 0);
    }
    close(terminal_);
  }

  void type(const std::string& keys) {
    ASSERT_EQ(write(terminal_, keys.data(), keys.size()), static_cast<ssize_t>(keys.size()));
  }

  // What is shown from now on, up to `last`; fails when that does not come.
  std::string until(const std::string& last) {
    while (shown_.find(last) == std::string::npos) {
      if (!read_more()) {
        ADD_FAILURE() << "waited for \"" << last << "\" and saw \"" << shown_ << "\"";
        return "";
      }
    }
    const std::size_t end = shown_.find(last) + last.size();
    const std::string text = shown_.substr(0, end);
    shown_.erase(0, end);
    return text;
  }

  // The prompt, and until the program sleeps over it: a signal just before that would not wake it.
  void until_prompt() {
    until("> ");
    const auto is_busy = [this] {
      std::ifstream stat("/proc/" + std::to_string(child_) + "/stat");
      std::string text;
      std::getline(stat, text);
      return text.find(") R ") != std::string::npos || text.find(") D ") != std::string::npos;
    };
    while (is_busy()) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }

  int exit_code() {
    while (read_more()) {
    }
    int status = 0;
    waitpid(child_, &status, 0);
    child_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  }

 private:
  // False at the end, and when nothing comes.
  bool read_more() {
    pollfd waiting{.fd = terminal_, .events = POLLIN};
    char buffer[4096];
    if (poll(&waiting, 1, kPatience) <= 0) return false;
    const ssize_t count = read(terminal_, buffer, sizeof(buffer));
    if (count <= 0) return false;  // EIO: the program has left
    shown_.append(buffer, static_cast<std::size_t>(count));
    return true;
  }

  int terminal_ = -1;
  pid_t child_ = -1;
  std::string shown_;
};

TEST(ChatAtTheTerminal, InterruptStopsTheAnswerAndTheConversationGoesOn) {
  Terminal chat({"--ignore-eos", "-n", "30000"});
  chat.until_prompt();
  chat.type("Hello\n");
  chat.until("Hello");
  chat.until("2");  // of the answer, which would go on
  chat.type(kInterrupt);
  chat.until_prompt();
  chat.type("/help\n");
  EXPECT_THAT(chat.until("leaves."), HasSubstr("forget the conversation"));
  chat.until_prompt();
  chat.type("/exit\n");
  EXPECT_EQ(chat.exit_code(), 0);
}

TEST(ChatAtTheTerminal, InterruptAtThePromptAsksForAnother) {
  Terminal chat({});
  chat.until_prompt();
  chat.type(kInterrupt);
  chat.until("(Ctrl-C once more");
  chat.until_prompt();
  chat.type("/clear\n");  // takes it back
  chat.until("forgotten");
  chat.until_prompt();
  chat.type(kInterrupt);
  chat.until("(Ctrl-C once more");
  chat.until_prompt();
  chat.type(kInterrupt);
  EXPECT_EQ(chat.exit_code(), 130);
}

TEST(ChatAtTheTerminal, EndOfInputLeaves) {
  Terminal chat({});
  chat.until_prompt();
  chat.type(kEndOfInput);
  EXPECT_EQ(chat.exit_code(), 0);
}

}  // namespace
}  // namespace infllm
