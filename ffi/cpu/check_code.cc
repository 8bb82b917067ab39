// Checks accesses and codes: every address that a body can form is bounded here. An access is affine in axes whose ranges
// are known, plus clamped dynamic coordinates, so its extremes are known before anything runs.
#include <algorithm>
#include <cstdio>
#include <set>

#include "check.h"

namespace mpk {
namespace {

using abi::MAX_AXES;
constexpr int64_t kMaxStride = int64_t{1} << 40;  // elements; a buffer has at most that many bytes
constexpr int64_t kMaxOffset = int64_t{1} << 60;  // elements, of a sum of terms

class CodeChecker {
 public:
  CodeChecker(OpScope& s, uint32_t number, CheckBudget& budget)
      : s_(s), p_(s.p), c_(s.p.codes[number]), number_(number), budget_(budget) {}

  void run() {
    const abi::Op& op = s_.op;
    if (c_.n_axes != op.n_axes)
      program_error("code %u has %u axes, operator %zu has %u", number_, c_.n_axes, s_.n, op.n_axes);
    if (uint64_t{c_.stage} + c_.stages > p_.stages.size) program_error("code %u has stages beyond the end", number_);
    if (uint64_t{c_.access} + c_.accesses > p_.accesses.size)
      program_error("code %u has accesses beyond the end", number_);
    if (c_.axes >> op.n_axes) program_error("code %u loops over axes that operator %zu does not have", number_, s_.n);
    if (c_.vector < -1 || c_.vector >= op.n_axes || (c_.vector >= 0 && !(c_.axes >> c_.vector & 1)))
      program_error("code %u has vector axis %d", number_, c_.vector);
    if (c_.scalar_regs > abi::MAX_REGS || c_.vector_regs > abi::MAX_REGS)
      program_error("code %u has %u scalar and %u vector registers", number_, c_.scalar_regs, c_.vector_regs);
    spend(uint64_t{1} + c_.accesses);
    p_.scratch.accesses = std::max<int64_t>(p_.scratch.accesses, c_.accesses);
    bool runs = true;
    for (int a = 0; a < op.n_axes; ++a) {
      const bool loops = c_.axes >> a & 1;
      if (loops && (c_.lo[a] < 0 || c_.hi[a] < 0))
        program_error("code %u: axis %d goes from %d to %d", number_, a, c_.lo[a], c_.hi[a]);
      const int64_t lo = loops ? c_.lo[a] : 0;
      const int64_t hi = std::min(loops ? c_.hi[a] : op.extent[a], op.extent[a]) - 1;
      if (hi < lo) runs = false;
      const bool tiled = s_.tile[a] < op.extent[a];
      memory_.lo[a] = lo, memory_.hi[a] = loops ? hi : int64_t{s_.info.grid[a] - 1} * op.tile[a];
      if (!loops && static_cast<abi::Kind>(op.kind) != abi::Kind::ROWS)
        memory_.hi[a] = tiled ? op.extent[a] - 1 : memory_.hi[a];
      scratch_.lo[a] = tiled || !loops ? 0 : lo, scratch_.hi[a] = !loops ? 0 : tiled ? s_.tile[a] - 1 : hi;
    }
    if (!runs) return;
    for (uint32_t j = 0; j < c_.accesses; ++j)
      check_terms(s_, p_.accesses[c_.access + j], memory_, what("code", number_));
    for (uint32_t i = c_.stage; i < c_.stage + c_.stages; ++i) first_ = i == c_.stage, stage(i);
    p_.code_info[number_].ahead &= ahead();
  }

 private:
  OpScope& s_;
  Program& p_;
  const abi::Code& c_;
  const uint32_t number_;
  CheckBudget& budget_;
  Ranges memory_, scratch_;             // absolute, and relative to the start of a task's range
  uint64_t scalars_ = 0, vectors_ = 0;  // registers that have a value, by bit
  // For CodeInfo: what the first stage writes and loads, what the others use and store.
  bool first_ = true, may_ = false;
  uint64_t written_ = 0, used_ = 0;
  std::set<uint64_t> loaded_, stored_;
  char text_[48];

  const char* what(const char* kind, uint32_t number) {
    std::snprintf(text_, sizeof text_, "%s %u", kind, number);
    return text_;
  }

  void spend(uint64_t records) {
    budget_ -= static_cast<int64_t>(records);
    if (budget_ < 0) program_error("operator %zu: its codes are too long together", s_.n);
  }

  static bool stores(abi::Opcode o) { return o >= abi::Opcode::STORE && o <= abi::Opcode::STORE_MIN; }

  // See CodeInfo.
  uint64_t ahead() const {
    if (!may_) return 0;
    for (uint64_t m : loaded_)
      if (stored_.count(m)) return 0;
    return written_ & used_;
  }

