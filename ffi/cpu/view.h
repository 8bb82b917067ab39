// What a task body sees of a loaded program, and the scratch memory of the thread that runs it.
//
// Plain data without the standard library: this header is compiled into every instruction-set specific translation
// unit, where an inline function shared with the rest of the module would be a trap (the linker keeps one copy, and it
// may be the one with AVX-512 instructions). Everything here was checked by the loader (program.cc); bodies trust it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../abi.h"

namespace mpk {

constexpr int STRIP = 256;      // points a vector register
constexpr int MAX_ACC = 4;      // accumulators of a contraction
constexpr int PANEL_K = 128;    // rows of a packed panel of weights
constexpr int PANEL_N = 64;     // columns of the widest panel
constexpr int PANEL_ROWS = 12;  // rows of an activation that are prepared for dot products

// What the loader works out once per operator.
struct OpInfo {
  int32_t grid[abi::MAX_AXES];                   // tiles along each axis
  uint32_t tasks;                                // their product
  int32_t n_batch, n_m, n_n, n_k;                // CONTRACT; ATTENTION: batch, rows, -, -
  int64_t act_row, acc_row;                      // elements of a row of ACT and of ACC
  int64_t acc1_row;                              // ATTENTION: elements of a row of ACC1
  int64_t stride_n[MAX_ACC], stride_k[MAX_ACC];  // CONTRACT: flattened; ATTENTION: of keys [0] and values [1]
};

// And once per code: scalar registers, by bit, that its first stage leaves for the others, where that stage may run for
// many points at once: it is SCALAR, stores nothing, and reads nothing that the code stores. Otherwise 0.
struct CodeInfo { uint64_t ahead; };

struct View {
  const abi::Op* ops;
  const OpInfo* info;
  const abi::Code* codes;
  const CodeInfo* code_info;
  const abi::Stage* stages;
  const abi::Instr* instrs;
  const abi::Access* accesses;
};

// One per thread; sized by the program's largest task (Scratch is filled in by launch.cc).
struct Scratch {
  char* act;
  char* acc[MAX_ACC + 1];
  int32_t limit[16];
  float* panel;       // widened weights
  uint32_t* scalars;  // [MAX_REGS][LANES]: every lane of a scalar register holds the same bits
  uint32_t* vectors;  // [MAX_REGS][STRIP]
  uint32_t* spread;   // [MAX_REGS][STRIP]: scalar registers broadcast for a vector stage
  uint32_t* ahead;    // [MAX_REGS][STRIP]: scalar registers of coming points
  int64_t* base;      // per access of the running code: element offset of the current point
  char** origin;      // per access: address of the element at offset 0
  uint64_t* keys;     // SORT
  // ACT holds the prologue of these, or prologue == 0.
  uint32_t prologue;
  int64_t act_batch, act_m0, act_m1;
};

// Bodies say how much they have done, and every PULSE units (lanes of an instruction, multiply-adds: a few milliseconds)
// ask the launch whether they may go on. `check` throws when they may not: no body holds anything that unwinding would leak.
constexpr int64_t PULSE = int64_t{1} << 22;
struct Pulse {
  void (*check)(void* owner);
  void* owner;
  int64_t left = PULSE;
};

struct TaskContext {
  const View* view;
  char* const* slots;  // address of every slot, for the operands of this launch
  Scratch* scratch;
  Pulse* pulse;
};

// Provided once per instruction set (isa/*.cc).
struct Isa {
  const char* name;
  void (*run)(const TaskContext&, uint32_t op, uint32_t index);
};

// Outside the instruction-set specific units because it uses the standard library: positions of the first `count`
// elements in stable order, from keys already mapped to (ordered bits << 32 | position).
void sort_keys(uint64_t* keys, int64_t n, int64_t count);

}  // namespace mpk
