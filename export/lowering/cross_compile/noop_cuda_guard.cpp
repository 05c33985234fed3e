// A CUDA device guard that does nothing, for builds of PyTorch without CUDA.
//
// Tracing with fake "cuda" tensors asks the dispatcher's device guard for the current device and stream.
// A CPU build has no guard for CUDA and aborts. Cross-compiling launches nothing, so a guard that always
// answers "device 0, default stream" is enough.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

struct NoopCudaGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static c10::Device device() {
    return c10::Device(c10::DeviceType::CUDA, 0);
  }
  static c10::Stream stream() {
    return c10::Stream(c10::Stream::DEFAULT, device());
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return device();
  }
  c10::Device getDevice() const override {
    return device();
  }
  c10::Stream getStream(c10::Device) const noexcept override {
    return stream();
  }
  c10::Stream getNewStream(c10::Device, int = 0) const override {
    return stream();
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return stream();
  }
};

c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new NoopCudaGuard());

} // namespace
