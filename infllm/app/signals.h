// SPDX-License-Identifier: Apache-2.0
//
// Ctrl-C, and a terminal that is left as it was found.
//
//   install_signal_handlers();
//   engine.generate({.cancelled = &interrupted(), ...});   // the first Ctrl-C ends the answer
//
// The first SIGINT raises interrupted(); a second one, before anybody lowered the flag, leaves the
// program with exit code 130. SIGTERM leaves at once with 143. Leaving shows the cursor again if a
// progress bar had hidden it.
#pragma once

#include <atomic>

namespace infllm::app {

inline constexpr int kExitOk = 0;
inline constexpr int kExitFailure = 1;
inline constexpr int kExitUsage = 2;
inline constexpr int kExitInterrupted = 130;

void install_signal_handlers();
std::atomic<bool>& interrupted();

// Hides or shows the terminal's cursor (stderr); shown again on every way out of the program.
void hide_cursor();
void show_cursor();

}  // namespace infllm::app
