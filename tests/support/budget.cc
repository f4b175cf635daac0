// SPDX-License-Identifier: Apache-2.0
#include "tests/support/budget.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace infllm::testing {
namespace {

struct Format {
  int mantissa_bits;  // stored ones
  int min_exponent;   // of normal numbers
  double largest;
};

Format format_of(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return {52, -1022, std::numeric_limits<double>::max()};
    case DType::kBF16:
      return {7, -126, 0x1.fep127};
    case DType::kF16:
      return {10, -14, 65504};
    default:
      return {23, -126, std::numeric_limits<float>::max()};
  }
}

}  // namespace

std::string describe(const Label& label) {
  return fmt::format("{} {} {} case {} seed {}", label.op, label.backend, name_of(label.dtype),
                     label.name, label.seed);
}

double ulp(double value, DType dtype) {
  const Format format = format_of(dtype);
  const double smallest_normal = std::ldexp(1.0, format.min_exponent);
  const double magnitude = std::fabs(value);
  if (!(magnitude > smallest_normal)) return smallest_normal;
  return std::max(smallest_normal, std::ldexp(1.0, std::ilogb(magnitude) - format.mantissa_bits));
}

void Ledger::add(std::size_t step, std::vector<std::int64_t> shape, std::span<const double> got,
                 std::span<const double> exact, std::span<const double> rounded) {
  ASSERT_EQ(got.size(), exact.size()) << describe(label_);
  ASSERT_EQ(got.size(), rounded.size()) << describe(label_);
  parts_.push_back({step, std::move(shape), entries_.size()});
  const double largest = format_of(stored_).largest;
  // What the type cannot hold is infinite for everybody.
  const auto storable = [&](double x) {
    return std::fabs(x) > largest ? std::copysign(INFINITY, x) : x;
  };
  for (std::size_t i = 0; i < got.size(); ++i) {
    entries_.push_back({got[i], storable(exact[i]), storable(rounded[i])});
  }
}

// What errors are measured in: 1, or the value itself.
double Ledger::unit(double exact) const {
  return error_ == Error::kAbsolute ? 1 : std::fabs(exact);
}

double Ledger::relative_budget() const {
  double largest = 0;
  for (const Entry& e : entries_) {
    if (!std::isfinite(e.exact) || !std::isfinite(e.rounded)) continue;
    // Below one ulp of the smallest numbers, shares of the value mean nothing.
    if (unit(e.exact) <= ulp(0, stored_)) continue;
    largest = std::max(largest, std::fabs(e.rounded - e.exact) / unit(e.exact));
  }
  return 2 * largest;
}

::testing::AssertionResult Ledger::balanced() const {
  const double share = relative_budget();
  double worst_excess = 0;
  std::size_t worst = 0;
  double square_error = 0;
  double square_allowed = 0;
  double square_ulp = 0;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const Entry& e = entries_[i];
    if (std::isinf(e.exact) && e.got == e.exact) continue;
    const double one = ulp(e.exact, stored_);
    const double budget = share * unit(e.exact) + one;
    const double error = std::fabs(e.got - e.exact);
    const double excess = std::isfinite(error) ? error / budget : INFINITY;
    if (excess > worst_excess) {
      worst_excess = excess;
      worst = i;
    }
    if (unit(e.exact) > ulp(0, stored_) && std::isfinite(e.rounded)) {
      square_error += error * error / (unit(e.exact) * unit(e.exact));
      square_allowed += std::pow((e.rounded - e.exact) / unit(e.exact), 2);
      square_ulp += std::pow(one / unit(e.exact), 2);
    }
  }
  if (worst_excess > 1) {
    const Entry& e = entries_[worst];
    return ::testing::AssertionFailure() << fmt::format(
               "{}: at {} got {:.9g} want {:.9g} error {:.3g} budget {:.3g}", describe(label_),
               place(worst), e.got, e.exact, std::fabs(e.got - e.exact),
               share * unit(e.exact) + ulp(e.exact, stored_));
  }
  const double rms = std::sqrt(square_error);
  const double allowed = 2 * std::sqrt(square_allowed) + std::sqrt(square_ulp);
  if (rms > allowed) {
    const double root = std::sqrt(static_cast<double>(entries_.size()));
    return ::testing::AssertionFailure()
           << fmt::format("{}: rms error {:.3g} over all {} numbers, budget {:.3g}",
                          describe(label_), rms / root, entries_.size(), allowed / root);
  }
  return ::testing::AssertionSuccess();
}

std::string Ledger::place(std::size_t entry) const {
  const auto part =
      std::find_if(parts_.rbegin(), parts_.rend(), [&](const Part& p) { return p.first <= entry; });
  std::vector<std::int64_t> index(part->shape.size());
  auto rest = static_cast<std::int64_t>(entry - part->first);
  for (std::size_t i = part->shape.size(); i-- > 0;) {
    index[i] = rest % part->shape[i];
    rest /= part->shape[i];
  }
  return fmt::format("step {} index {} of {}", part->step, index, part->shape);
}

}  // namespace infllm::testing
