// A CUDA device without any: enough of one for autograd to run on fake tensors with device="cuda" in a CPU build of
// torch. Its one stream does nothing. To be loaded before torch (LD_PRELOAD).
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <optional>

namespace c10::impl {

struct FakeCuda : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device first{DeviceType::CUDA, 0};
  Device exchangeDevice(Device) const override { return first; }
  Device getDevice() const override { return first; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, first); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, first); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

C10_REGISTER_GUARD_IMPL(CUDA, FakeCuda)

}  // namespace c10::impl

namespace at {

namespace accelerator {
// In the place of torch's own, which looks for an accelerator that this build of it was made for.
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
}  // namespace accelerator

struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at
