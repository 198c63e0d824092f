// SPDX-License-Identifier: Apache-2.0
// Whether the kernels of this extension run on a device: the runtime knows, of the architectures
// that were built, which have code for it.
#include "cuda/device.h"

namespace mik::cuda {
namespace {

__global__ void probe_kernel() {}

bool cuda_runs(int64_t device) {
  int devices = 0;
  const bool seen = cudaGetDeviceCount(&devices) == cudaSuccess && device < devices;
  // an error that is answered here is nobody else's
  cudaGetLastError();
  if (!seen || aoti_torch_get_current_cuda_stream == nullptr) return false;
  const OnDevice on("cuda_runs", static_cast<int32_t>(device));
  cudaFuncAttributes found;
  const bool runs = cudaFuncGetAttributes(&found, probe_kernel) == cudaSuccess;
  cudaGetLastError();
  return runs;
}

MIK_DEFINE(m) { m.def("cuda_runs(int device) -> bool"); }

MIK_REGISTER(CompositeExplicitAutograd, m) { m.impl("cuda_runs", TORCH_BOX(&cuda_runs)); }

}  // namespace
}  // namespace mik::cuda
