// Checks operators and their codes, and derives what bodies need (OpInfo) and how much scratch.
//
// Every address that a body can form is bounded here: an access is affine in axes whose ranges are known, plus clamped
// dynamic coordinates, so its extremes are known before anything runs. This is what makes a damaged program an error
// message instead of a crash.
#include <algorithm>

#include "program.h"

namespace mpk {
namespace {

using abi::MAX_AXES;
constexpr int64_t kMaxScratch = int64_t{1} << 31;

// Inclusive ranges of all axes of a code: what the checker knows about loop variables.
struct Ranges {
  int64_t lo[MAX_AXES] = {}, hi[MAX_AXES] = {};
};

struct OpChecker {
  Program& p;
  const size_t n;  // operator number
  const abi::Op& op;
  OpInfo& info;
  int32_t tile[MAX_AXES];      // of scratch: what one run of a code covers along each axis
  int64_t act = 0, acc[MAX_ACC + 1] = {}, limit = 0;  // elements of scratch

  OpChecker(Program& program, size_t number) : p(program), n(number), op(program.ops[number]), info(program.info[number]) {}

  void run() {
    if (op.n_axes > MAX_AXES) program_error("operator %zu has %u axes", n, op.n_axes);
    if (uint64_t{op.slot} + op.slots > p.slots.size) program_error("operator %zu has slots beyond the end", n);
    if (uint64_t{op.access} + op.accesses > p.accesses.size) program_error("operator %zu has accesses beyond the end", n);
    int64_t tasks = 1;
    for (int a = 0; a < op.n_axes; ++a) {
      if (op.extent[a] < 1 || op.tile[a] < 1 || op.extent[a] > static_cast<int32_t>(abi::MAX_EXTENT))
        program_error("operator %zu: axis %d has extent %d and tile %d", n, a, op.extent[a], op.tile[a]);
      info.grid[a] = (op.extent[a] - 1) / op.tile[a] + 1;
      tile[a] = std::min(op.tile[a], op.extent[a]);
      tasks *= info.grid[a];
      if (tasks > 1 << 30) program_error("operator %zu has too many tasks", n);
    }
    info.tasks = static_cast<uint32_t>(tasks);
    switch (static_cast<abi::Kind>(op.kind)) {
      case abi::Kind::NOP: return;
      case abi::Kind::ROWS: roles({abi::Role::MAIN}); return;
      case abi::Kind::CONTRACT: contract(); return;
      case abi::Kind::ATTENTION: attention(); return;
      case abi::Kind::SORT: sort(); return;
    }
    program_error("operator %zu has kind %u", n, op.kind);
  }

  int64_t param(abi::Param which) const { return op.params[static_cast<int>(which)]; }

  int32_t count(abi::Param which) const {
    const int64_t v = param(which);
    if (v < 0 || v > MAX_AXES) program_error("operator %zu: parameter %d is %lld", n, static_cast<int>(which), (long long)v);
    return static_cast<int32_t>(v);
  }

  const abi::Access& core_access(int64_t index) const {
    if (index < 0 || index >= op.accesses) program_error("operator %zu: core access %lld of %u", n, (long long)index, op.accesses);
    const abi::Access& x = p.accesses[op.access + index];
    if (x.n_dyn) program_error("operator %zu: a core access has dynamic coordinates", n);
    if (x.slot >= abi::SLOT_ACT) program_error("operator %zu: a core access is to scratch", n);
    return x;
  }

  int64_t product(const int32_t* v, int from, int to) const {
    int64_t out = 1;
    for (int a = from; a < to; ++a) {
      out *= v[a];
      if (out > kMaxScratch) program_error("operator %zu: a task is too large", n);
    }
    return out;
  }

  int64_t scratch_elements(int64_t rows, int64_t row) const {
    if (rows > kMaxScratch / 4 || row > kMaxScratch / 4 || rows * row > kMaxScratch / 4)
      program_error("operator %zu: a task needs too much scratch", n);
    return rows * row;
  }

