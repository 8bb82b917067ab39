// How fast threads read memory that is in no cache: the denominator of every bandwidth that the benchmarks print.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mpk {

// Bytes per second of the best of `rounds` passes of each kind over `bytes` of fresh memory, split evenly over threads.
double read_bandwidth(size_t bytes, uint32_t threads, int rounds);

}  // namespace mpk
