#pragma once
#include <string>

namespace executorch::runtime {
enum class Error { Ok, Failed };
inline const char* to_string(Error error) { return error == Error::Ok ? "Ok" : "Failed"; }

template <int N>
struct BackendOptions {
  std::string text;
  Error set_option(const char* name, const char* value) {
    text += std::string(name) + "=" + value;
    return Error::Ok;
  }
  std::string view() const { return text; }
};
} // namespace executorch::runtime