  // A task's range of the flattened axes [from, to) must be contiguous: single steps, one tiled axis, whole axes.
  void contiguous(int from, int to, const char* what) const {
    int a = from;
    while (a < to && tile[a] == 1) ++a;
    for (++a; a < to; ++a)
      if (tile[a] != op.extent[a]) program_error("operator %zu: %s axis %d is tiled behind another one", n, what, a);
  }

  void whole(int from, int to, const char* what) const {
    for (int a = from; a < to; ++a)
      if (tile[a] != op.extent[a]) program_error("operator %zu: %s axis %d is tiled", n, what, a);
  }

  // The one stride to which axes [from, to) of an access flatten; 0 when there is a single element.
  int64_t flat(const abi::Access& x, int from, int to) const {
    int64_t stride = 0, next = 0;
    bool inner = true;
    for (int a = to - 1; a >= from; --a) {
      if (op.extent[a] == 1) continue;
      if (inner) stride = x.stride[a], inner = false;
      else if (x.stride[a] != next) program_error("operator %zu: axis %d of a core access does not flatten", n, a);
      if (__builtin_mul_overflow(x.stride[a], int64_t{op.extent[a]}, &next)) program_error("operator %zu: stride overflow", n);
    }
    return stride;
  }

  Ranges extents(std::initializer_list<std::pair<int, int>> parts) const {
    Ranges r;
    for (auto [from, to] : parts)
      for (int a = from; a < to; ++a) r.hi[a] = op.extent[a] - 1;
    return r;
  }

  void bounds(const abi::Access& x, const Ranges& r, bool store, const char* what) const {
    __int128 lo = x.offset, hi = x.offset;
    for (uint32_t a = 0; a < MAX_AXES; ++a) {
      const __int128 u = __int128{x.stride[a]} * r.lo[a], v = __int128{x.stride[a]} * r.hi[a];
      lo += std::min(u, v), hi += std::max(u, v);
    }
    for (int d = 0; d < x.n_dyn; ++d) {
      const __int128 v = __int128{x.dyn_stride[d]} * x.dyn_limit[d];
      lo += std::min(v, __int128{0}), hi += std::max(v, __int128{0});
    }
    const int size = dtype_bytes(x.dtype);
    if (!size) program_error("operator %zu: %s has element type %u", n, what, x.dtype);
    __int128 bytes;
    if (x.slot >= abi::SLOT_ACT) {
      const uint32_t j = x.slot - abi::SLOT_ACC;
      const int64_t elements = x.slot == abi::SLOT_ACT ? act : x.slot == abi::SLOT_LIMIT ? limit : j <= MAX_ACC ? acc[j] : 0;
      if (size != 4) program_error("operator %zu: %s is a scratch access of %d bytes", n, what, size);
      bytes = __int128{elements} * 4;
      lo *= size, hi *= size;
    } else {
      if (x.slot >= op.slots) program_error("operator %zu: %s names slot %u of %u", n, what, x.slot, op.slots);
      const abi::Slot& s = p.slots[op.slot + x.slot];
      const abi::Buffer& b = p.buffers[s.buffer];
      const auto space = static_cast<abi::Space>(b.space);
      if (store && (space == abi::Space::ARG || space == abi::Space::CONST))
        program_error("operator %zu: %s stores to an operand or a constant", n, what);
      if (s.offset % size) program_error("operator %zu: %s is not aligned", n, what);
      bytes = b.bytes;
      lo = lo * size + s.offset, hi = hi * size + s.offset;
    }
    if (lo < 0 || hi + size > bytes)
      program_error("operator %zu: %s reaches bytes %lld to %lld of %lld", n, what, (long long)lo, (long long)(hi + size),
                    (long long)bytes);
  }

  void roles(std::initializer_list<abi::Role> which) {
    for (abi::Role role : which) {
      const int r = static_cast<int>(role);
      if (uint64_t{op.code[r]} + op.codes[r] > p.codes.size) program_error("operator %zu: role %d has codes beyond the end", n, r);
      for (uint32_t c = op.code[r]; c < op.code[r] + op.codes[r]; ++c) code(c);
    }
  }

