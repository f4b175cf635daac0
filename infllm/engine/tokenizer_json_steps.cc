// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/tokenizer_json_steps.h"

#include <fmt/format.h>

#include "infllm/engine/json_access.h"
#include "infllm/engine/pre_tokenizer.h"

namespace infllm::engine {
namespace {

using Json = nlohmann::json;
constexpr std::size_t kMaxSteps = 64;

std::string type_of(const Json& step) {
  const Json& type = member(step, "type");
  return type.is_string() ? type.get<std::string>() : "";
}

// A Sequence's steps in order, any other step alone, nothing for null.
Result<std::vector<const Json*>> flatten(const Json& step, const char* list, const char* where) {
  std::vector<const Json*> steps;
  if (step.is_null()) return steps;
  if (type_of(step) != "Sequence") {
    steps.push_back(&step);
    return steps;
  }
  const Json& parts = member(step, list);
  if (!parts.is_array()) return wrong_type(where, list, parts, "an array");
  for (const Json& part : parts) {
    for (const Json* inner : INFLLM_TRY(flatten(part, list, where))) steps.push_back(inner);
    if (steps.size() > kMaxSteps) {
      return data_error(fmt::format("{}: more than {} steps", where, kMaxSteps));
    }
  }
  return steps;
}

Status refuse(const char* where, const Json& step, const char* expected) {
  return unsupported(
      fmt::format("{}: \"{:.32}\" is not supported, expected {}", where, type_of(step), expected));
}

Status read_prepend_scheme(const Json& step, const char* where, PrependScheme& scheme) {
  const std::string marker = INFLLM_TRY(string_member(step, "replacement", where, kSpaceMarker));
  if (marker != kSpaceMarker) {
    return unsupported(
        fmt::format("{}: Metaspace with \"{:.16}\", expected U+2581", where, marker));
  }
  const bool prefix = INFLLM_TRY(bool_member(step, "add_prefix_space", where, true));
  const std::string name =
      INFLLM_TRY(string_member(step, "prepend_scheme", where, prefix ? "always" : "never"));
  if (name == "always") {
    scheme = PrependScheme::kAlways;
  } else if (name == "first") {
    scheme = PrependScheme::kFirst;
  } else if (name == "never") {
    scheme = PrependScheme::kNever;
  } else {
    return data_error(fmt::format(
        "{}: prepend_scheme \"{:.32}\", expected \"always\", \"first\" or \"never\"", where, name));
  }
  return {};
}

}  // namespace

Status read_json_normalizer(const Json& step, NormalizerSpec& spec) {
  constexpr const char* kWhere = "tokenizer.json: normalizer";
  for (const Json* part : INFLLM_TRY(flatten(step, "normalizers", kWhere))) {
    const std::string type = type_of(*part);
    NormalizerStep out;
    if (type == "Prepend") {
      out.kind = NormalizerStep::Kind::kPrepend;
      out.text = INFLLM_TRY(string_member(*part, "prepend", kWhere));
    } else if (type == "Replace") {
      out.kind = NormalizerStep::Kind::kReplace;
      out.text = INFLLM_TRY(string_member(member(*part, "pattern"), "String", kWhere));
      out.replacement = INFLLM_TRY(string_member(*part, "content", kWhere));
      if (out.text.empty()) return refuse(kWhere, *part, "Replace with a non-empty String pattern");
    } else if (type == "Strip") {
      out.kind = NormalizerStep::Kind::kStrip;
      out.left = INFLLM_TRY(bool_member(*part, "strip_left", kWhere, true));
      out.right = INFLLM_TRY(bool_member(*part, "strip_right", kWhere, true));
    } else {
      return refuse(kWhere, *part, "Prepend, Replace, Strip or a Sequence of them");
    }
    if (out.text.size() > kMaxPieceBytes || out.replacement.size() > kMaxPieceBytes) {
      return data_error(fmt::format("{}: a text of more than {} bytes", kWhere, kMaxPieceBytes));
    }
    spec.steps.push_back(std::move(out));
  }
  return {};
}

Status read_json_pre_tokenizer(const Json& step, PreTokenizerSpec& spec) {
  constexpr const char* kWhere = "tokenizer.json: pre_tokenizer";
  constexpr const char* kExpected =
      "Metaspace, ByteLevel, or Split with a GPT-2, Llama 3 or Qwen 2 pattern and then ByteLevel";
  const std::vector<const Json*> steps = INFLLM_TRY(flatten(step, "pretokenizers", kWhere));
  if (steps.empty()) return {};
  if (steps.size() == 1 && type_of(*steps[0]) == "Metaspace") {
    spec.metaspace = true;
    spec.metaspace_split = INFLLM_TRY(bool_member(*steps[0], "split", kWhere, true));
    return read_prepend_scheme(*steps[0], kWhere, spec.prepend);
  }
  const Json& last = *steps.back();
  if (steps.size() > 2 || type_of(last) != "ByteLevel") return refuse(kWhere, last, kExpected);
  spec.byte_level = true;
  spec.add_prefix_space = INFLLM_TRY(bool_member(last, "add_prefix_space", kWhere, true));
  const bool own_pattern = INFLLM_TRY(bool_member(last, "use_regex", kWhere, true));
  if (own_pattern) spec.pattern = SplitPattern::kGpt2;
  if (steps.size() == 1) return {};

  const Json& split = *steps[0];
  if (type_of(split) != "Split" || own_pattern || spec.add_prefix_space) {
    return refuse(kWhere, split, kExpected);
  }
  const std::string behavior = INFLLM_TRY(string_member(split, "behavior", kWhere));
  const bool invert = INFLLM_TRY(bool_member(split, "invert", kWhere, false));
  const std::string regex = INFLLM_TRY(string_member(member(split, "pattern"), "Regex", kWhere));
  spec.pattern = known_split_pattern(regex);
  if (spec.pattern == SplitPattern::kNone || behavior != "Isolated" || invert) {
    return unsupported(fmt::format("{}: Split by \"{:.200}\" ({}{}), expected {}", kWhere, regex,
                                   behavior, invert ? ", inverted" : "", kExpected));
  }
  return {};
}

Status read_json_decoder(const Json& step, DecoderSpec& spec) {
  constexpr const char* kWhere = "tokenizer.json: decoder";
  constexpr const char* kExpected =
      "ByteLevel, or Replace or Metaspace, then ByteFallback, Fuse and Strip in this order";
  const std::vector<const Json*> steps = INFLLM_TRY(flatten(step, "decoders", kWhere));
  if (steps.empty()) {
    return unsupported(fmt::format(
        "{}: none, which would put spaces between all tokens; expected {}", kWhere, kExpected));
  }
  if (steps.size() == 1 && type_of(*steps[0]) == "ByteLevel") {
    spec.byte_level = true;
    return {};
  }
  int stage = 0;  // of the order above
  for (const Json* part : steps) {
    const std::string type = type_of(*part);
    int place = 0;
    if (type == "Replace") {
      const std::string from =
          INFLLM_TRY(string_member(member(*part, "pattern"), "String", kWhere));
      const std::string to = INFLLM_TRY(string_member(*part, "content", kWhere));
      if (from != kSpaceMarker || to != " ") {
        return refuse(kWhere, *part, "Replace of U+2581 by a space");
      }
      place = 1;
      spec.marker_is_space = true;
    } else if (type == "Metaspace") {
      place = 1;
      spec.marker_is_space = true;
      PrependScheme scheme{};
      INFLLM_TRY(read_prepend_scheme(*part, kWhere, scheme));
      if (scheme != PrependScheme::kNever) {
        spec.leading = DecoderSpec::Leading::kFirstTokenMarkers;
      }
    } else if (type == "ByteFallback") {
      place = 2;
      spec.byte_fallback = true;
    } else if (type == "Fuse") {
      place = 3;
    } else if (type == "Strip" && stage == 3 && spec.leading == DecoderSpec::Leading::kKeep) {
      place = 4;
      const Json& start = member(*part, "start");
      const std::string content = INFLLM_TRY(string_member(*part, "content", kWhere));
      if (content != " " || member(*part, "stop") != 0 || !start.is_number_unsigned() ||
          start.get<std::uint64_t>() > 1000) {
        return refuse(kWhere, *part, "Strip of up to 1000 spaces at the start, none at the end");
      }
      spec.leading = DecoderSpec::Leading::kStripSpaces;
      spec.strip_spaces = start.get<int>();
    }
    if (place <= stage) return refuse(kWhere, *part, kExpected);
    stage = place;
  }
  return {};
}

}  // namespace infllm::engine
