// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/mass_threshold_body.h behind a C function.
#include "cuda/mass_threshold_body.h"

namespace mik::cuda {

alignas(16) unsigned char shared_bytes[emulator::SHARED_BYTES];

namespace {

struct Call {
  const void* x;
  int64_t n;
  double fraction;
  int32_t absolute, blocks;
  void* out;
  uint64_t order;
};

template <class Format>
std::string run(const Call& call) {
  using Bits = typename Format::Bits;
  MassScratch scratch = {};
  std::string message;
  const uint32_t blocks = mass_blocks<Format>(call.n, call.blocks);
  mass_threshold_kernels<Format>(blocks, [&](auto kernel, uint32_t grid) {
    if (!message.empty()) return;
    message = emulator::launch(grid, MASS_THREADS, shared_bytes, sizeof(MassWork), call.order, [&] {
      kernel(static_cast<const Bits*>(call.x), call.n, call.fraction, call.absolute, &scratch,
             static_cast<Bits*>(call.out));
    });
  });
  return message;
}

}  // namespace
}  // namespace mik::cuda

// format: 0 bf16, 1 fp16, 2 fp32; "" or what went wrong
extern "C" const char* mass_threshold(int format, const mik::cuda::Call* call) {
  using namespace mik::cuda;
  static std::string message;
  message = format == 0 ? run<Bf16>(*call) : format == 1 ? run<Fp16>(*call) : run<Fp32>(*call);
  return message.c_str();
}