  void code(uint32_t number) {
    const abi::Code& c = p.codes[number];
    if (c.n_axes != op.n_axes) program_error("code %u has %u axes, operator %zu has %u", number, c.n_axes, n, op.n_axes);
    if (uint64_t{c.stage} + c.stages > p.stages.size) program_error("code %u has stages beyond the end", number);
    if (uint64_t{c.access} + c.accesses > p.accesses.size) program_error("code %u has accesses beyond the end", number);
    if (c.axes >> op.n_axes) program_error("code %u loops over axes that operator %zu does not have", number, n);
    if (c.vector < -1 || c.vector >= op.n_axes || (c.vector >= 0 && !(c.axes >> c.vector & 1)))
      program_error("code %u has vector axis %d", number, c.vector);
    p.scratch.accesses = std::max<int64_t>(p.scratch.accesses, c.accesses);
    Ranges memory, scratch;  // absolute, and relative to the start of a task's range
    for (int a = 0; a < op.n_axes; ++a) {
      const bool loops = c.axes >> a & 1;
      const int64_t lo = std::max<int64_t>(loops ? c.lo[a] : 0, 0);
      const int64_t hi = std::min<int64_t>(loops ? c.hi[a] : op.extent[a], op.extent[a]) - 1;
      if (hi < lo) return;  // never runs
      const bool tiled = tile[a] < op.extent[a];
      memory.lo[a] = lo, memory.hi[a] = loops ? hi : int64_t{info.grid[a] - 1} * op.tile[a];
      if (!loops && static_cast<abi::Kind>(op.kind) != abi::Kind::ROWS) memory.hi[a] = tiled ? op.extent[a] - 1 : memory.hi[a];
      scratch.lo[a] = tiled ? 0 : lo, scratch.hi[a] = !loops ? 0 : tiled ? tile[a] - 1 : hi;
      if (!loops) scratch.lo[a] = 0;
    }
    for (uint32_t s = c.stage; s < c.stage + c.stages; ++s) stage(c, s, memory, scratch);
  }

  void stage(const abi::Code& c, uint32_t number, Ranges memory, Ranges scratch) {
    const abi::Stage& s = p.stages[number];
    if (uint64_t{s.first} + s.count > p.instrs.size) program_error("stage %u has instructions beyond the end", number);
    const auto kind = static_cast<abi::StageKind>(s.kind);
    if (s.kind > static_cast<uint8_t>(abi::StageKind::VECTOR)) program_error("stage %u has kind %u", number, s.kind);
    if (kind == abi::StageKind::VECTOR && c.vector < 0) program_error("stage %u: the code has no vector axis", number);
    if (kind == abi::StageKind::REDUCE) {
      if (!s.axes || s.axes > 4 || s.axis < c.n_axes || s.axis + s.axes > MAX_AXES)
        program_error("stage %u reduces axes %u to %u", number, s.axis, s.axis + s.axes - 1);
      if (s.reduce > static_cast<uint8_t>(abi::ReduceOp::ARGMIN)) program_error("stage %u has reduction %u", number, s.reduce);
      const auto dt = static_cast<abi::Dtype>(s.dtype);
      if (dt != abi::Dtype::F32 && dt != abi::Dtype::I32 && dt != abi::Dtype::U32 && dt != abi::Dtype::BOOL)
        program_error("stage %u reduces element type %u", number, s.dtype);
      if ((s.src & ~abi::VECTOR_REG) >= abi::MAX_REGS || s.dst >= abi::MAX_REGS) program_error("stage %u has registers beyond the end", number);
      int64_t points = 1;
      for (int j = 0; j < s.axes; ++j) {
        if (s.hi[j] < s.lo[j] || s.lo[j] < 0) program_error("stage %u has range %d to %d", number, s.lo[j], s.hi[j]);
        if (s.hi[j] == s.lo[j]) points = 0;
        points *= s.hi[j] - s.lo[j];
        if (points > int64_t{1} << 31) program_error("stage %u reduces too many points", number);
        memory.lo[s.axis + j] = scratch.lo[s.axis + j] = s.lo[j];
        memory.hi[s.axis + j] = scratch.hi[s.axis + j] = s.hi[j] - 1;
      }
      if (!points) return;
    }
    for (uint32_t i = s.first; i < s.first + s.count; ++i) instr(c, i, kind == abi::StageKind::SCALAR, memory, scratch);
  }

