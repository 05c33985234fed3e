#pragma once
#include <executorch/runtime/backend/options.h>

namespace executorch::runtime {
inline std::string& options_of_backends() {
  static std::string text;
  return text;
}
inline Error set_option(const char* backend, const std::string& options) {
  options_of_backends() += std::string(backend) + " " + options;
  return Error::Ok;
}
} // namespace executorch::runtime
