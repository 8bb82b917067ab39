// Checks operators, and derives what bodies need (OpInfo) and how much scratch: what each kind relies on.
#include <algorithm>
#include <unordered_map>

#include "check.h"

namespace mpk {
namespace {

using abi::MAX_AXES;
constexpr int64_t kMaxScratch = int64_t{1} << 31;          // bytes of a thread
constexpr CheckBudget kMaxRecords = CheckBudget{1} << 26;  // a second or two

struct OpChecker : OpScope {
  CheckBudget& budget;
  std::unordered_map<uint32_t, size_t>& prologues;  // first operator of each number

  OpChecker(Program& program, size_t number, CheckBudget& budget, std::unordered_map<uint32_t, size_t>& prologues)
      : OpScope{program, number, program.ops[number], program.info[number]}, budget(budget), prologues(prologues) {}

  void run() {
    if (op.n_axes > MAX_AXES) program_error("operator %zu has %u axes", n, op.n_axes);
    if (uint64_t{op.slot} + op.slots > p.slots.size) program_error("operator %zu has slots beyond the end", n);
    if (uint64_t{op.access} + op.accesses > p.accesses.size)
      program_error("operator %zu has accesses beyond the end", n);
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
    if ((budget -= op.accesses) < 0) program_error("operator %zu: it has too many accesses", n);
    for (int64_t i = 0; i < op.accesses; ++i) core_access(i);
    switch (static_cast<abi::Kind>(op.kind)) {
      case abi::Kind::NOP: roles({}); return;
      case abi::Kind::ROWS: roles({abi::Role::MAIN}), grow(); return;
      case abi::Kind::CONTRACT: contract(); return;
      case abi::Kind::ATTENTION: attention(); return;
      case abi::Kind::SORT: sort(); return;
      case abi::Kind::SCAN: scan(); return;
    }
    program_error("operator %zu has kind %u", n, op.kind);
  }

  int64_t param(abi::Param which) const { return op.params[static_cast<int>(which)]; }

  int32_t count(abi::Param which) const {
    const int64_t v = param(which);
    if (v < 0 || v > MAX_AXES)
      program_error("operator %zu: parameter %d is %lld", n, static_cast<int>(which), (long long)v);
    return static_cast<int32_t>(v);
  }

  abi::Dtype dtype(abi::Param which) const {
    const int64_t v = param(which);
    if (v < 0 || v >= static_cast<int64_t>(sizeof abi::DTYPE_BYTES))
      program_error("operator %zu: parameter %d is element type %lld", n, static_cast<int>(which), (long long)v);
    return static_cast<abi::Dtype>(v);
  }

  const abi::Access& core_access(int64_t index) const {
    if (index < 0 || index >= op.accesses)
      program_error("operator %zu: core access %lld of %u", n, (long long)index, op.accesses);
    const abi::Access& x = p.accesses[op.access + index];
    if (x.n_dyn) program_error("operator %zu: a core access has dynamic coordinates", n);
    if (x.slot >= op.slots) program_error("operator %zu: a core access names slot %u of %u", n, x.slot, op.slots);
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
      if (__builtin_mul_overflow(x.stride[a], int64_t{op.extent[a]}, &next))
        program_error("operator %zu: stride overflow", n);
    }
    return stride;
  }

  Ranges extents(std::initializer_list<std::pair<int, int>> parts) const {
    Ranges r;
    for (auto [from, to] : parts)
      for (int a = from; a < to; ++a) r.hi[a] = op.extent[a] - 1;
    return r;
  }

  // Checks the codes of the roles that the kind has; the others have none.
  void roles(std::initializer_list<abi::Role> which) {
    uint32_t others = ~0u;
    for (abi::Role role : which) others &= ~(1u << static_cast<int>(role));
    for (int r = 0; r < static_cast<int>(sizeof op.codes / sizeof op.codes[0]); ++r)
      if (others >> r & 1 && op.codes[r])
        program_error("operator %zu has codes of role %d, which its kind does not", n, r);
    for (abi::Role role : which) {
      const int r = static_cast<int>(role);
      if (uint64_t{op.code[r]} + op.codes[r] > p.codes.size)
        program_error("operator %zu: role %d has codes beyond the end", n, r);
      for (uint32_t c = op.code[r]; c < op.code[r] + op.codes[r]; ++c) check_code(*this, c, budget);
    }
  }

