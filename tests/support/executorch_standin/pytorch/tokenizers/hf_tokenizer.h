// A stand-in for ExecuTorch's HFTokenizer: the ids are the bytes, less 64.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tokenizers {
enum class Error { Ok, Failed };
template <typename T>
class Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  bool ok() const { return value_.has_value(); }
  const T& operator*() const { return *value_; }
  const T* operator->() const { return &*value_; }

 private:
  std::optional<T> value_;
};
class HFTokenizer {
 public:
  Error load(const std::string&) { return Error::Ok; }
  Result<std::vector<uint64_t>> encode(const std::string& text, int8_t, int8_t) const {
    std::vector<uint64_t> ids;
    for (const char c : text) ids.push_back(uint64_t(c - 64));
    return ids;
  }
  Result<std::string> decode(uint64_t, uint64_t token) const { return std::string(1, char(token + 64)); }
};
} // namespace tokenizers
