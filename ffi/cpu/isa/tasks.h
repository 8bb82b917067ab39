// Task bodies: a task's ranges from its grid index, then the codes and the core of its kind.
#pragma once

class TaskBody {
 public:
  TaskBody(const TaskContext& t, u32 op, u32 index)
      : t_(t), s_(*t.scratch), op_(t.view->ops[op]), info_(t.view->info[op]), code_(t, op_) {
    for (int a = op_.n_axes - 1; a >= 0; --a) {
      const u32 tiles = static_cast<u32>(info_.grid[a]), digit = index % tiles;
      index /= tiles;
      const i64 lo = i64{op_.tile[a]} * digit, hi = lo + op_.tile[a];
      r_.lo[a] = static_cast<i32>(lo), r_.hi[a] = hi < op_.extent[a] ? static_cast<i32>(hi) : op_.extent[a];
    }
  }

  void run() {
    switch (static_cast<abi::Kind>(op_.kind)) {
      case abi::Kind::NOP: break;
      case abi::Kind::ROWS: code_.role(abi::Role::MAIN, r_); break;
      case abi::Kind::CONTRACT: each_point(0, info_.n_batch, &TaskBody::contract); break;
      case abi::Kind::ATTENTION: attention(); break;
      case abi::Kind::SORT: each_point(0, op_.n_axes - 1, &TaskBody::sort); break;
      case abi::Kind::SCAN: each_point(0, op_.n_axes - 1, &TaskBody::scan); break;
    }
  }

 private:
  const TaskContext& t_;
  Scratch& s_;
  const abi::Op& op_;
  const OpInfo& info_;
  CodeRunner code_;
  TaskRange r_{};

  // Calls `body` with axes [from, to) narrowed to one point after the other.
  void each_point(int from, int to, void (TaskBody::*body)()) {
    const TaskRange all = r_;
    for (int a = from; a < to; ++a) r_.hi[a] = r_.lo[a] + 1;
    for (;;) {
      spend(*t_.pulse, 16);
      (this->*body)();
      int a = to - 1;
      for (; a >= from; --a) {
        if (++r_.lo[a] < all.hi[a]) break;
        r_.lo[a] = all.lo[a];
      }
      for (int b = from; b < to; ++b) r_.hi[b] = r_.lo[b] + 1;
      if (a < from) break;
    }
    r_ = all;
  }

  i64 points(int from, int to) const {
    i64 n = 1;
    for (int a = from; a < to; ++a) n *= r_.hi[a] - r_.lo[a];
    return n;
  }

  i64 flat(int from, int to) const {
    i64 at = 0;
    for (int a = from; a < to; ++a) at = at * op_.extent[a] + r_.lo[a];
    return at;
  }

  i64 param(abi::Param p) const { return op_.params[static_cast<int>(p)]; }

  // The address of a core access at the start of the ranges of axes [from, to).
  char* core(const abi::Access& x, int from, int to) const {
    i64 off = x.offset;
    for (int a = from; a < to; ++a) off += x.stride[a] * r_.lo[a];
    return moved(t_.slots[op_.slot + x.slot], off * size_of(x.dtype));
  }

  const abi::Access& access(abi::Param p) const { return t_.view->accesses[op_.access + param(p)]; }

  void contract() {
    const int m0 = info_.n_batch, n0 = m0 + info_.n_m, k0 = n0 + info_.n_n;
    const i64 rows = points(m0, n0), columns = points(n0, k0), k = info_.act_row;
    const i64 batch = flat(0, m0), first = flat(m0, n0);
    if (!op_.prologue || s_.prologue != op_.prologue || s_.act_batch != batch || s_.act_m0 != first ||
        s_.act_m1 != first + rows) {
      code_.role(abi::Role::LHS, r_);
      s_.prologue = op_.prologue, s_.act_batch = batch, s_.act_m0 = first, s_.act_m1 = first + rows;
    }
    const bool integer = static_cast<abi::Dtype>(param(abi::Param::REDUCE_DTYPE)) == abi::Dtype::I32;
    for (int j = 0; j < param(abi::Param::N_RHS); ++j) {
      const abi::Access& x = access(static_cast<abi::Param>(j));
      TaskRange keep = r_;
      for (int a = m0; a < n0; ++a) r_.lo[a] = 0;
      const char* w = core(x, 0, op_.n_axes);
      r_ = keep;
      const Matrix matrix{w, x.dtype, info_.stride_n[j], info_.stride_k[j]};
      pieces(rows, columns, k, matrix, [&](i64 c, i64 n, const Matrix& part) {
        if (integer)
          gemm_int(rows, n, k, reinterpret_cast<const i32*>(s_.act), k, part, reinterpret_cast<i32*>(s_.acc[j]) + c,
                   info_.acc_row, s_.panel);
        else
          gemm(rows, n, k, reinterpret_cast<const f32*>(s_.act), k, part, Order::spread(k),
               reinterpret_cast<f32*>(s_.acc[j]) + c, info_.acc_row, s_.panel);
      });
    }
    code_.role(abi::Role::EPILOGUE, r_);
  }

  // Calls f(first column, columns, the part of w) for pieces of columns that take a fraction of a second, in which a launch
  // can be given up. Nothing depends on where they are cut.
  template <class F>
  void pieces(i64 rows, i64 columns, i64 k, const Matrix& w, F f) {
    constexpr i64 MACS = i64{1} << 28, UNIT = 64;
    const i64 most = MACS / (rows * k), step = most >= UNIT ? most / UNIT * UNIT : most > 0 ? most : 1;
    for (i64 c = 0; c < columns; c += step) {
      const i64 n = columns - c < step ? columns - c : step;
      spend(*t_.pulse, rows * n * k);
      f(c, n, Matrix{w.w + c * w.stride_n * size_of(w.dtype), w.dtype, w.stride_n, w.stride_k});
    }
  }

