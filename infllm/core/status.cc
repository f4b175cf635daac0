// SPDX-License-Identifier: Apache-2.0
#include "infllm/core/status.h"

#include <cstdio>
#include <cstdlib>

namespace infllm {

const std::string& Status::message() const {
  static const std::string empty;
  return ok() ? empty : state_->message;
}

Status Status::with_context(const std::string& context) const {
  return ok() ? Status() : Status(state_->code, context + ": " + state_->message);
}

Status invalid_argument(std::string message) {
  return {StatusCode::kInvalidArgument, std::move(message)};
}
Status data_error(std::string message) { return {StatusCode::kDataError, std::move(message)}; }
Status not_found(std::string message) { return {StatusCode::kNotFound, std::move(message)}; }
Status unsupported(std::string message) { return {StatusCode::kUnsupported, std::move(message)}; }
Status resource_exhausted(std::string message) {
  return {StatusCode::kResourceExhausted, std::move(message)};
}
Status cancelled(std::string message) { return {StatusCode::kCancelled, std::move(message)}; }
Status io_error(std::string message) { return {StatusCode::kIoError, std::move(message)}; }

namespace internal {
void check_failed(const char* file, int line, const char* condition, const std::string& message) {
  std::fprintf(stderr, "%s:%d: check failed: %s: %s\n", file, line, condition, message.c_str());
  std::abort();
}
}  // namespace internal

}  // namespace infllm