  void instr(const abi::Code& c, uint32_t number, bool scalar, const Ranges& memory, const Ranges& scratch) {
    using abi::Opcode;
    const abi::Instr& i = p.instrs[number];
    const auto o = static_cast<Opcode>(i.op);
    if (i.op > static_cast<uint8_t>(Opcode::I_NE)) program_error("instruction %u has opcode %u", number, i.op);
    const bool loads = o == Opcode::LOAD || o == Opcode::INDEX;
    const bool stores = o >= Opcode::STORE && o <= Opcode::STORE_MIN;
    const auto reg = [&](uint16_t r) {
      if ((r & ~abi::VECTOR_REG) >= abi::MAX_REGS || (scalar && r & abi::VECTOR_REG))
        program_error("instruction %u names register %#x", number, r);
    };
    if (!stores) {
      reg(i.dst);
      if (!scalar && !(i.dst & abi::VECTOR_REG)) program_error("instruction %u writes a scalar register in a vector stage", number);
    }
    const bool unary = (o >= Opcode::F_NEG && o <= Opcode::F_TO_B) || (o >= Opcode::I_NEG && o <= Opcode::I_WRAP_U16);
    const int operands = loads || o == Opcode::CONST ? 0
                         : unary || o == Opcode::MOVE || o == Opcode::STORE ? 1
                         : o == Opcode::SELECT ? 3 : 2;
    if (operands > 0) reg(i.a);
    if (operands > 1) reg(i.b);
    if (operands > 2) reg(i.c);
    if (!loads && !stores) return;
    if (i.aux >= c.accesses) program_error("instruction %u names access %u of %u", number, i.aux, c.accesses);
    const abi::Access& x = p.accesses[c.access + i.aux];
    if (o == Opcode::INDEX) return;
    if (x.n_dyn > abi::MAX_DYN) program_error("instruction %u: %u dynamic coordinates", number, x.n_dyn);
    for (int d = 0; d < x.n_dyn; ++d) {
      reg(x.dyn_reg[d]);
      if (x.dyn_limit[d] < 0) program_error("instruction %u: a dynamic coordinate up to %d", number, x.dyn_limit[d]);
    }
    char what[48];
    std::snprintf(what, sizeof what, "instruction %u", number);
    bounds(x, x.slot >= abi::SLOT_ACT ? scratch : memory, stores, what);
  }

  void contract() {
    const int b = count(abi::Param::N_BATCH), m = count(abi::Param::N_M), nn = count(abi::Param::N_N), k = count(abi::Param::N_K);
    const int64_t rhs = param(abi::Param::N_RHS);
    if (b + m + nn + k != op.n_axes) program_error("operator %zu: %d axes of a contraction with %d", n, b + m + nn + k, op.n_axes);
    if (rhs < 1 || rhs > MAX_ACC) program_error("operator %zu has %lld right sides", n, (long long)rhs);
    const auto type = static_cast<abi::Dtype>(param(abi::Param::REDUCE_DTYPE));
    if (type != abi::Dtype::F32 && type != abi::Dtype::I32) program_error("operator %zu contracts type %d", n, static_cast<int>(type));
    info.n_batch = b, info.n_m = m, info.n_n = nn, info.n_k = k;
    const int m0 = b, n0 = b + m, k0 = n0 + nn, end = op.n_axes;
    contiguous(m0, n0, "row"), contiguous(n0, k0, "column"), whole(k0, end, "contracted");
    for (int a = 0; a < b; ++a) tile[a] = 1;  // the body takes one batch point at a time
    info.act_row = product(op.extent, k0, end), info.acc_row = product(tile, n0, k0);
    act = scratch_elements(product(tile, m0, n0), info.act_row);
    for (int j = 0; j < rhs; ++j) {
      acc[j] = scratch_elements(product(tile, m0, n0), info.acc_row);
      const abi::Access& x = core_access(param(static_cast<abi::Param>(j)));
      bounds(x, extents({{0, m0}, {n0, end}}), false, "a right side");
      const auto dt = static_cast<abi::Dtype>(x.dtype);
      const bool floating = dt == abi::Dtype::F32 || dt == abi::Dtype::BF16 || dt == abi::Dtype::F16;
      if (floating != (type == abi::Dtype::F32)) program_error("operator %zu: right side %d has element type %u", n, j, x.dtype);
      info.stride_n[j] = flat(x, n0, k0), info.stride_k[j] = flat(x, k0, end);
    }
    p.scratch.panel = std::max(p.scratch.panel, info.act_row);
    roles({abi::Role::LHS, abi::Role::EPILOGUE});
    grow();
  }