  void stage(uint32_t number) {
    const abi::Stage& s = p_.stages[number];
    if (uint64_t{s.first} + s.count > p_.instrs.size) program_error("stage %u has instructions beyond the end", number);
    if (s.kind > static_cast<uint8_t>(abi::StageKind::VECTOR)) program_error("stage %u has kind %u", number, s.kind);
    const auto kind = static_cast<abi::StageKind>(s.kind);
    if (kind == abi::StageKind::VECTOR && c_.vector < 0) program_error("stage %u: the code has no vector axis", number);
    vectors_ = 0;
    if (first_) may_ = kind == abi::StageKind::SCALAR;
    const bool runs = kind != abi::StageKind::REDUCE || reduction(number, s);
    spend(uint64_t{1} + s.count);
    if (runs)
      for (uint32_t i = s.first; i < s.first + s.count; ++i) instr(i, kind == abi::StageKind::SCALAR);
    if (kind != abi::StageKind::REDUCE) return;
    if (runs) read(s.src, "stage", number);
    const bool position = s.reduce >= static_cast<uint8_t>(abi::ReduceOp::ARGMAX);
    if (s.dst & abi::VECTOR_REG) program_error("stage %u reduces to a vector register", number);
    if (s.flags & abi::ACCUMULATE && !position) read(s.dst, "stage", number);
    write(s.dst, "stage", number);
    for (int j = 0; j < s.axes; ++j)
      memory_.lo[s.axis + j] = memory_.hi[s.axis + j] = scratch_.lo[s.axis + j] = scratch_.hi[s.axis + j] = 0;
  }

  // Sets the ranges of the reduction axes; false when there is nothing to reduce.
  bool reduction(uint32_t number, const abi::Stage& s) {
    if (!s.axes || s.axes > 4 || s.axis < c_.n_axes || s.axis + s.axes > static_cast<int>(MAX_AXES))
      program_error("stage %u reduces axes %u to %u", number, s.axis, s.axis + s.axes - 1);
    if (s.reduce > static_cast<uint8_t>(abi::ReduceOp::ARGMIN))
      program_error("stage %u has reduction %u", number, s.reduce);
    const auto dt = static_cast<abi::Dtype>(s.dtype);
    if (dt != abi::Dtype::F32 && dt != abi::Dtype::I32 && dt != abi::Dtype::U32 && dt != abi::Dtype::BOOL)
      program_error("stage %u reduces element type %u", number, s.dtype);
    int64_t points = 1;
    for (int j = 0; j < s.axes; ++j) {
      if (s.hi[j] < s.lo[j] || s.lo[j] < 0) program_error("stage %u has range %d to %d", number, s.lo[j], s.hi[j]);
      points *= s.hi[j] - s.lo[j];
      if (points > int64_t{1} << 31) program_error("stage %u reduces too many points", number);
      memory_.lo[s.axis + j] = scratch_.lo[s.axis + j] = s.lo[j];
      memory_.hi[s.axis + j] = scratch_.hi[s.axis + j] = std::max(s.hi[j] - 1, 0);
    }
    return points > 0;
  }

  void read(uint16_t r, const char* kind, uint32_t number) {
    const bool vector = r & abi::VECTOR_REG;
    const uint32_t i = r & ~abi::VECTOR_REG;
    if (i >= (vector ? c_.vector_regs : c_.scalar_regs)) program_error("%s %u names register %#x", kind, number, r);
    if (!((vector ? vectors_ : scalars_) >> i & 1))
      program_error("%s %u reads register %#x, which has no value", kind, number, r);
    if (!vector && !first_) used_ |= uint64_t{1} << i;
  }

  void write(uint16_t r, const char* kind, uint32_t number) {
    const bool vector = r & abi::VECTOR_REG;
    const uint32_t i = r & ~abi::VECTOR_REG;
    if (i >= (vector ? c_.vector_regs : c_.scalar_regs)) program_error("%s %u names register %#x", kind, number, r);
    (vector ? vectors_ : scalars_) |= uint64_t{1} << i;
    if (!vector && first_) written_ |= uint64_t{1} << i;
  }

