// Everything that is compiled once per instruction set. A unit in this directory defines MPK_ISA (a namespace) and
// MPK_W (floats a vector), is compiled with that instruction set's flags, and includes this. Nothing here may use an
// inline function of another header (see view.h).
#if defined(__SSE2__)
#include <immintrin.h>  // intrinsics are always inlined: no copy of them is left for the linker
#endif

#include "../view.h"

namespace mpk {
namespace MPK_ISA {
namespace {

typedef int64_t i64;
typedef uint64_t u64;

// An address that only becomes one of an element with the rest of its offset.
static inline char* moved(char* p, i64 bytes) {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes));
}

static inline void spend(Pulse& p, i64 work) {
  if ((p.left -= work) > 0) return;
  p.left = PULSE;
  p.check(p.owner);
}

#include "math.h"
#include "memory.h"
#include "arithmetic.h"
#include "reduce.h"
#include "code.h"
#include "gemm.h"
#include "gemm_int.h"
#include "scan.h"
#include "tasks.h"

}  // namespace

extern const Isa isa;
const Isa isa = {MPK_ISA_NAME, run_task};

}  // namespace MPK_ISA
}  // namespace mpk
