// The scratch memory of the calling thread.
#pragma once
#include "program.h"

namespace mpk {

// At least `size`; what it held is lost. Throws OutOfMemory, and is then as before.
Scratch& thread_scratch(const ScratchSize& size);

}  // namespace mpk
