// SPDX-License-Identifier: Apache-2.0
//
// Errors as values. A function that the caller, the data or the machine can make fail returns
// Status, or Result<T> when it also yields something. An OK Status is one null pointer.
//
//   Result<Config> config = read_config(path);
//   if (!config.ok()) return config.status();
//
//   Config config = INFLLM_TRY(read_config(path));   // the same, in one line
//   INFLLM_TRY(check_shapes(config));                // forwards a failed Status
//
// A message says what was found, what was expected, and what to do:
//   "select: topk = 80 exceeds the 64 blocks of 4096 tokens; lower topk or raise dense_len"
//
// Broken invariants of our own are not errors: INFLLM_CHECK prints file:line and aborts.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>

namespace infllm {

enum class StatusCode {
  kOk,
  kInvalidArgument,    // the caller passed something that cannot work (usage)
  kDataError,          // a file or message is malformed, truncated or hostile
  kNotFound,           // a file, tensor or name does not exist
  kUnsupported,        // well formed, but this build or backend cannot do it
  kResourceExhausted,  // memory, pages or a budget ran out
  kCancelled,          // the user asked to stop
  kIoError,            // the operating system refused
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message)
      : state_(std::make_shared<const State>(State{code, std::move(message)})) {}

  bool ok() const { return state_ == nullptr; }
  StatusCode code() const { return ok() ? StatusCode::kOk : state_->code; }
  // Empty when OK.
  const std::string& message() const;

  // The same error with "context: " in front of the message; OK stays OK.
  Status with_context(const std::string& context) const;

 private:
  struct State {
    StatusCode code;
    std::string message;
  };
  std::shared_ptr<const State> state_;
};

Status invalid_argument(std::string message);
Status data_error(std::string message);
Status not_found(std::string message);
Status unsupported(std::string message);
Status resource_exhausted(std::string message);
Status cancelled(std::string message);
Status io_error(std::string message);

namespace internal {
[[noreturn]] void check_failed(const char* file, int line, const char* condition,
                               const std::string& message);
}  // namespace internal

// A value or the reason why there is none. value() on a failed Result is our own mistake: it
// aborts.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}         // NOLINT(google-explicit-constructor)
  Result(Status status) : status_(std::move(status)) {  // NOLINT(google-explicit-constructor)
    if (status_.ok()) internal::check_failed(__FILE__, __LINE__, "!status.ok()", "empty Result");
  }

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }

  T& value() & { return check(), *value_; }
  const T& value() const& { return check(), *value_; }
  T&& value() && { return check(), std::move(*value_); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  void check() const {
    if (!ok()) internal::check_failed(__FILE__, __LINE__, "Result::ok()", status_.message());
  }
  Status status_;
  std::optional<T> value_;
};

namespace internal {
inline const Status& status_of(const Status& status) { return status; }
template <typename T>
const Status& status_of(const Result<T>& result) {
  return result.status();
}
inline void take(Status&&) {}
template <typename T>
T take(Result<T>&& result) {
  return std::move(result).value();
}
}  // namespace internal

}  // namespace infllm

// Evaluates a Status or Result<T>; returns its Status from the enclosing function when it failed,
// otherwise yields the value (nothing for a Status). May stand inside another one's argument.
#define INFLLM_TRY(...) INFLLM_TRY_NUMBER(__COUNTER__, __VA_ARGS__)
#define INFLLM_TRY_NUMBER(number, ...) INFLLM_TRY_NAMED(number, __VA_ARGS__)  // expands it
#define INFLLM_TRY_NAMED(number, ...) INFLLM_TRY_AS(infllm_try_##number, __VA_ARGS__)
#define INFLLM_TRY_AS(result, ...)                                  \
  __extension__({                                                   \
    auto result = (__VA_ARGS__);                                    \
    if (!result.ok()) return ::infllm::internal::status_of(result); \
    ::infllm::internal::take(std::move(result));                    \
  })

// Our own invariants, in debug and release.
#define INFLLM_CHECK(condition, message)                                                         \
  do {                                                                                           \
    if (!(condition)) ::infllm::internal::check_failed(__FILE__, __LINE__, #condition, message); \
  } while (false)

// The same in debug builds only, for hot loops.
#ifdef NDEBUG
#define INFLLM_DCHECK(condition, message) static_cast<void>(0)
#else
#define INFLLM_DCHECK(condition, message) INFLLM_CHECK(condition, message)
#endif