  // Operators with one prologue number use the ACT that whoever ran before left there: it must have their layout.
  void shared_prologue() {
    if (!op.prologue) return;
    const auto [first, fresh] = prologues.emplace(op.prologue, n);
    if (fresh) return;
    const abi::Op& o = p.ops[first->second];
    const OpInfo& i = p.info[first->second];
    const int reduce = static_cast<int>(abi::Param::REDUCE_DTYPE);
    bool same = i.n_batch == info.n_batch && i.n_m == info.n_m && i.act_row == info.act_row &&
                o.params[reduce] == op.params[reduce];
    for (int a = 0; same && a < info.n_batch + info.n_m; ++a)
      same = o.extent[a] == op.extent[a] && (a < info.n_batch || o.tile[a] == op.tile[a]);
    if (!same)
      program_error("operator %zu has the prologue number of operator %zu, but another activation", n, first->second);
  }

  void contract() {
    const int b = count(abi::Param::N_BATCH), m = count(abi::Param::N_M), nn = count(abi::Param::N_N),
              k = count(abi::Param::N_K);
    const int64_t rhs = param(abi::Param::N_RHS);
    if (b + m + nn + k != op.n_axes)
      program_error("operator %zu: %d axes of a contraction with %d", n, b + m + nn + k, op.n_axes);
    if (rhs < 1 || rhs > MAX_ACC) program_error("operator %zu has %lld right sides", n, (long long)rhs);
    const auto type = dtype(abi::Param::REDUCE_DTYPE);
    if (type != abi::Dtype::F32 && type != abi::Dtype::I32)
      program_error("operator %zu contracts type %d", n, static_cast<int>(type));
    info.n_batch = b, info.n_m = m, info.n_n = nn, info.n_k = k;
    const int m0 = b, n0 = b + m, k0 = n0 + nn, end = op.n_axes;
    contiguous(m0, n0, "row"), contiguous(n0, k0, "column"), whole(k0, end, "contracted");
    for (int a = 0; a < b; ++a) tile[a] = 1;  // the body takes one batch point at a time
    info.act_row = product(op.extent, k0, end), info.acc_row = product(tile, n0, k0);
    act = scratch_elements(product(tile, m0, n0), info.act_row);
    for (int j = 0; j < rhs; ++j) {
      acc[j] = scratch_elements(product(tile, m0, n0), info.acc_row);
      const abi::Access& x = core_access(param(static_cast<abi::Param>(j)));
      check_access(*this, x, extents({{0, m0}, {n0, end}}), false, "a right side");
      const auto dt = static_cast<abi::Dtype>(x.dtype);
      const bool floating = dt == abi::Dtype::F32 || dt == abi::Dtype::BF16 || dt == abi::Dtype::F16;
      if (floating != (type == abi::Dtype::F32))
        program_error("operator %zu: right side %d has element type %u", n, j, x.dtype);
      info.stride_n[j] = flat(x, n0, k0), info.stride_k[j] = flat(x, k0, end);
    }
    const int64_t rows = product(tile, m0, n0);
    panel(rows);
    if (type == abi::Dtype::I32)  // halves of ACT, and a panel
      p.scratch.panel = std::max(p.scratch.panel, 4 * (PANEL_K * PANEL_N + rows * ((info.act_row + 1) / 2)));
    shared_prologue();
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
    check_access(*this, kx, extents({{0, b}, {key, head + 1}}), false, "the keys");
    check_access(*this, vx, extents({{0, b}, {column, key + 1}}), false, "the values");
    for (const abi::Access* x : {&kx, &vx})
      if (x->dtype > static_cast<uint8_t>(abi::Dtype::F16))
        program_error("operator %zu: keys or values of type %u", n, x->dtype);
    info.stride_n[0] = kx.stride[key], info.stride_k[0] = kx.stride[head];
    info.stride_n[1] = vx.stride[column], info.stride_k[1] = vx.stride[key];
    panel(rows);
    using abi::Role;
    roles({Role::Q, Role::SCORE, Role::PROB, Role::LIMIT, Role::APPEND0, Role::APPEND1, Role::APPEND2, Role::APPEND3,
           Role::EPILOGUE});
    grow();
  }

