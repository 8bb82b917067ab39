// Reductions in the fixed order of the program format: LANES partials, each in index order, then pairwise halving.
#pragma once

struct Reducer {
  abi::ReduceOp op;
  abi::Dtype dtype;
  alignas(64) u32 p[abi::LANES];   // partials (argmax, argmin: the extreme of the lane)
  alignas(64) i32 at[abi::LANES];  // argmax, argmin: where it is
  i64 count = 0;                   // elements so far

  static constexpr i32 NOWHERE = 0x7fffffff;

  bool position() const { return op == abi::ReduceOp::ARGMAX || op == abi::ReduceOp::ARGMIN; }

  void start(abi::ReduceOp o, abi::Dtype d) {
    op = o, dtype = d, count = 0;
    const bool f = d == abi::Dtype::F32, s = d == abi::Dtype::I32;
    u32 v = 0;
    switch (o) {
      case abi::ReduceOp::MAX: v = f ? as_u(-INF) : s ? 0x80000000u : 0; break;
      case abi::ReduceOp::MIN: v = f ? as_u(INF) : s ? 0x7fffffffu : d == abi::Dtype::BOOL ? 1 : ~0u; break;
      case abi::ReduceOp::PROD: v = f ? as_u(1.f) : 1; break;
      case abi::ReduceOp::AND: v = d == abi::Dtype::BOOL ? 1 : ~0u; break;
      default: break;
    }
    for (u32 j = 0; j < abi::LANES; ++j) p[j] = v, at[j] = NOWHERE;
  }

  // Element `v[i]` is number count + i of the row; its reduction axis reads first + i.
  void strip(const u32* v, int n, i32 first) {
    if (position()) {
      switch (dtype) {
        case abi::Dtype::F32: positions<f32>(v, n, first); break;
        case abi::Dtype::I32: positions<i32>(v, n, first); break;
        default: positions<u32>(v, n, first);
      }
    } else if (count % abi::LANES == 0) {
      const int whole = n / abi::LANES * abi::LANES;
      for (int i = 0; i < whole; i += abi::LANES) combine(p, p, v + i, abi::LANES);
      if (whole < n) combine(p, p, v + whole, n - whole);
    } else {
      for (int i = 0; i < n; ++i) {
        u32& q = p[(count + i) % abi::LANES];
        combine(&q, &q, v + i, 1);
      }
    }
    count += n;
  }

  u32 finish(i32 lo) {
    if (position()) {
      int best = 0;
      for (int j = 1; j < static_cast<int>(abi::LANES); ++j)
        if (at[j] != NOWHERE && (at[best] == NOWHERE || beats(j, best))) best = j;
      return static_cast<u32>(at[best] == NOWHERE ? lo : at[best]);
    }
    for (int half = abi::LANES / 2; half; half /= 2) combine(p, p, p + half, half);
    return p[0];
  }

  u32 onto(u32 before, u32 result) const {
    u32 out;
    combine(&out, &before, &result, 1);
    return out;
  }

 private:
  template <class F>
  FN void each(u32* d, const u32* a, const u32* b, int n, F f) {
    if (n == static_cast<int>(abi::LANES)) {
      LOOP (int i = 0; i < static_cast<int>(abi::LANES); ++i) d[i] = f(a[i], b[i]);
    } else {
      for (int i = 0; i < n; ++i) d[i] = f(a[i], b[i]);
    }
  }

  void combine(u32* d, const u32* a, const u32* b, int n) const {
    const bool f = dtype == abi::Dtype::F32, s = dtype == abi::Dtype::I32;
    switch (op) {
      case abi::ReduceOp::SUM:
        if (f) each(d, a, b, n, [](u32 x, u32 y) { return as_u(as_f(x) + as_f(y)); });
        else each(d, a, b, n, [](u32 x, u32 y) { return x + y; });
        break;
      case abi::ReduceOp::PROD:
        if (f) each(d, a, b, n, [](u32 x, u32 y) { return as_u(as_f(x) * as_f(y)); });
        else each(d, a, b, n, [](u32 x, u32 y) { return x * y; });
        break;
      case abi::ReduceOp::MAX:
        if (f) each(d, a, b, n, [](u32 x, u32 y) { return as_u(fmax_(as_f(x), as_f(y))); });
        else if (s) each(d, a, b, n, [](u32 x, u32 y) { return static_cast<i32>(x) > static_cast<i32>(y) ? x : y; });
        else each(d, a, b, n, [](u32 x, u32 y) { return x > y ? x : y; });
        break;
      case abi::ReduceOp::MIN:
        if (f) each(d, a, b, n, [](u32 x, u32 y) { return as_u(fmin_(as_f(x), as_f(y))); });
        else if (s) each(d, a, b, n, [](u32 x, u32 y) { return static_cast<i32>(x) < static_cast<i32>(y) ? x : y; });
        else each(d, a, b, n, [](u32 x, u32 y) { return x < y ? x : y; });
        break;
      case abi::ReduceOp::AND: each(d, a, b, n, [](u32 x, u32 y) { return x & y; }); break;
      default: each(d, a, b, n, [](u32 x, u32 y) { return x | y; });
    }
  }

  template <class T> FN T value(u32 x) {
    T y;
    __builtin_memcpy(&y, &x, 4);
    return y;
  }
  template <class T> FN bool ahead(T x, T y, bool max) { return (max ? x > y : x < y) || (x != x && y == y); }

  template <class T>
  void positions(const u32* v, int n, i32 first) {
    const bool max = op == abi::ReduceOp::ARGMAX;
    for (int i = 0; i < n; i += abi::LANES) {
      const int m = n - i < static_cast<int>(abi::LANES) ? n - i : abi::LANES;
      LOOP (int j = 0; j < m; ++j) {
        const bool take = at[j] == NOWHERE || ahead(value<T>(v[i + j]), value<T>(p[j]), max);
        p[j] = take ? v[i + j] : p[j];
        at[j] = take ? first + i + j : at[j];
      }
    }
  }

  template <class T>
  bool beats_as(int j, int k) const {
    const T x = value<T>(p[j]), y = value<T>(p[k]);
    const bool max = op == abi::ReduceOp::ARGMAX;
    return ahead(x, y, max) || (!ahead(y, x, max) && at[j] < at[k]);
  }

  bool beats(int j, int k) const {
    return dtype == abi::Dtype::F32   ? beats_as<f32>(j, k)
           : dtype == abi::Dtype::I32 ? beats_as<i32>(j, k)
                                      : beats_as<u32>(j, k);
  }
};
