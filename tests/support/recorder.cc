// SPDX-License-Identifier: Apache-2.0
#include "tests/support/recorder.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include "infllm/backend/open.h"
#include "tests/support/must.h"

namespace infllm::testing {
namespace {

using Steps = std::vector<std::function<Status()>>;

struct State {
  const Kernels* host = nullptr;
  bool recording = false;
  Steps steps;  // of the graph that is being recorded
  int recorded = 0;
  int replays = 0;
  int rows_ranked = 0;
};
State* state = nullptr;

// Now, or when the graph is replayed.
Status run_or_keep(std::function<Status()> step) {
  if (!state->recording) return step();
  state->steps.push_back(std::move(step));
  return {};
}

// The cell `kCell` of the host's table, deferred while recording.
template <auto kCell, typename Params>
Status deferred(const Backend& backend, const Params& params, std::span<std::byte> workspace) {
  return run_or_keep([backend, params, workspace] {
    return (state->host->*kCell).run(backend, params, workspace);
  });
}

template <auto kCell, typename Params>
void wrap(Kernels& table, Cell<Params> Kernels::*) {
  if ((table.*kCell).run != nullptr) (table.*kCell).run = &deferred<kCell, Params>;
}
template <auto... kCells>
void wrap_all(Kernels& table) {
  (wrap<kCells>(table, kCells), ...);
}

Result<Graph> record(const Backend&, const std::function<Status()>& body) {
  state->recording = true;
  state->steps.clear();
  const Status status = body();
  state->recording = false;
  if (!status.ok()) return status;
  state->recorded += 1;
  return Graph{std::make_shared<Steps>(std::move(state->steps))};
}

Status replay(const Backend&, const Graph& graph) {
  state->replays += 1;
  for (const auto& step : *static_cast<const Steps*>(graph.handle.get())) INFLLM_TRY(step());
  return {};
}

TopLogits rank(const double* row, std::int64_t size, float temperature) {
  TopLogits best;
  std::vector<std::int32_t> ids(static_cast<std::size_t>(size));
  std::iota(ids.begin(), ids.end(), 0);
  for (const std::int32_t id : ids) {
    if (std::isnan(row[id]) || row[id] == INFINITY) {
      best.broken = id;
      return best;
    }
  }
  std::erase_if(ids, [&](std::int32_t id) { return row[id] == -INFINITY; });
  std::ranges::stable_sort(ids, [&](std::int32_t a, std::int32_t b) {
    return static_cast<float>(row[a]) > static_cast<float>(row[b]);
  });
  best.count =
      std::min(static_cast<std::int32_t>(ids.size()), temperature > 0 ? TopLogits::kMost : 1);
  for (std::int32_t i = 0; i < best.count; ++i) {
    best.token[i] = ids[static_cast<std::size_t>(i)];
    best.logit[i] = static_cast<float>(row[best.token[i]]);
  }
  std::ranges::sort(ids);  // added up in the order of a whole row's sampler
  for (const std::int32_t id : ids) {
    if (temperature > 0) {
      best.weight += std::exp((static_cast<double>(static_cast<float>(row[id])) - best.logit[0]) /
                              temperature);
    }
  }
  return best;
}

Status top_logits(const Backend&, const TopLogitsParams& p, std::span<std::byte>) {
  return run_or_keep([p]() -> Status {
    for (std::int64_t row = 0; row < p.rows; ++row) {
      p.out[row] = rank(static_cast<const double*>(p.logits) + row * p.vocabulary, p.vocabulary,
                        p.temperatures[row]);
    }
    state->rows_ranked += static_cast<int>(p.rows);
    return {};
  });
}

Kernels recording_table(const Kernels& host) {
  Kernels table = host;
  wrap_all<&Kernels::kv_append, &Kernels::compress, &Kernels::score, &Kernels::select,
           &Kernels::attend, &Kernels::linear, &Kernels::embed, &Kernels::rms_norm,
           &Kernels::rope_tables, &Kernels::rope, &Kernels::swiglu, &Kernels::gather>(table);
  table.synchronize = [](const Backend&) { return Status(); };
  table.record = &record;
  table.replay = &replay;
  table.top_logits = {&top_logits};
  return table;
}

}  // namespace

Recorder::Recorder() : backend_(must(open_backend("reference", {.threads = 2}))) {
  INFLLM_CHECK(state == nullptr, "one Recorder at a time");
  static const Kernels* host = backend_.kernels;
  static const Kernels table = recording_table(*host);
  state = new State{.host = host};
  backend_.kernels = &table;
}

Recorder::~Recorder() {
  delete state;
  state = nullptr;
}

int Recorder::recorded() const { return state->recorded; }
int Recorder::replays() const { return state->replays; }
int Recorder::rows_ranked() const { return state->rows_ranked; }

}  // namespace infllm::testing
