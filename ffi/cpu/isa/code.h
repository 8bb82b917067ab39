// The interpreter of fused expressions: one code over the ranges of a task, in strips of up to STRIP points.
//
// A register is a strip of 32-bit lanes; an instruction is one vectorised loop over whole groups of LANES lanes (the
// lanes beyond the strip compute garbage that nobody stores). A scalar register is LANES equal lanes, so scalar stages
// run through the same loops and give the same bits. Memory offsets are kept per access and moved along with the
// outer loops.
#pragma once

struct TaskRange { i32 lo[abi::MAX_AXES], hi[abi::MAX_AXES]; };

class CodeRunner {
 public:
  CodeRunner(const TaskContext& t, const abi::Op& op) : t_(t), op_(op), s_(*t.scratch) {}

  // Runs the codes of a role.
  void role(abi::Role r, const TaskRange& range) {
    const int i = static_cast<int>(r);
    for (u32 c = op_.code[i]; c < op_.code[i] + op_.codes[i]; ++c) run(t_.view->codes[c], range);
  }

 private:
  const TaskContext& t_;
  const abi::Op& op_;
  Scratch& s_;
  const abi::Code* c_ = nullptr;
  const abi::Access* access_ = nullptr;
  bool scalar_ = true;  // the running stage is SCALAR
  bool ahead_ = false;  // and runs for many points: its registers are strips too
  int loops_ = 0;       // loop variables of the running stage: the last one is in strips
  u32 axis_[4];
  i64 at_[4];
  u64 spread_ = 0;  // scalar registers that were broadcast in this stage
  int width_ = 0;   // lanes to broadcast

  void run(const abi::Code& c, const TaskRange& range) {
    i32 lo[abi::MAX_AXES], len[abi::MAX_AXES], done[abi::MAX_AXES];
    int outer[abi::MAX_AXES], n_outer = 0;
    spend(*t_.pulse, 16);
    for (u32 a = 0; a < c.n_axes; ++a) {
      lo[a] = range.lo[a], len[a] = 1;
      if (c.axes >> a & 1) {
        if (c.lo[a] > lo[a]) lo[a] = c.lo[a];
        len[a] = (c.hi[a] < range.hi[a] ? c.hi[a] : range.hi[a]) - lo[a];
        if (len[a] <= 0) return;
        if (static_cast<i32>(a) != c.vector && len[a] > 1) done[n_outer] = 0, outer[n_outer++] = a;
      }
    }
    c_ = &c;
    access_ = t_.view->accesses + c.access;
    for (u32 j = 0; j < c.accesses; ++j) {
      const abi::Access& x = access_[j];
      const bool scratch = x.slot >= abi::SLOT_ACT;
      i64 base = 0, start = x.offset;
      for (u32 a = 0; a < c.n_axes; ++a) {
        base += x.stride[a] * lo[a];
        if (scratch) start -= x.stride[a] * range.lo[a];
      }
      s_.base[j] = base;
      s_.origin[j] = moved(scratch ? scratch_slot(x.slot) : t_.slots[op_.slot + x.slot], start * size_of(x.dtype));
    }
    const u64 ahead = n_outer ? t_.view->code_info[&c - t_.view->codes].ahead : 0;
    const int inner = n_outer ? outer[n_outer - 1] : 0;
    for (;;) {
      spend(*t_.pulse, 1 + c.accesses);
      if (ahead) first_stage(t_.view->stages[c.stage], inner, done[n_outer - 1], len[inner], ahead);
      for (u32 i = c.stage + (ahead != 0); i < c.stage + c.stages; ++i)
        stage(t_.view->stages[i], c.vector < 0 ? 1 : len[c.vector]);
      int d = n_outer - 1;
      for (; d >= 0; --d) {
        const int a = outer[d];
        const bool more = ++done[d] < len[a];
        const i64 step = more ? 1 : 1 - len[a];
        for (u32 j = 0; j < c.accesses; ++j) s_.base[j] += step * access_[j].stride[a];
        if (more) break;
        done[d] = 0;
      }
      if (d < 0) return;
    }
  }

