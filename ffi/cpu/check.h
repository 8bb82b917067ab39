// The parts of the loader that look at operators (check_ops.cc) and at their codes (check_code.cc).
#pragma once
#include "program.h"

namespace mpk {

// Inclusive ranges of loop variables, by axis. Never negative.
struct Ranges { int64_t lo[abi::MAX_AXES] = {}, hi[abi::MAX_AXES] = {}; };

// What is known about an operator while its accesses and codes are checked.
struct OpScope {
  Program& p;
  const size_t n;  // operator number
  const abi::Op& op;
  OpInfo& info;
  int32_t tile[abi::MAX_AXES] = {};                   // of scratch: what one run of a code covers along each axis
  int64_t act = 0, acc[MAX_ACC + 1] = {}, limit = 0;  // elements of scratch
};

// Records that checking may still visit: codes are shared, so a small program can be endless to check.
using CheckBudget = int64_t;

// The access names memory that the operator has and an element type, and its terms can be added up in 64 bits whatever
// the axes are inside of `r`. Enough for an INDEX, which forms no address.
void check_terms(const OpScope& s, const abi::Access& x, const Ranges& r, const char* what);

// Beyond that, every element of `x` is inside of its buffer or scratch, aligned, and may be stored to if `store`.
void check_access(const OpScope& s, const abi::Access& x, const Ranges& r, bool store, const char* what);

// Code `number`, run by this operator.
void check_code(OpScope& s, uint32_t number, CheckBudget& budget);

}  // namespace mpk
