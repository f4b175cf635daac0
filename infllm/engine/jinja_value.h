// SPDX-License-Identifier: Apache-2.0
//
// The values of the template language: Python's, as far as templates see them. Values never change
// after they are made, but for namespaces; copying one copies a pointer.
//
// Templates come from outside, so every operation that could take long or grow large draws on a
// Budget and reports when it is spent. Containers know how deeply they nest and refuse to nest
// deeper than kMaxValueDepth, so that recursion over them is safe; only plain data goes into them,
// so that they form no cycles.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

namespace infllm::engine::jinja {

inline constexpr int kMaxValueDepth = 128;

// What a rendering may still spend. spend() is false once it is used up.
struct Budget {
  std::int64_t steps;
  std::int64_t bytes;
  bool spend(std::int64_t more_steps, std::int64_t more_bytes = 0) {
    steps -= more_steps + more_bytes / 256;
    bytes -= more_bytes;
    return steps >= 0 && bytes >= 0;
  }
};

struct List;
struct Dict;
struct Namespace;
struct Loop;
struct Function;

struct Undefined {
  std::shared_ptr<const std::string> name;  // what was looked for, for messages
};
struct None {};

class Value {
 public:
  Value() = default;                           // undefined
  Value(Undefined u) : data_(std::move(u)) {}  // NOLINT
  Value(None n) : data_(n) {}                  // NOLINT
  Value(bool b) : data_(b) {}                  // NOLINT
  Value(std::int64_t i) : data_(i) {}          // NOLINT
  Value(double d) : data_(d) {}                // NOLINT
  Value(std::string s)                         // NOLINT
      : data_(std::make_shared<const std::string>(std::move(s))) {}
  Value(const char*) = delete;                                       // would become a bool
  Value(std::shared_ptr<const List> l) : data_(std::move(l)) {}      // NOLINT
  Value(std::shared_ptr<const Dict> d) : data_(std::move(d)) {}      // NOLINT
  Value(std::shared_ptr<Namespace> n) : data_(std::move(n)) {}       // NOLINT
  Value(std::shared_ptr<Loop> l) : data_(std::move(l)) {}            // NOLINT
  Value(std::shared_ptr<const Function> f) : data_(std::move(f)) {}  // NOLINT

  bool is_undefined() const { return std::holds_alternative<Undefined>(data_); }
  bool is_none() const { return std::holds_alternative<None>(data_); }
  bool is_bool() const { return std::holds_alternative<bool>(data_); }
  bool is_int() const { return std::holds_alternative<std::int64_t>(data_); }
  bool is_float() const { return std::holds_alternative<double>(data_); }
  bool is_number() const { return is_bool() || is_int() || is_float(); }  // as in Python
  bool is_string() const { return std::holds_alternative<StringPtr>(data_); }
  bool is_data() const { return data_.index() <= kLastData; }  // may go into a container

  // The payload, null when the value is of another kind.
  const Undefined* undefined() const { return std::get_if<Undefined>(&data_); }
  const std::string* string() const { return pointee<const std::string>(); }
  const List* list() const { return pointee<const List>(); }
  const Dict* dict() const { return pointee<const Dict>(); }
  Namespace* name_space() const { return pointee<Namespace>(); }
  Loop* loop() const { return pointee<Loop>(); }
  const Function* function() const { return pointee<const Function>(); }
  // True and False count as 1 and 0, as in Python.
  std::optional<std::int64_t> integer() const;
  std::optional<double> number() const;

  // "str", "int", "list", ... for messages.
  const char* type_name() const;
  int depth() const;  // of nesting; 0 for what contains nothing

 private:
  using StringPtr = std::shared_ptr<const std::string>;
  static constexpr std::size_t kLastData = 7;

  template <typename T>
  T* pointee() const {
    const auto* pointer = std::get_if<std::shared_ptr<T>>(&data_);
    return pointer == nullptr ? nullptr : pointer->get();
  }

  std::variant<Undefined, None, bool, std::int64_t, double, StringPtr, std::shared_ptr<const List>,
               std::shared_ptr<const Dict>, std::shared_ptr<Namespace>, std::shared_ptr<Loop>,
               std::shared_ptr<const Function>>
      data_;
};

struct List {
  // A view is what dict.keys() and its kin return; a generator what map and select return.
  enum class Shape { kList, kTuple, kView, kGenerator };
  std::vector<Value> items;
  Shape shape = Shape::kList;
  int depth = 1;
};

struct Dict {
  std::vector<std::pair<std::string, Value>> items;  // in order of insertion
  int depth = 1;

  const Value* find(std::string_view key) const;
  void set(std::string_view key, Value value);  // only while it is being made

 private:
  std::unordered_map<std::string, std::size_t> index_;
};

struct Namespace {
  std::map<std::string, Value> values;
};

// The variable `loop` of a for statement.
struct Loop {
  std::vector<Value> items;
  std::int64_t index0 = 0;
  int depth0 = 0;
  std::optional<Value> last_changed;
};

struct MacroNode;
struct Scope;

// Something that can be called: a function of the language, a method bound to its object, or a
// macro.
struct Function {
  std::string name;
  std::optional<Value> self;         // of a method
  const MacroNode* macro = nullptr;  // of a macro
  Scope* scope = nullptr;            // where a macro looks for names; outlives the function
};

// Containers of plain data; nothing when an item is no data or the nesting would be too deep.
std::optional<Value> make_list(std::vector<Value> items, List::Shape shape = List::Shape::kList);
std::optional<Value> make_dict(Dict dict);

bool truthy(const Value& value);

// Python's ==; nothing when the budget is spent.
std::optional<bool> equal(const Value& a, const Value& b, Budget& budget);
// Python's <; nothing when the two have no order or the budget is spent.
std::optional<bool> less(const Value& a, const Value& b, Budget& budget);

// str() and repr(): false when the budget is spent or the value has no text of its own.
bool append_str(std::string& out, const Value& value, Budget& budget);
bool append_repr(std::string& out, const Value& value, Budget& budget);

struct JsonStyle {
  std::optional<std::int64_t> indent;
  std::string item_separator = ", ";
  std::string key_separator = ": ";
  bool sort_keys = false;
  bool ascii = false;
};
// json.dumps(); the same rule.
bool append_json(std::string& out, const Value& value, const JsonStyle& style, Budget& budget);

// repr() of a float: the shortest digits that give it back, in Python's notation.
std::string float_repr(double value);

}  // namespace infllm::engine::jinja
