// SPDX-License-Identifier: Apache-2.0
#include "infllm/app/signals.h"

#include <signal.h>
#include <termios.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>

namespace infllm::app {
namespace {

static_assert(std::atomic<bool>::is_always_lock_free);  // what a signal handler may touch
std::atomic<bool> interrupt_flag = false;
std::atomic<bool> cursor_hidden = false;
termios terminal{};  // as it was at the start; line editing changes it
bool has_terminal = false;

void write_stderr(std::string_view text) {
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, text.data(), text.size());
}

void leave(int code) {
  if (cursor_hidden) write_stderr("\x1b[?25h");
  if (has_terminal) tcsetattr(STDIN_FILENO, TCSANOW, &terminal);
  write_stderr("\n");
  _exit(code);
}

void on_signal(int signal) {
  if (signal == SIGINT && !interrupt_flag.exchange(true)) return;
  leave(128 + signal);
}

}  // namespace

void install_signal_handlers() {
  has_terminal = tcgetattr(STDIN_FILENO, &terminal) == 0;
  struct sigaction action {};
  action.sa_handler = on_signal;
  sigemptyset(&action.sa_mask);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) sigaction(signal, &action, nullptr);
  signal(SIGPIPE, SIG_IGN);  // a closed pipe shows as a failed write
  std::atexit(show_cursor);
}

std::atomic<bool>& interrupted() { return interrupt_flag; }

void hide_cursor() {
  if (!cursor_hidden.exchange(true)) write_stderr("\x1b[?25l");
}

void show_cursor() {
  if (cursor_hidden.exchange(false)) write_stderr("\x1b[?25h");
}

}  // namespace infllm::app