  void instr(uint32_t number, bool scalar) {
    using abi::Opcode;
    const abi::Instr& i = p_.instrs[number];
    if (i.op >= sizeof abi::ARITY) program_error("instruction %u has opcode %u", number, i.op);
    const auto o = static_cast<Opcode>(i.op);
    const auto operand = [&](uint16_t r) {
      if (scalar && r & abi::VECTOR_REG)
        program_error("instruction %u names register %#x in a scalar stage", number, r);
      read(r, "instruction", number);
    };
    const uint16_t operands[] = {i.a, i.b, i.c};
    for (int j = 0; j < abi::ARITY[i.op]; ++j) operand(operands[j]);
    if (o == Opcode::LOAD || o == Opcode::INDEX || stores(o)) {
      if (i.aux >= c_.accesses) program_error("instruction %u names access %u of %u", number, i.aux, c_.accesses);
      const abi::Access& x = p_.accesses[c_.access + i.aux];
      const Ranges& r = x.slot >= abi::SLOT_ACT ? scratch_ : memory_;
      if (o == Opcode::INDEX) {
        check_terms(s_, x, memory_, what("instruction", number));
      } else {
        if (x.n_dyn > abi::MAX_DYN) program_error("instruction %u: %u dynamic coordinates", number, x.n_dyn);
        for (int d = 0; d < x.n_dyn; ++d) operand(x.dyn_reg[d]);
        check_access(s_, x, r, stores(o), what("instruction", number));
        const uint64_t memory = x.slot >= abi::SLOT_ACT ? uint64_t{x.slot} << 32 : p_.slots[s_.op.slot + x.slot].buffer;
        if (first_ && stores(o)) may_ = false;
        if (first_ || stores(o)) (stores(o) ? stored_ : loaded_).insert(memory);
      }
    }
    if (stores(o)) return;
    if (scalar == bool(i.dst & abi::VECTOR_REG))
      program_error("instruction %u writes register %#x in a %s stage", number, i.dst, scalar ? "scalar" : "vector");
    write(i.dst, "instruction", number);
  }
};

}  // namespace

void check_terms(const OpScope& s, const abi::Access& x, const Ranges& r, const char* what) {
  if (x.dtype >= sizeof abi::DTYPE_BYTES) program_error("operator %zu: %s has element type %u", s.n, what, x.dtype);
  const bool scratch = x.slot == abi::SLOT_ACT || x.slot == abi::SLOT_LIMIT ||
                       (x.slot >= abi::SLOT_ACC && x.slot <= abi::SLOT_ACC + MAX_ACC);
  if (!scratch && x.slot >= s.op.slots)
    program_error("operator %zu: %s names slot %u of %u", s.n, what, x.slot, s.op.slots);
  const auto size = [](int64_t v) { return v < 0 ? -static_cast<__int128>(v) : static_cast<__int128>(v); };
  __int128 sum = size(x.offset);
  bool wide = sum > kMaxOffset;
  for (uint32_t a = 0; a < MAX_AXES; ++a)
    sum += size(x.stride[a]) * r.hi[a], wide = wide || size(x.stride[a]) > kMaxStride;
  for (int d = 0; d < x.n_dyn && d < static_cast<int>(abi::MAX_DYN); ++d) {
    if (x.dyn_limit[d] < 0)
      program_error("operator %zu: %s has a dynamic coordinate up to %d", s.n, what, x.dyn_limit[d]);
    sum += size(x.dyn_stride[d]) * x.dyn_limit[d], wide = wide || size(x.dyn_stride[d]) > kMaxStride;
  }
  if (wide || sum > kMaxOffset)
    program_error("operator %zu: %s has an access with strides or an offset beyond any buffer", s.n, what);
}

void check_access(const OpScope& s, const abi::Access& x, const Ranges& r, bool store, const char* what) {
  check_terms(s, x, r, what);
  int64_t lo = x.offset, hi = x.offset;
  for (uint32_t a = 0; a < MAX_AXES; ++a) {
    const int64_t u = x.stride[a] * r.lo[a], v = x.stride[a] * r.hi[a];
    lo += std::min(u, v), hi += std::max(u, v);
  }
  for (int d = 0; d < x.n_dyn; ++d) {
    const int64_t v = x.dyn_stride[d] * x.dyn_limit[d];
    lo += std::min<int64_t>(v, 0), hi += std::max<int64_t>(v, 0);
  }
  const int size = abi::DTYPE_BYTES[x.dtype];
  lo *= size, hi *= size;  // at most 2^62
  int64_t bytes;
  if (x.slot >= abi::SLOT_ACT) {
    if (size != 4) program_error("operator %zu: %s is a scratch access of %d bytes", s.n, what, size);
    bytes = 4 * (x.slot == abi::SLOT_ACT ? s.act : x.slot == abi::SLOT_LIMIT ? s.limit : s.acc[x.slot - abi::SLOT_ACC]);
  } else {
    const abi::Slot& slot = s.p.slots[s.op.slot + x.slot];
    const abi::Buffer& b = s.p.buffers[slot.buffer];
    const auto space = static_cast<abi::Space>(b.space);
    if (store && (space == abi::Space::ARG || space == abi::Space::CONST))
      program_error("operator %zu: %s stores to an operand or a constant", s.n, what);
    if (slot.offset % size) program_error("operator %zu: %s is not aligned", s.n, what);
    bytes = static_cast<int64_t>(b.bytes);
    lo += slot.offset, hi += slot.offset;
  }
  if (lo < 0 || hi + size > bytes)
    program_error("operator %zu: %s reaches bytes %lld to %lld of %lld", s.n, what, (long long)lo,
                  (long long)(hi + size), (long long)bytes);
}

void check_code(OpScope& s, uint32_t number, CheckBudget& budget) { CodeChecker(s, number, budget).run(); }

}  // namespace mpk
