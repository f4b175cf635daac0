// SPDX-License-Identifier: Apache-2.0
#include "infllm/model/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "infllm/core/json.h"
#include "infllm/model/printable.h"

namespace infllm::model {
namespace {

using Json = nlohmann::json;

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;
constexpr std::size_t kMaxTensors = 200'000;
constexpr std::size_t kMaxNameBytes = 512;
constexpr int kMaxDepth = 4;
constexpr std::int64_t kMaxValues = 16 * static_cast<std::int64_t>(kMaxTensors);
constexpr std::size_t kLengthBytes = 8;

// A tensor's bytes [begin, end) of the data that follows the header.
struct Span {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

std::optional<DType> parse_dtype(const Json& value) {
  static constexpr std::pair<std::string_view, DType> kNames[] = {
      {"F64", DType::kF64},   {"F32", DType::kF32}, {"F16", DType::kF16},
      {"BF16", DType::kBF16}, {"I64", DType::kI64}, {"I32", DType::kI32},
      {"I8", DType::kI8},     {"U8", DType::kU8},   {"BOOL", DType::kBool}};
  for (const auto& [name, dtype] : kNames) {
    if (value == name) return dtype;
  }
  return std::nullopt;
}

// a * b, unless it needs more than 63 bits. The one place that multiplies numbers of a file. Every
// partial product counts: TensorView multiplies its shape in int64, and a zero at the end does not
// take an overflow back.
std::optional<std::int64_t> checked_product(std::int64_t a, std::int64_t b) {
  std::int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

class Parser {
 public:
  Parser(std::span<const std::byte> data, std::string_view what) : data_(data), what_(what) {}

  Status add(const std::string& name, const Json& tensor) {
    if (entries_.size() == kMaxTensors) {
      return data_error(fmt::format("{}: more than {} tensors", what_, kMaxTensors));
    }
    if (name.empty() || name.size() > kMaxNameBytes) {
      return data_error(fmt::format("{}: a tensor name of {} bytes, expected 1 to {}", what_,
                                    name.size(), kMaxNameBytes));
    }
    if (!tensor.is_object() || !tensor.contains("dtype") || !tensor.contains("shape") ||
        !tensor.contains("data_offsets")) {
      return wrong(name, "is not described by an object with dtype, shape and data_offsets");
    }
    TensorView view;
    const std::optional<DType> dtype = parse_dtype(tensor["dtype"]);
    if (!dtype) {
      return wrong(name, fmt::format("has the dtype {}, expected F64, F32, F16, BF16, I64, I32, "
                                     "I8, U8 or BOOL",
                                     printable(tensor["dtype"])));
    }
    view.dtype = *dtype;
    INFLLM_TRY(read_shape(name, tensor["shape"], view));
    const Span span = INFLLM_TRY(read_span(name, tensor["data_offsets"], view));
    view.data = data_.data() + span.begin;
    entries_.push_back({name, view});
    spans_.push_back(span);
    return {};
  }

  // Spans in ascending order must touch: no byte belongs to two tensors or to none.
  Result<std::vector<SafetensorsEntry>> finish() {
    std::vector<std::size_t> order;
    for (std::size_t i = 0; i < spans_.size(); ++i) {
      if (spans_[i].begin < spans_[i].end) order.push_back(i);
    }
    std::sort(order.begin(), order.end(),
              [&](std::size_t a, std::size_t b) { return spans_[a].begin < spans_[b].begin; });
    std::uint64_t covered = 0;
    for (const std::size_t i : order) {
      if (spans_[i].begin != covered) {
        return wrong(
            entries_[i].name,
            fmt::format("begins at byte {} of the data, expected {}: {}", spans_[i].begin, covered,
                        spans_[i].begin < covered ? "it overlaps another tensor"
                                                  : "there is a hole before it"));
      }
      covered = spans_[i].end;
    }
    if (covered != data_.size()) {
      return data_error(
          fmt::format("{}: the tensors end at byte {} of the data, but there are {} bytes", what_,
                      covered, data_.size()));
    }
    std::sort(entries_.begin(), entries_.end(),
              [](const auto& a, const auto& b) { return a.name < b.name; });
    return std::move(entries_);
  }

 private:
  Status wrong(const std::string& name, std::string_view problem) const {
    return data_error(fmt::format("{}: tensor {} {}", what_, printable(name), problem));
  }

  Status read_shape(const std::string& name, const Json& shape, TensorView& view) const {
    if (!shape.is_array() || shape.size() > TensorView::kMaxRank) {
      return wrong(name,
                   fmt::format("has no shape of at most {} dimensions", TensorView::kMaxRank));
    }
    for (const Json& size : shape) {
      constexpr auto kLimit = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
      if (!size.is_number_unsigned() || size.get<std::uint64_t>() > kLimit) {
        return wrong(name, fmt::format("has {} as a dimension, expected a whole number of at most "
                                       "63 bits",
                                       printable(size)));
      }
      view.shape[static_cast<std::size_t>(view.rank++)] =
          static_cast<std::int64_t>(size.get<std::uint64_t>());
    }
    return {};
  }

  Result<Span> read_span(const std::string& name, const Json& offsets,
                         const TensorView& view) const {
    if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
        !offsets[1].is_number_unsigned()) {
      return wrong(name, "has no data_offsets of two whole numbers");
    }
    const Span span{offsets[0].get<std::uint64_t>(), offsets[1].get<std::uint64_t>()};
    if (span.begin > span.end || span.end > data_.size()) {
      return wrong(name, fmt::format("lies at bytes {} to {}, expected an ascending range within "
                                     "the {} bytes of data; is the file truncated?",
                                     span.begin, span.end, data_.size()));
    }
    std::optional<std::int64_t> bytes = size_of(view.dtype);
    for (int i = 0; i < view.rank && bytes; ++i) {
      bytes = checked_product(*bytes, view.shape[static_cast<std::size_t>(i)]);
    }
    if (!bytes || static_cast<std::uint64_t>(*bytes) != span.end - span.begin) {
      return wrong(
          name, fmt::format("of {} {} has {} bytes in the file, expected {}", name_of(view.dtype),
                            shape_string(view), span.end - span.begin,
                            bytes ? fmt::to_string(*bytes) : "more than 63 bits can count"));
    }
    return span;
  }

  std::span<const std::byte> data_;
  std::string_view what_;
  std::vector<SafetensorsEntry> entries_;
  std::vector<Span> spans_;
};

}  // namespace

Result<std::vector<SafetensorsEntry>> parse_safetensors(std::span<const std::byte> file,
                                                        std::string_view what) {
  if (file.size() < kLengthBytes + 2) {
    return data_error(
        fmt::format("{}: {} bytes are too few for a safetensors file", what, file.size()));
  }
  std::uint64_t header_bytes = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    header_bytes |= std::to_integer<std::uint64_t>(file[i]) << (8 * i);
  }
  const std::uint64_t limit = std::min<std::uint64_t>(kMaxHeaderBytes, file.size() - kLengthBytes);
  if (header_bytes < 2 || header_bytes > limit) {
    return data_error(fmt::format(
        "{}: a header of {} bytes, expected 2 to {}; this is no safetensors file, or a truncated "
        "one",
        what, header_bytes, limit));
  }
  const auto header = file.subspan(kLengthBytes, static_cast<std::size_t>(header_bytes));
  const std::string_view text(reinterpret_cast<const char*>(header.data()), header.size());
  if (text.front() != '{') {
    return data_error(fmt::format("{}: the header begins with byte {:#04x}, expected '{{'", what,
                                  static_cast<unsigned char>(text.front())));
  }
  const Json document = INFLLM_TRY(parse_json(text, {.what = fmt::format("{}: header", what),
                                                     .max_bytes = kMaxHeaderBytes,
                                                     .max_depth = kMaxDepth,
                                                     .max_values = kMaxValues}));
  Parser parser(file.subspan(kLengthBytes + header.size()), what);
  for (const auto& [name, value] : document.items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) {
        return data_error(fmt::format("{}: __metadata__ is no object of strings", what));
      }
      continue;
    }
    INFLLM_TRY(parser.add(name, value));
  }
  return parser.finish();
}

}  // namespace infllm::model