  void attention() {
    using abi::Role;
    for (int r = static_cast<int>(Role::APPEND0); r <= static_cast<int>(Role::APPEND3); ++r)
      code_.role(static_cast<Role>(r), r_);
    s_.prologue = 0;
    code_.role(Role::Q, r_);
    const int column = info_.n_batch + info_.n_m, key = column + 1, head = column + 2;
    i32 keys = op_.extent[key];
    if (op_.codes[static_cast<int>(Role::LIMIT)]) {
      s_.limit[0] = keys;
      code_.role(Role::LIMIT, r_);
      const i32 limit = s_.limit[0];
      keys = limit < 1 ? 1 : limit < keys ? limit : keys;
    }
    r_.hi[key] = keys;
    const i64 rows = points(info_.n_batch, column), depth = op_.extent[head];
    auto* act = reinterpret_cast<f32*>(s_.act);
    auto* score = reinterpret_cast<f32*>(s_.acc[0]);
    const abi::Access &kx = access(abi::Param::KEY), &vx = access(abi::Param::VALUE);
    pieces(rows, keys, depth, {core(kx, 0, info_.n_batch), kx.dtype, info_.stride_n[0], info_.stride_k[0]},
           [&](i64 c, i64 n, const Matrix& part) {
             gemm(rows, n, depth, act, info_.act_row, part, Order::natural(depth), score + c, info_.acc_row, s_.panel);
           });
    code_.role(Role::SCORE, r_);
    for (i64 m = 0; m < rows; ++m) spend(*t_.pulse, 8 * keys), softmax(score + m * info_.acc_row, keys);
    code_.role(Role::PROB, r_);
    const i64 columns = r_.hi[column] - r_.lo[column];
    const char* v = moved(core(vx, 0, info_.n_batch), vx.stride[column] * r_.lo[column] * size_of(vx.dtype));
    // Keys are summed one after the other, whatever the layout: a dot product over contiguous keys would not be that.
    const Matrix values{v, vx.dtype, info_.stride_n[1], info_.stride_k[1]};
    const Order order = Order::natural(keys);
    auto* out = reinterpret_cast<f32*>(s_.acc[1]);
    pieces(rows, columns, keys, values, [&](i64 c, i64 n, const Matrix& part) {
      if (part.stride_n == 1) gemm(rows, n, keys, score, info_.acc_row, part, order, out + c, info_.acc1_row, s_.panel);
      else panels(rows, 0, n, keys, score, info_.acc_row, part, order, out + c, info_.acc1_row, s_.panel);
    });
    code_.role(Role::EPILOGUE, r_);
  }

  static void softmax(f32* x, i64 n) {
    auto* bits = reinterpret_cast<u32*>(x);
    const auto fold = [&](abi::ReduceOp op) {
      Reducer r;
      r.start(op, abi::Dtype::F32);
      for (i64 i = 0; i < n; i += STRIP) r.strip(bits + i, static_cast<int>(n - i < STRIP ? n - i : STRIP), 0);
      return as_f(r.finish(0));
    };
    const f32 top = fold(abi::ReduceOp::MAX);
    LOOP (i64 i = 0; i < n; ++i) x[i] = exp_(x[i] - top);
    const f32 sum = fold(abi::ReduceOp::SUM);
    LOOP (i64 i = 0; i < n; ++i) x[i] = x[i] / sum;
  }

  void scan() {
    code_.role(abi::Role::MAIN, r_);
    scan_row(reinterpret_cast<u32*>(s_.acc[0]), op_.extent[op_.n_axes - 1],
             static_cast<abi::ScanOp>(param(abi::Param::SCAN_OP)),
             static_cast<abi::Dtype>(param(abi::Param::REDUCE_DTYPE)), param(abi::Param::REVERSE), *t_.pulse);
    code_.role(abi::Role::EPILOGUE, r_);
  }

  // One row: keys become ordered integers (f32: NaN is the greatest, zeros are equal), positions break ties.
  void sort() {
    const int last = op_.n_axes - 1;
    const i64 length = op_.extent[last], keep = param(abi::Param::COUNT);
    spend(*t_.pulse, 64 * length);
    code_.role(abi::Role::MAIN, r_);
    const auto type = static_cast<abi::Dtype>(param(abi::Param::KEY_DTYPE));
    const bool down = param(abi::Param::DESCENDING);
    auto* row = reinterpret_cast<u32*>(s_.acc[0]);
    for (i64 i = 0; i < length; ++i) {
      u32 b = row[i];
      if (type == abi::Dtype::F32) {
        const f32 x = as_f(b);
        b = x != x ? ~0u : x == 0.f ? 0x80000000u : b & 0x80000000u ? ~b : b | 0x80000000u;
      } else if (type == abi::Dtype::I32) {
        b ^= 0x80000000u;
      }
      s_.keys[i] = static_cast<uint64_t>(down ? ~b : b) << 32 | static_cast<u32>(i);
    }
    sort_keys(s_.keys, length, keep);
    const abi::Access& out = access(abi::Param::OUT);
    char* at = core(out, 0, last);
    const bool positions = param(abi::Param::PAYLOAD);
    for (i64 i = 0; i < keep; ++i) {
      const u32 from = static_cast<u32>(s_.keys[i]), v = positions ? from : row[from];
      store_any(out.dtype, &v, nullptr, abi::Opcode::STORE, at + i * out.stride[last] * size_of(out.dtype),
                Lanes{1, nullptr}, 1);
    }
  }
};

static void run_task(const TaskContext& t, u32 op, u32 index) { TaskBody(t, op, index).run(); }
