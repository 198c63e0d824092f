// SPDX-License-Identifier: Apache-2.0
// The Python face of mikernels._C: processor levels and measured peaks. Operators are registered by
// their own files, when this module is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/screen/screen.h"
#include "cpu/simd/levels.h"
#include "cpu/simd/peaks.h"

namespace py = pybind11;
using mik::Level;

namespace {

std::vector<std::string> supported_levels() {
  std::vector<std::string> names;
  for (int level = 0; level <= static_cast<int>(mik::best_level()); ++level)
    if (mik::is_supported(static_cast<Level>(level)))
      names.push_back(mik::level_name(static_cast<Level>(level)));
  return names;
}

void set_level(const std::string& name) {
  for (int level = 0; level <= static_cast<int>(mik::best_level()); ++level)
    if (name == mik::level_name(static_cast<Level>(level)) &&
        mik::is_supported(static_cast<Level>(level)))
      return mik::set_level(static_cast<Level>(level));
  throw std::invalid_argument("set_level: this processor has no level " + name);
}

py::dict measure_peaks(bool all_threads) {
  mik::Peaks peaks;
  {
    py::gil_scoped_release release;
    peaks = mik::measure_peaks(all_threads);
  }
  py::dict result;
  result["fma_gflops"] = peaks.fma_gflops;
  result["madd16_gops"] = peaks.madd16_gops;
  result["dot8_gops"] = peaks.dot8_gops;
  result["tile_gflops"] = peaks.tile_gflops;
  result["copy_gbs"] = peaks.copy_gbs;
  result["read_gbs"] = peaks.read_gbs;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("level", [] { return mik::level_name(mik::active_level()); });
  m.def("screened_pairs", [] {
    const mik::ScreenedSoFar so_far = mik::screened_so_far();
    return std::pair(so_far.coarse, so_far.fine);
  });
  m.def("set_level", &set_level);
  m.def("supported_levels", &supported_levels);
  m.def("measure_peaks", &measure_peaks, py::arg("all_threads") = true);
}