  void sort() {
    const int last = row();
    const int64_t length = op.extent[last], keep = param(abi::Param::COUNT);
    if (keep < 1 || keep > length)
      program_error("operator %zu keeps %lld of %lld", n, (long long)keep, (long long)length);
    const auto type = dtype(abi::Param::KEY_DTYPE);
    if (type != abi::Dtype::F32 && type != abi::Dtype::I32 && type != abi::Dtype::U32 && type != abi::Dtype::BOOL)
      program_error("operator %zu sorts type %d", n, static_cast<int>(type));
    const abi::Access& out = core_access(param(abi::Param::OUT));
    Ranges r = extents({{0, last}});
    r.hi[last] = keep - 1;
    check_access(*this, out, r, true, "the sorted output");
    p.scratch.keys = std::max(p.scratch.keys, length);
    roles({abi::Role::MAIN});
    grow();
  }

  void scan() {
    row();
    const auto type = dtype(abi::Param::REDUCE_DTYPE);
    const int64_t how = param(abi::Param::SCAN_OP);
    if (type != abi::Dtype::F32 && type != abi::Dtype::I32 && type != abi::Dtype::U32)
      program_error("operator %zu scans type %d", n, static_cast<int>(type));
    if (how < 0 || how > static_cast<int64_t>(abi::ScanOp::LOGSUMEXP) ||
        (how == static_cast<int64_t>(abi::ScanOp::LOGSUMEXP) && type != abi::Dtype::F32))
      program_error("operator %zu scans type %d by %lld", n, static_cast<int>(type), (long long)how);
    roles({abi::Role::MAIN, abi::Role::EPILOGUE});
    grow();
  }

  // The last axis is a row, which the body takes whole and one at a time: ACC holds it.
  int row() {
    const int last = op.n_axes - 1;
    if (last < 0) program_error("operator %zu takes rows of a scalar", n);
    whole(last, op.n_axes, "row");
    for (int a = 0; a < last; ++a) tile[a] = 1;
    acc[0] = scratch_elements(1, op.extent[last]);
    return last;
  }

  // Rows of ACT that are prepared for dot products.
  void panel(int64_t rows) {
    p.scratch.panel = std::max(p.scratch.panel, 4 * std::min<int64_t>(rows, PANEL_ROWS) * (info.act_row + abi::LANES));
  }

  void grow() {
    ScratchSize& s = p.scratch;
    s.act = std::max(s.act, act * 4);
    for (int j = 0; j <= MAX_ACC; ++j) s.acc[j] = std::max(s.acc[j], acc[j] * 4);
    int64_t total = s.act + s.panel + 8 * s.keys + 16 * s.accesses;
    for (int64_t bytes : s.acc) total += bytes;
    if (total > kMaxScratch)
      program_error("operator %zu: a thread would need %lld bytes of scratch, more than %lld", n, (long long)total,
                    (long long)kMaxScratch);
  }
};

}  // namespace

void check_ops(Program& p) {
  p.info.assign(p.ops.size, OpInfo{});
  p.code_info.assign(p.codes.size, CodeInfo{~uint64_t{0}});
  CheckBudget budget = kMaxRecords;
  std::unordered_map<uint32_t, size_t> prologues;
  for (size_t n = 0; n < p.ops.size; ++n) OpChecker(p, n, budget, prologues).run();
}

}  // namespace mpk
