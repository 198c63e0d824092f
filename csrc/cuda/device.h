// SPDX-License-Identifier: Apache-2.0
// Torch glue for CUDA: the tensor's device, torch's current stream, checked launches.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "common.h"

// It lives in libtorch_cuda, which this extension is not linked to, so that one binary also loads
// where torch has no CUDA; weak, it is then null. Hidden, the linker would bind it to null for
// good.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace mik::cuda {

// For its lifetime this device, or that of a tensor, is current; `stream` is torch's current one on
// it.
class OnDevice {
 public:
  OnDevice(const char* op, const Tensor& tensor) : OnDevice(op, tensor.get_device_index()) {}
  OnDevice(const char* op, int32_t device) : op_(op), device_(device), guard_(device_) {
    check(aoti_torch_get_current_cuda_stream != nullptr,
          "mikernels: this torch has no CUDA (aoti_torch_get_current_cuda_stream is missing)");
    void* handle = nullptr;
    check(aoti_torch_get_current_cuda_stream(device_, &handle) == 0,
          "mikernels: torch gave no current CUDA stream");
    stream = static_cast<cudaStream_t>(handle);
    // the runtime is linked statically, so it may not have noticed what torch's own was told
    int current = -1;
    if (cudaGetDevice(&current) != cudaSuccess || current != device_) ok(cudaSetDevice(device_));
  }

  // throws what the launch before it reported
  void launched() const { ok(cudaGetLastError()); }

  int64_t multiprocessors() const {
    int count = 0;
    ok(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
    return count;
  }

  cudaStream_t stream;

 private:
  void ok(cudaError_t error) const {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(op_) + ": launch on cuda:" + std::to_string(device_) +
                             " failed: " + cudaGetErrorString(error) + " (" +
                             cudaGetErrorName(error) +
                             "); `mikernels info` shows which architectures were built");
  }

  const char* op_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace mik::cuda
