// Everything that is compiled once per instruction set. A unit in this directory defines MPK_ISA (a namespace) and
// MPK_W (floats a vector), is compiled with that instruction set's flags, and includes this. Nothing here may use an
// inline function of another header (see view.h).
#include "../view.h"

namespace mpk {
namespace MPK_ISA {
namespace {

typedef int64_t i64;
typedef uint64_t u64;

#include "math.h"
#include "memory.h"
#include "arithmetic.h"
#include "reduce.h"
#include "code.h"
#include "gemm.h"
#include "tasks.h"

}  // namespace

extern const Isa isa;
const Isa isa = {MPK_ISA_NAME, run_task};

}  // namespace MPK_ISA
}  // namespace mpk
