// What the extension module exports of the CUDA backend.
#pragma once

#include <nanobind/nanobind.h>

namespace mpk::cuda {

// Adds `cuda_handlers`, `cuda_state_type`, `cuda_check`, `cuda_streams` and `cuda_read_bandwidth` to the module. Touches no driver: works without a GPU.
void bind(nanobind::module_& m);

}  // namespace mpk::cuda
