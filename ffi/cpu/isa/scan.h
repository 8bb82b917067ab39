// Scans in the fixed order of the program format: runs of SCAN_RUN elements, LANES of them side by side, then what came
// before each run.
#pragma once

FN f32 logaddexp_(f32 x, f32 y) {
  const f32 apart = x == y ? 1.f : exp_(-fabs_(x - y));
  return fmax_(x, y) + log1p_(apart);
}

// `row[0]`, `row[step]`, ... combined in place; `first`: the neutral element.
template <class F>
FN void scan_runs(u32* row, i64 n, i64 step, u32 first, Pulse& pulse, F f) {
  constexpr i64 RUN = abi::SCAN_RUN, LANES = abi::LANES;
  i64 at = 0;
  for (; at + LANES * RUN <= n; at += LANES * RUN) {
    spend(pulse, 8 * LANES * RUN);
    u32 acc[LANES];
    for (i64 j = 0; j < LANES; ++j) acc[j] = first;
    for (i64 i = 0; i < RUN; ++i)
      LOOP (i64 j = 0; j < LANES; ++j) {
        u32& x = row[(at + j * RUN + i) * step];
        x = acc[j] = f(acc[j], x);
      }
  }
  for (; at < n; at += RUN) {
    u32 acc = first;
    for (i64 i = at; i < n && i < at + RUN; ++i) row[i * step] = acc = f(acc, row[i * step]);
  }
  for (at = RUN; at < n; at += RUN) {
    if (at % (LANES * RUN) == 0) spend(pulse, 8 * LANES * RUN);
    const u32 before = row[(at - 1) * step];
    const i64 count = n - at < RUN ? n - at : RUN;
    if (step == 1) {
      LOOP (i64 i = 0; i < count; ++i) row[at + i] = f(before, row[at + i]);
    } else {
      u32* last = row - (at + count - 1);
      LOOP (i64 i = 0; i < count; ++i) last[i] = f(before, last[i]);
    }
  }
}

static void scan_row(u32* row, i64 n, abi::ScanOp op, abi::Dtype type, bool reverse, Pulse& pulse) {
  const bool f = type == abi::Dtype::F32, s = type == abi::Dtype::I32;
  const i64 step = reverse ? -1 : 1;
  if (reverse) row += n - 1;
  switch (op) {
    case abi::ScanOp::SUM:
      if (f) scan_runs(row, n, step, 0, pulse, [](u32 x, u32 y) { return as_u(as_f(x) + as_f(y)); });
      else scan_runs(row, n, step, 0, pulse, [](u32 x, u32 y) { return x + y; });
      break;
    case abi::ScanOp::PROD:
      if (f) scan_runs(row, n, step, as_u(1.f), pulse, [](u32 x, u32 y) { return as_u(as_f(x) * as_f(y)); });
      else scan_runs(row, n, step, 1, pulse, [](u32 x, u32 y) { return x * y; });
      break;
    case abi::ScanOp::MAX:
      if (f) scan_runs(row, n, step, as_u(-INF), pulse, [](u32 x, u32 y) { return as_u(fmax_(as_f(x), as_f(y))); });
      else if (s)
        scan_runs(row, n, step, 0x80000000u, pulse,
                  [](u32 x, u32 y) { return static_cast<i32>(x) > static_cast<i32>(y) ? x : y; });
      else scan_runs(row, n, step, 0, pulse, [](u32 x, u32 y) { return x > y ? x : y; });
      break;
    case abi::ScanOp::MIN:
      if (f) scan_runs(row, n, step, as_u(INF), pulse, [](u32 x, u32 y) { return as_u(fmin_(as_f(x), as_f(y))); });
      else if (s)
        scan_runs(row, n, step, 0x7fffffffu, pulse,
                  [](u32 x, u32 y) { return static_cast<i32>(x) < static_cast<i32>(y) ? x : y; });
      else scan_runs(row, n, step, ~0u, pulse, [](u32 x, u32 y) { return x < y ? x : y; });
      break;
    case abi::ScanOp::LOGSUMEXP:
      scan_runs(row, n, step, as_u(-INF), pulse, [](u32 x, u32 y) { return as_u(logaddexp_(as_f(x), as_f(y))); });
  }
}