  char* scratch_slot(u32 slot) const {
    if (slot == abi::SLOT_ACT) return s_.act;
    if (slot == abi::SLOT_LIMIT) return reinterpret_cast<char*>(s_.limit);
    return s_.acc[slot - abi::SLOT_ACC];
  }

  // The scalar registers of point `at` of `points` along `axis`, which is the innermost outer loop: computed for a strip
  // of points at its first one.
  void first_stage(const abi::Stage& st, int axis, int at, int points, u64 registers) {
    if (at % STRIP == 0) {
      ahead_ = true, scalar_ = false, loops_ = 1, axis_[0] = static_cast<u32>(axis), at_[0] = 0;
      strip(t_.view->instrs + st.first, st.count, points - at < STRIP ? points - at : STRIP);
      ahead_ = false;
    }
    for (u64 left = registers; left; left &= left - 1) {
      const int r = __builtin_ctzll(left);
      const u32 v = s_.ahead[r * STRIP + at % STRIP];
      u32* d = s_.scalars + r * abi::LANES;
      LOOP (u32 j = 0; j < abi::LANES; ++j) d[j] = v;
    }
  }

  void stage(const abi::Stage& st, int length) {
    const abi::Instr* code = t_.view->instrs + st.first;
    spread_ = 0;
    switch (static_cast<abi::StageKind>(st.kind)) {
      case abi::StageKind::SCALAR:
        scalar_ = true, loops_ = 0;
        strip(code, st.count, 1);
        return;
      case abi::StageKind::VECTOR:
        scalar_ = false, loops_ = 1, axis_[0] = c_->vector, width_ = length < STRIP ? length : STRIP;
        for (int v = 0; v < length; v += STRIP) {
          at_[0] = v;
          strip(code, st.count, length - v < STRIP ? length - v : STRIP);
        }
        return;
      case abi::StageKind::REDUCE: reduce(st, code);
    }
  }

  void reduce(const abi::Stage& st, const abi::Instr* code) {
    const int last = st.axes - 1;
    bool any = true;
    for (int j = 0; j <= last; ++j) axis_[j] = st.axis + j, at_[j] = st.lo[j], any = any && st.hi[j] > st.lo[j];
    scalar_ = false, loops_ = st.axes;
    const int length = st.hi[last] - st.lo[last];
    width_ = length < STRIP ? length : STRIP;
    Reducer r;
    r.start(static_cast<abi::ReduceOp>(st.reduce), static_cast<abi::Dtype>(st.dtype));
    while (any) {
      for (int v = 0; v < length; v += STRIP) {
        const int n = length - v < STRIP ? length - v : STRIP;
        at_[last] = st.lo[last] + v;
        strip(code, st.count, n);
        r.strip(operand(st.src), n, static_cast<i32>(at_[last]));
      }
      int d = last - 1;
      for (; d >= 0; --d) {
        if (++at_[d] < st.hi[d]) break;
        at_[d] = st.lo[d];
      }
      any = d >= 0;
    }
    u32* d = s_.scalars + st.dst * abi::LANES;
    u32 v = r.finish(st.lo[last]);
    if (st.flags & abi::ACCUMULATE && !r.position()) v = r.onto(d[0], v);
    for (u32 j = 0; j < abi::LANES; ++j) d[j] = v;
  }

  const u32* operand(u32 r) {
    if (r & abi::VECTOR_REG) return s_.vectors + (r & ~abi::VECTOR_REG) * STRIP;
    if (ahead_) return s_.ahead + r * STRIP;
    const u32* v = s_.scalars + r * abi::LANES;
    if (scalar_) return v;
    u32* wide = s_.spread + r * STRIP;
    if (!(spread_ >> r & 1)) {
      spread_ |= u64{1} << r;
      const u32 x = v[0];
      for (int i = 0; i < width_; i += abi::LANES)
        for (u32 j = 0; j < abi::LANES; ++j) wide[i + j] = x;
    }
    return wide;
  }

