// The XLA custom call target `jax_mpk_cpu`: attributes program (u8[]), hash (i64), deadline_ms (i64); operands and
// results are the program's, followed by the workspace u8[workspace] as a last result when the program has one.
#pragma once

namespace mpk {

extern const char* const kCpuTarget;
void* cpu_handler();
const int* ffi_version();  // {major, minor} of the headers that this module was built with

}  // namespace mpk
