// The XLA custom call target `jax_mpk_cpu`: attributes program (u8[]), deadline_ms (i64); operands and results are the
// program's, followed by the workspace u8[workspace] as a last result when the program has one.
#pragma once

namespace mpk {

extern const char* const kCpuTarget;
struct CpuHandlers { void *instantiate, *execute; };
CpuHandlers cpu_handlers();
const int* ffi_version();  // {major, minor} of the headers that this module was built with

}  // namespace mpk
