// SPDX-License-Identifier: Apache-2.0
// What Python imports, which is empty: everything that this library does is an operator of torch.
// Here are those that compute nothing: processor levels and measured peaks; the others are
// registered by their own files, when it is loaded. Operators rather than functions of Python, so
// that the module is within Python's limited API, which pybind11 (3.1) is not: one binary serves
// every CPython >= 3.10.
#include <Python.h>

#include <stdexcept>
#include <tuple>

#include "common.h"
#include "cpu/screen/screen.h"
#include "cpu/simd/levels.h"
#include "cpu/simd/peaks.h"

namespace {

using mik::Level;

int64_t cpu_level() { return static_cast<int64_t>(mik::active_level()); }

bool cpu_supports(int64_t level) {
  return level >= 0 && level <= static_cast<int64_t>(mik::best_level()) &&
         mik::is_supported(static_cast<Level>(level));
}

void set_cpu_level(int64_t level) {
  mik::check(cpu_supports(level), "set_cpu_level: this processor has no such level");
  mik::set_level(static_cast<Level>(level));
}

std::tuple<int64_t, int64_t> screened_pairs() {
  const mik::ScreenedSoFar so_far = mik::screened_so_far();
  return {so_far.coarse, so_far.fine};
}

std::tuple<double, double, double, double, double, double> measure_peaks(bool all_threads) {
  const mik::Peaks peaks = mik::measure_peaks(all_threads);
  return {peaks.fma_gflops,  peaks.madd16_gops, peaks.dot8_gops,
          peaks.tile_gflops, peaks.copy_gbs,    peaks.read_gbs};
}

MIK_DEFINE(m) {
  m.def("cpu_level() -> int");
  m.def("cpu_supports(int level) -> bool");
  m.def("set_cpu_level(int level) -> ()");
  m.def("screened_pairs() -> (int coarse, int fine)");
  m.def(
      "measure_peaks(bool all_threads) -> (float fma_gflops, float madd16_gops, float dot8_gops, "
      "float tile_gflops, float copy_gbs, float read_gbs)");
}

MIK_REGISTER(CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&cpu_level));
  m.impl("cpu_supports", TORCH_BOX(&cpu_supports));
  m.impl("set_cpu_level", TORCH_BOX(&set_cpu_level));
  m.impl("screened_pairs", TORCH_BOX(&screened_pairs));
  m.impl("measure_peaks", TORCH_BOX(&measure_peaks));
}

}  // namespace

// the builder of the extension names the module: _C, or Hugging Face's unique name
#define MIK_TEXT_OF(name) #name
#define MIK_TEXT(name) MIK_TEXT_OF(name)
#define MIK_INIT_OF(name) PyInit_##name
#define MIK_INIT(name) MIK_INIT_OF(name)

PyMODINIT_FUNC MIK_INIT(TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, MIK_TEXT(TORCH_EXTENSION_NAME), nullptr, -1,
                               nullptr};
  return PyModule_Create(&module);
}
