// A toy language model with caches, in integers, so that a Python twin (ToyProgram of test_cpp_runner.py) gives the same
// numbers. model.pte is text: "constant NAME VALUE..." or "method NAME INPUTS". Each call adds a line to calls.txt.
#pragma once
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/interface.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <unordered_set>

namespace executorch::runtime {
struct EValue {
  long number = 0;
  extension::TensorPtr tensor;
  EValue(long value) : number(value) {}
  EValue(extension::TensorPtr value) : tensor(std::move(value)) {}
  long toInt() const { return number; }
  const aten::Tensor& toTensor() const { return *tensor; }
};

template <typename T>
struct Result {
  Error error_;
  T value;
  Result(Error error) : error_(error) {}
  Result(T held) : error_(Error::Ok), value(std::move(held)) {}
  Error error() const { return error_; }
  T& operator*() { return value; }
  const T& operator*() const { return value; }
  const T* operator->() const { return &value; }
};
} // namespace executorch::runtime

namespace executorch::extension {
using runtime::Error, runtime::EValue, runtime::Result;
using aten::ScalarType;

struct MethodMeta {
  size_t inputs = 0;
  size_t num_inputs() const { return inputs; }
};

class Module {
 public:
  enum class LoadMode { Mmap };
  Module(const std::string& program, const std::string&, LoadMode) : path_(program) {}

  Error load() {
    std::ifstream in(path_);
    for (std::string line; std::getline(in, line);) {
      std::istringstream words(line);
      std::string kind, name;
      words >> kind >> name;
      std::vector<long>& values = kind == "method" ? methods_[name] : constants_[name];
      for (long value; words >> value;) values.push_back(value);
    }
    calls_.open(path_.substr(0, path_.rfind('/')) + "/calls.txt");
    return methods_.empty() ? Error::Failed : Error::Ok;
  }

  Result<std::unordered_set<std::string>> method_names() {
    std::unordered_set<std::string> names;
    for (const auto& [name, values] : constants_) names.insert(name);
    for (const auto& [name, values] : methods_) names.insert(name);
    return names;
  }

  Result<MethodMeta> method_meta(const std::string& name) { return MethodMeta{size_t(methods_.at(name).at(0))}; }

  Error load_method(const std::string& name) {
    calls_ << "load " << name << " [" << runtime::options_of_backends() << "]" << std::endl;
    return Error::Ok;
  }

  Result<std::vector<EValue>> execute(const std::string& name, const std::vector<EValue>& inputs) {
    if (constants_.count(name)) return std::vector<EValue>(constants_[name].begin(), constants_[name].end());
    const auto& tokens = inputs.front().toTensor();
    const auto& positions = inputs.back().toTensor();
    const long count = tokens.size(1), start = positions.const_data_ptr<long>()[0];
    std::vector<long> ids(tokens.const_data_ptr<long>(), tokens.const_data_ptr<long>() + count);
    calls_ << name << " " << start;
    for (const long id : ids) calls_ << " " << id;
    calls_ << std::endl;
    if (start < 0 || start + count > constants_["get_max_context_len"][0]) return Error::Failed;
    for (long i = 0; i < count; i++)
      if (positions.const_data_ptr<long>()[i] != start + i) return Error::Failed;
    if (name == "draft_decode") return draft(ids, inputs[1].toTensor(), start);
    if (start > 0 && !target_.count(start - 1)) return Error::Failed;
    std::vector<float> logits, features;
    for (long i = 0; i < count; i++) {
      const long at = start + i, before = at ? target_[at - 1] : 1;
      target_[at] = next(before, ids[i]);
      if (name == "target_verify" || i + 1 == count) {
        const auto row = scores(target_[at]);
        logits.insert(logits.end(), row.begin(), row.end());
      }
      features.insert(features.end(), {float(at), float(target_[at])});
    }
    const int vocabulary = int(constants_["get_vocab_size"][0]), rows = int(logits.size()) / vocabulary;
    return std::vector<EValue>{output(name + " logits", logits, {1, rows, vocabulary}, dtype()),
                               output(name + " features", features, {1, int(count), 2}, ScalarType::Float)};
  }

 private:
  std::string path_;
  std::ofstream calls_;
  std::map<std::string, std::vector<long>> constants_, methods_;
  std::map<long, long> target_, draft_;
  std::map<std::string, std::vector<uint8_t>> memory_;

  bool constant_scores() { return constants_.count("toy_constant") > 0; }
  long next(long before, long token) { return constant_scores() ? 5 : (before * 31 + token + 7) % 997; }

  std::vector<float> scores(long state) {
    std::vector<float> row;
    const float scale = constant_scores() ? 1 / 128.0f : 1.0f;
    for (long v = 1; v <= constants_["get_vocab_size"][0]; v++)
      row.push_back(scale * float((state % 250 + 1) * v * 37 % 251));
    return row;
  }

  ScalarType dtype() {
    const auto found = constants_.find("toy_bits");
    if (found == constants_.end()) return ScalarType::Float;
    return found->second[0] == 16 ? ScalarType::Half : ScalarType::BFloat16;
  }

  Result<std::vector<EValue>> draft(const std::vector<long>& ids, const aten::Tensor& features, long start) {
    if (start > 0 && !draft_.count(start - 1)) return Error::Failed;
    if (features.size(1) != long(ids.size())) return Error::Failed;
    long state = 0;
    for (size_t i = 0; i < ids.size(); i++) {
      const long at = start + long(i);
      const float* feature = features.const_data_ptr<float>() + 2 * i;
      if (long(feature[0]) != at) return Error::Failed;
      const long held = long(feature[1]);
      draft_[at] = ((at ? draft_[at - 1] : 1) * 17 + ids[i] + held * 3) % 499;
      state = next(held, ids[i]);
    }
    const long end = start + long(ids.size());
    const auto row = scores(state);
    const long best = std::max_element(row.begin(), row.end()) - row.begin();
    const long proposal = draft_[end - 1] % 3 ? best : (best + 1) % long(row.size());
    const std::vector<float> feature = {float(end), float(state)};
    auto& bytes = memory_["proposal"];
    bytes.resize(8);
    std::memcpy(bytes.data(), &proposal, 8);
    return std::vector<EValue>{from_blob(bytes.data(), {1, 1}, ScalarType::Long),
                               output("feature", feature, {1, 1, 2}, ScalarType::Float)};
  }

  // A result in memory that the next call of the same method overwrites, as in the runtime.
  EValue output(const std::string& name, const std::vector<float>& values, std::vector<int> sizes, ScalarType type) {
    auto& bytes = memory_[name];
    bytes.resize(4 * values.size());
    for (size_t i = 0; i < values.size(); i++) {
      uint32_t wide;
      std::memcpy(&wide, &values[i], 4);
      const _Float16 half = static_cast<_Float16>(values[i]);
      if (type == ScalarType::Float) std::memcpy(bytes.data() + 4 * i, &wide, 4);
      else if (type == ScalarType::Half) std::memcpy(bytes.data() + 2 * i, &half, 2);
      else std::memcpy(bytes.data() + 2 * i, reinterpret_cast<char*>(&wide) + 2, 2);
    }
    return from_blob(bytes.data(), std::move(sizes), type);
  }
};
} // namespace executorch::extension