  // Element offset of lane 0, and how the lanes go on; `gathered` receives offsets when a vector register indexes.
  i64 lanes(const abi::Access& x, u32 number, int n, Lanes& l, i64* gathered) {
    i64 off = s_.base[number];
    for (int j = 0; j < loops_; ++j) off += x.stride[axis_[j]] * at_[j];
    l = {loops_ ? x.stride[axis_[loops_ - 1]] : 0, nullptr};
    for (int d = 0; d < x.n_dyn; ++d) {
      const u32 r = x.dyn_reg[d];
      const i32 limit = x.dyn_limit[d];
      if (!(r & abi::VECTOR_REG) && !ahead_) {
        i32 v = static_cast<i32>(s_.scalars[r * abi::LANES]);
        off += x.dyn_stride[d] * (v < 0 ? 0 : v > limit ? limit : v);
        continue;
      }
      if (!l.offset)
        for (int i = 0; i < n; ++i) gathered[i] = i * l.stride;
      l.offset = gathered;
      const u32* v = operand(r);
      for (int i = 0; i < n; ++i) {
        const i32 k = static_cast<i32>(v[i]);
        gathered[i] += x.dyn_stride[d] * (k < 0 ? 0 : k > limit ? limit : k);
      }
    }
    return off;
  }

  void memory(const abi::Instr& in, abi::Opcode op, int n) {
    const abi::Access& x = access_[in.aux];
    i64 gathered[STRIP];
    Lanes l;
    const i64 off = lanes(x, in.aux, n, l, gathered);
    char* at = moved(s_.origin[in.aux], off * size_of(x.dtype));
    if (op == abi::Opcode::LOAD) {
      u32* d = result(in.dst);
      load_any(x.dtype, d, at, l, n);
      if (scalar_)
        for (u32 j = 1; j < abi::LANES; ++j) d[j] = d[0];
    } else {
      const bool one = !scalar_ && !(in.b & abi::VECTOR_REG);  // condition for all lanes
      if (op != abi::Opcode::STORE && one && !s_.scalars[in.b * abi::LANES]) return;
      const u32* where = op == abi::Opcode::STORE || one ? nullptr : operand(in.b);
      store_any(x.dtype, operand(in.a), where, op, at, l, n);
    }
  }

  void index(const abi::Instr& in, int lanes_) {
    const abi::Access& x = access_[in.aux];
    i64 off = s_.base[in.aux];
    for (int j = 0; j < loops_; ++j) off += x.stride[axis_[j]] * at_[j];
    const u32 first = in.imm + static_cast<u32>(off), step = loops_ ? static_cast<u32>(x.stride[axis_[loops_ - 1]]) : 0;
    u32* d = result(in.dst);
    LOOP (int i = 0; i < lanes_; ++i) d[i] = first + static_cast<u32>(i) * step;
  }

  u32* result(u32 r) {
    if (r & abi::VECTOR_REG) return s_.vectors + (r & ~abi::VECTOR_REG) * STRIP;
    return ahead_ ? s_.ahead + r * STRIP : s_.scalars + r * abi::LANES;
  }

  void strip(const abi::Instr* code, u32 count, int n) {
    const int lanes =
        (n + static_cast<int>(abi::LANES) - 1) / static_cast<int>(abi::LANES) * static_cast<int>(abi::LANES);
    spend(*t_.pulse, i64{lanes} * (count + 1));
    for (const abi::Instr* in = code; in < code + count; ++in) {
      const auto op = static_cast<abi::Opcode>(in->op);
      switch (op) {
        case abi::Opcode::LOAD:
        case abi::Opcode::STORE:
        case abi::Opcode::STORE_IF:
        case abi::Opcode::STORE_ADD:
        case abi::Opcode::STORE_MUL:
        case abi::Opcode::STORE_MAX:
        case abi::Opcode::STORE_MIN: memory(*in, op, n); break;
        case abi::Opcode::INDEX: index(*in, lanes); break;
        case abi::Opcode::CONST: {
          u32* d = result(in->dst);
          for (int i = 0; i < lanes; ++i) d[i] = in->imm;
          break;
        }
        case abi::Opcode::SELECT: select(result(in->dst), operand(in->a), operand(in->b), operand(in->c), lanes); break;
        default: {
          const u32* a = operand(in->a);
          arithmetic(op, result(in->dst), a, abi::ARITY[in->op] == 1 ? a : operand(in->b), lanes);
        }
      }
    }
  }
};
