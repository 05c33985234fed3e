// A stand-in for the part of ExecuTorch's C++ interface that examples/cpp_runner uses, for tests/export/runtime/
// test_cpp_runner.py. It has the same names, and no runtime behind them: module.h computes a toy language model.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

namespace executorch::aten {
enum class ScalarType { Float, Half, BFloat16, Long };
struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};
struct Half {
  _Float16 value;
  operator float() const { return static_cast<float>(value); }
};
class Tensor {
 public:
  Tensor(std::vector<int> sizes, ScalarType type, void* data) : sizes_(std::move(sizes)), type_(type), data_(data) {}
  long size(int dim) const { return sizes_.at(dim); }
  ScalarType scalar_type() const { return type_; }
  size_t nbytes() const {
    size_t bytes = type_ == ScalarType::Long ? 8 : type_ == ScalarType::Float ? 4 : 2;
    for (const int size : sizes_) bytes *= size;
    return bytes;
  }
  const void* const_data_ptr() const { return data_; }
  template <typename T>
  const T* const_data_ptr() const { return static_cast<const T*>(data_); }

 private:
  std::vector<int> sizes_;
  ScalarType type_;
  void* data_;
};
} // namespace executorch::aten

namespace executorch::extension {
using TensorPtr = std::shared_ptr<aten::Tensor>;
inline TensorPtr from_blob(void* data, std::vector<int> sizes, aten::ScalarType type) {
  return std::make_shared<aten::Tensor>(std::move(sizes), type, data);
}
} // namespace executorch::extension