  void attention() {
    const int b = count(abi::Param::N_BATCH), r = count(abi::Param::N_ROWS);
    if (b + r + 3 > op.n_axes) program_error("operator %zu: %d axes of an attention with %d", n, b + r + 3, op.n_axes);
    info.n_batch = b, info.n_m = r;
    const int column = b + r, key = column + 1, head = column + 2;
    contiguous(b, column, "row"), whole(key, op.n_axes, "key, head or append");
    for (int a = 0; a < b; ++a)
      if (tile[a] != 1) program_error("operator %zu: batch axis %d has tile %d", n, a, tile[a]);
    const int64_t rows = product(tile, b, column);
    info.act_row = op.extent[head], info.acc_row = op.extent[key], info.acc1_row = tile[column];
    act = scratch_elements(rows, info.act_row), acc[0] = scratch_elements(rows, info.acc_row);
    acc[1] = scratch_elements(rows, info.acc1_row), limit = 16;
    const abi::Access &kx = core_access(param(abi::Param::KEY)), &vx = core_access(param(abi::Param::VALUE));
    bounds(kx, extents({{0, b}, {key, head + 1}}), false, "the keys");
    bounds(vx, extents({{0, b}, {column, key + 1}}), false, "the values");
    for (const abi::Access* x : {&kx, &vx})
      if (x->dtype > static_cast<uint8_t>(abi::Dtype::F16)) program_error("operator %zu: keys or values of type %u", n, x->dtype);
    info.stride_n[0] = kx.stride[key], info.stride_k[0] = kx.stride[head];
    info.stride_n[1] = vx.stride[column], info.stride_k[1] = vx.stride[key];
    p.scratch.panel = std::max(p.scratch.panel, info.act_row);
    using abi::Role;
    roles({Role::Q, Role::SCORE, Role::PROB, Role::LIMIT, Role::APPEND0, Role::APPEND1, Role::APPEND2, Role::APPEND3, Role::EPILOGUE});
    grow();
  }

  void sort() {
    const int last = op.n_axes - 1;
    if (last < 0) program_error("operator %zu sorts a scalar", n);
    const int64_t length = op.extent[last], keep = param(abi::Param::COUNT);
    whole(last, op.n_axes, "sorted");
    for (int a = 0; a < last; ++a) tile[a] = 1;  // the body takes one row at a time
    if (keep < 1 || keep > length) program_error("operator %zu keeps %lld of %lld", n, (long long)keep, (long long)length);
    const auto type = static_cast<abi::Dtype>(param(abi::Param::KEY_DTYPE));
    if (type != abi::Dtype::F32 && type != abi::Dtype::I32 && type != abi::Dtype::U32 && type != abi::Dtype::BOOL)
      program_error("operator %zu sorts type %d", n, static_cast<int>(type));
    acc[0] = scratch_elements(1, length);
    const abi::Access& out = core_access(param(abi::Param::OUT));
    Ranges r = extents({{0, last}});
    r.hi[last] = keep - 1;
    bounds(out, r, true, "the sorted output");
    p.scratch.keys = std::max(p.scratch.keys, length);
    roles({abi::Role::MAIN, abi::Role::LHS});
    grow();
  }

  void grow() {
    p.scratch.act = std::max(p.scratch.act, act * 4);
    for (int j = 0; j <= MAX_ACC; ++j) p.scratch.acc[j] = std::max(p.scratch.acc[j], acc[j] * 4);
  }
};

}  // namespace

void check_ops(Program& p) {
  p.info.assign(p.ops.size, OpInfo{});
  for (size_t n = 0; n < p.ops.size; ++n) OpChecker(p, n).run();
}

}  // namespace mpk
