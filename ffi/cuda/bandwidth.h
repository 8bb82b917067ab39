// The read-only stream of a device: what shares of its bandwidth are taken of.
#pragma once

#include <cstdint>
#include <string>

namespace mpk::cuda {

// Bytes per second at which `read_stream` of cuda/read.cu (its machine code in `cubin`) reads `bytes` of device memory:
// the fastest of `passes` launches, timed on the device. Allocates the memory, and frees it. 0 and the reason in `why`
// where it cannot.
double read_bandwidth(const std::string& cubin, uint64_t bytes, int passes, int device, std::string* why);

}  // namespace mpk::cuda
