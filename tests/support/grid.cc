// SPDX-License-Identifier: Apache-2.0
#include "tests/support/grid.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "infllm/backend/open.h"
#include "infllm/backend/reference/rounding.h"

namespace infllm::testing {
namespace {

std::vector<Point> points(const std::vector<std::string>& backends) {
  std::vector<Point> list;
  for (const std::string& backend : backends) {
    for (const DType kv : cache_types(backend)) {
      for (const Case& c : cases()) list.push_back({backend, kv, c.name});
    }
  }
  return list;
}

// As gtest takes it.
std::string identifier(std::string name) {
  std::replace_if(
      name.begin(), name.end(), [](char c) { return !std::isalnum(c); }, '_');
  return name;
}

Case unrounded(Case c) {
  c.config.score_rounding = ScoreRounding::kNone;
  return c;
}

}  // namespace

std::vector<std::string> all_backends() {
  std::vector<std::string> names = available_backends();
  std::erase_if(names, [](const std::string& name) {
    return name.starts_with("cuda:") && !name.starts_with("cuda:0:");
  });
  return names;
}

std::vector<std::string> kernel_backends() {
  std::vector<std::string> names = all_backends();
  std::erase(names, "reference");
  return names;
}

std::vector<DType> cache_types(const std::string& backend) {
  const Backend opened = open(backend, 1);
  if (size_of(opened.kernels->activation) == 2) return {opened.kernels->activation};
  return {DType::kF32, DType::kBF16};
}

std::string layout_refusal(const Point& point) {
  if (point.case_name.empty()) return {};
  const Case& c = case_named(point.case_name);
  const KvLayout layout{
      .dtype = point.kv, .kv_heads = c.heads_kv, .head_dim = c.head_dim, .config = c.config};
  return check(open(point.backend, 1), layout).message();
}

std::vector<Point> grid() { return points(kernel_backends()); }
std::vector<Point> whole_grid() { return points(all_backends()); }

std::string backend_id(const ::testing::TestParamInfo<std::string>& info) {
  return identifier(info.param);
}

void PrintTo(const Point& point, std::ostream* out) {
  *out << point.backend << ' ' << name_of(point.kv) << ' ' << point.case_name;
}

std::string point_name(const ::testing::TestParamInfo<Point>& info) {
  return identifier(
      fmt::format("{}_{}_{}", info.param.backend, name_of(info.param.kv), info.param.case_name));
}

Label label_of(const Point& point, std::string op) {
  return {.op = std::move(op),
          .backend = point.backend,
          .dtype = point.kv,
          .name = point.case_name,
          .seed = case_named(point.case_name).seed};
}

Trio::Trio(const Point& point)
    : kernel(open(point.backend), case_named(point.case_name), point.kv),
      exact(open("reference"), unrounded(case_named(point.case_name)), point.kv,
            numbers_type(kernel.backend())),
      rounded(open_rounded(point.kv, kernel.backend().kernels->activation),
              unrounded(case_named(point.case_name)), point.kv, numbers_type(kernel.backend())) {}

void Trio::enter(const Step& step) {
  kernel.enter(step);
  exact.enter(step);
  rounded.enter(step);
  const CachedPlanes planes = kernel.read();
  exact.take_pooled(planes);
  rounded.take_pooled(planes);
}

std::vector<double> sparse_rows(const Rig& rig, const std::vector<double>& rows,
                                std::int64_t width) {
  std::vector<double> kept;
  for (std::int32_t g = 0; g < rig.test_case().heads_kv; ++g) {
    for (std::int32_t t = 0; t < rig.tokens(); ++t) {
      if (!rig.sparse(t)) continue;
      const auto row = rows.begin() + (std::int64_t{g} * rig.tokens() + t) * width;
      kept.insert(kept.end(), row, row + width);
    }
  }
  return kept;
}

namespace {

// The blocks that must be chosen for a token whatever their score, most important first.
std::vector<std::int32_t> forced_blocks(const SparseConfig& config, std::int64_t position) {
  const auto own = static_cast<std::int32_t>(position / config.block_size);
  std::vector<std::int32_t> forced;
  const std::int32_t before_own = config.window_blocks() - (config.legacy_window ? 1 : 0);
  for (std::int32_t b = own; b >= 0 && b >= own - before_own; --b) forced.push_back(b);
  for (std::int32_t b = 0; b < config.init_blocks && b <= own; ++b) {
    if (std::find(forced.begin(), forced.end(), b) == forced.end()) forced.push_back(b);
  }
  return forced;
}

// What is wrong with one row, or nothing.
std::string judge(const SparseConfig& config, std::int64_t position, const std::int32_t* chosen,
                  std::int32_t columns, const double* scores, double share, DType stored) {
  const auto own = static_cast<std::int32_t>(position / config.block_size);
  const std::int32_t expected = std::min({config.budget_blocks(), columns, own + 1});
  std::set<std::int32_t> in;
  for (std::int32_t i = 0; i < columns; ++i) {
    if (i >= expected) {
      if (chosen[i] != -1) return fmt::format("column {} is {}, expected -1", i, chosen[i]);
      continue;
    }
    if (chosen[i] < 0 || chosen[i] > own) {
      return fmt::format("column {} is {}, expected 0 to {}", i, chosen[i], own);
    }
    if (i > 0 && chosen[i] <= chosen[i - 1]) {
      return fmt::format("column {} is {} after {}, expected ascending blocks", i, chosen[i],
                         chosen[i - 1]);
    }
    in.insert(chosen[i]);
  }
  const std::vector<std::int32_t> forced = forced_blocks(config, position);
  for (std::size_t i = 0; i < forced.size() && static_cast<std::int32_t>(i) < expected; ++i) {
    if (!in.contains(forced[i])) return fmt::format("forced block {} is missing", forced[i]);
  }
  // The worst that was chosen freely against the best that was left out.
  const auto budget = [&](double score) { return share * std::fabs(score) + ulp(score, stored); };
  double lowest_in = INFINITY;
  double highest_out = -INFINITY;
  for (std::int32_t b = 0; b <= own; ++b) {
    if (std::find(forced.begin(), forced.end(), b) != forced.end()) continue;
    const double score = scores[b];
    if (!std::isfinite(score)) continue;
    if (in.contains(b)) {
      lowest_in = std::min(lowest_in, score + budget(score));
    } else {
      highest_out = std::max(highest_out, score - budget(score));
    }
  }
  if (lowest_in < highest_out) {
    return fmt::format("a block of at most {:.9g} was chosen, one of at least {:.9g} was not",
                       lowest_in, highest_out);
  }
  return {};
}

}  // namespace

::testing::AssertionResult well_chosen(const Rig& rig, const std::vector<std::int32_t>& selection,
                                       const std::vector<double>& exact_scores,
                                       double relative_budget, DType stored, const Label& label) {
  for (std::int32_t g = 0; g < rig.test_case().heads_kv; ++g) {
    for (std::int32_t t = 0; t < rig.tokens(); ++t) {
      if (!rig.sparse(t)) continue;
      const std::int64_t row = std::int64_t{g} * rig.tokens() + t;
      const std::string problem =
          judge(rig.config(), rig.position(t), selection.data() + row * rig.columns(),
                rig.columns(), exact_scores.data() + row * rig.blocks(), relative_budget, stored);
      if (!problem.empty()) {
        return ::testing::AssertionFailure()
               << fmt::format("{}: KV head {}, token {} at position {}: {}", describe(label), g, t,
                              rig.position(t), problem);
      }
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace infllm::testing
