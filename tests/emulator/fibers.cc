// CUDA blocks on one host thread: every CUDA thread is a fiber that runs until it waits for others. Who runs next is
// drawn from a seed, so a missing barrier shows as a result that depends on the seed. Asynchronous copies land when
// the draw says so, any time before somebody sees their barrier's phase end. races.h looks for races that no draw shows.
#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "races.h"

struct Index { unsigned x; };
struct Thread {
  Index thread, block, grid;
  unsigned char* shared;
};
extern "C" Thread* emulated_thread;

namespace {

constexpr int kStack = 64 << 10;

struct Fiber {
  Thread thread;                                      // first: the kernel sees only this
  std::vector<std::pair<void*, const void*>> copies;  // of 16 bytes, on their way
  jmp_buf at;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool started = false, finished = false;
};

struct Warp {
  unsigned slots[2][32][16];
  int arrived = 0, turn = 0;
  races::Meeting meeting;
};

struct Barrier {
  unsigned arrived = 0;
  std::vector<Fiber*> waiting;
  races::Meeting meeting;
};

struct Block {
  std::unique_ptr<unsigned char[]> memory;
  Barrier barriers[16];
  std::vector<Warp> warps;
};

struct Map {  // what tests/emulator/__init__.py writes instead of a CUtensorMap
  const unsigned char* base;
  uint64_t dims[4], strides[3];
  uint32_t box[4];
};

struct Mbarrier {
  uint8_t count, missing, phase, pad;
  int bytes;
};  // in its 8 bytes

struct Phases {  // what comes before the end of a phase: of this one, of the last one of each parity
  races::Meeting now, done[2];
};

struct Copy {
  unsigned char* to;
  const Map* map;
  int at[4];
  Mbarrier* barrier;
  unsigned block;
  races::Meeting issued;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Block> blocks;
std::vector<Fiber*> ready;
std::vector<Copy> copies;
std::unordered_map<const void*, Phases> phases;
jmp_buf scheduler;
ucontext_t main_context;
uint64_t state, steps;
void (*entry)(const void*);
const void* launch;

uint64_t draw() {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

Fiber* now();

uint32_t id(const Thread& t) { return t.block.x * (fibers.size() / blocks.size()) + t.thread.x; }
uint32_t id() { return id(*emulated_thread); }

// All arrivals, all bytes: the next phase.
void turn(Mbarrier* b) {
  if (b->missing || b->bytes) return;
  if (races::on) {
    Phases& p = phases[b];
    p.done[b->phase] = p.now;
    p.now = {};
  }
  b->missing = b->count;
  b->phase ^= 1;
}

void leave() {
  if (!_setjmp(now()->at)) _longjmp(scheduler, 1);
}

// bf16 boxes of 128-byte rows; 16-byte chunk c of row r lies at c ^ (r % 8), as the 128-byte swizzle has it.
void land(const Copy& c) {
  const Map& m = *c.map;
  int n[4], row = 0;
  for (n[3] = 0; n[3] < int(m.box[3]); ++n[3])
    for (n[2] = 0; n[2] < int(m.box[2]); ++n[2])
      for (n[1] = 0; n[1] < int(m.box[1]); ++n[1], ++row)
        for (n[0] = 0; n[0] < int(m.box[0]); ++n[0]) {
          uint16_t x = 0;
          bool inside = true;
          const unsigned char* p = m.base;
          for (int a = 0; a < 4; ++a) {
            const int64_t i = int64_t(c.at[a]) + n[a];
            inside = inside && i >= 0 && uint64_t(i) < m.dims[a];
            p += i * (a ? int64_t(m.strides[a - 1]) : 2);
          }
          if (inside) std::memcpy(&x, p, 2);
          std::memcpy(c.to + row * 128 + ((n[0] / 8) ^ (row % 8)) * 16 + n[0] % 8 * 2, &x, 2);
        }
  if (races::on) {
    const uint32_t engine = fibers.size() + c.block;
    races::clocks[engine].known = c.issued.sum;
    races::access(c.to, row * 128, true, engine, nullptr);
    races::release(phases[c.barrier].now, engine);
  }
  c.barrier->bytes -= row * 128;
  turn(c.barrier);
}

void body() {
  entry(launch);
  now()->finished = true;
  _longjmp(scheduler, 1);
}

}  // namespace

extern "C" {

Thread* emulated_thread;

void emulated_pause() {
  ready.push_back(now());
  leave();
}

void emulated_barrier(unsigned number, unsigned threads, bool wait) {
  Barrier& b = blocks[emulated_thread->block.x].barriers[number];
  if (races::on) races::release(b.meeting, id());
  if (wait) b.waiting.push_back(now());
  if (++b.arrived == threads) {
    for (Fiber* f : b.waiting) {
      if (races::on) races::clocks[id(f->thread)].known = b.meeting.sum;
      ready.push_back(f);
    }
    b = Barrier();
  }
  if (wait) leave();
}

const unsigned (*emulated_exchange(const unsigned* mine, int words, bool sync))[16] {
  const unsigned t = emulated_thread->thread.x;
  Warp& w = blocks[emulated_thread->block.x].warps[t / 32];
  const int turn = w.turn;
  std::memcpy(w.slots[turn][t % 32], mine, 4 * words);
  sync = sync && races::on;
  if (sync) races::release(w.meeting, id());
  if (++w.arrived == 32) {
    w.arrived = 0;
    w.turn ^= 1;
    for (unsigned i = id() / 32 * 32, end = i + 32; i < end; ++i) {
      if (i != id()) ready.push_back(fibers[i].get());
      if (sync) races::clocks[i].known = w.meeting.sum;
    }
    w.meeting = {};
  } else {
    leave();
  }
  return w.slots[turn];
}

void emulated_acquire(const void* word) {
  if (races::on) races::acquire(races::words[word], id());
}

void emulated_release(const void* word) {
  if (races::on) races::release(races::words[word], id());
}

void emulated_copy16(void* to, const void* from) {
  if (races::on) races::access(to, 16, true, id(), __builtin_return_address(0));
  now()->copies.push_back({to, from});
}

void emulated_copy16_wait() {
  for (const auto& c : now()->copies) {
    std::memcpy(c.first, c.second, 16);
    if (races::on) races::access(c.first, 16, true, id(), __builtin_return_address(0));
  }
  now()->copies.clear();
}

void emulated_mbarrier(void* b, int count) { *static_cast<Mbarrier*>(b) = {uint8_t(count), uint8_t(count), 0, 0, 0}; }

void emulated_arrive(void* b, int bytes) {
  if (races::on) races::release(phases[b].now, id());
  auto* m = static_cast<Mbarrier*>(b);
  m->bytes += bytes;
  --m->missing;
  turn(m);
}

bool emulated_phase(void* b, unsigned parity) {
  if (static_cast<Mbarrier*>(b)->phase == parity) return false;
  if (races::on) races::acquire(phases[b].done[parity], id());
  return true;
}

unsigned long long emulated_clock() { return steps * 1000; }

void emulated_copy(void* to, const void* map, int x, int y, int z, int u, unsigned long long* barrier) {
  Copy c{static_cast<unsigned char*>(to),      static_cast<const Map*>(map), {x, y, z, u},
         reinterpret_cast<Mbarrier*>(barrier), emulated_thread->block.x,     {}};
  if (races::on) races::release(c.issued, id());
  copies.push_back(c);
}

// Looks for races in these bytes, and in shared memory, from the next launch on; size 0: forgets what it was told.
void emulated_watch(const char* begin, uint64_t size, int name) {
  if (!(races::on = size)) races::ranges.clear();
  else races::ranges.push_back({begin, begin + size, name, {}});
}

// The races of the last launch, with addresses relative to the library of the kernel.
int emulated_races(races::Race* out) {
  races::settle();
  for (const races::Race& r : races::found) {
    Dl_info library;
    *out = r;
    for (const void*& pc : out->pc)
      if (pc && dladdr(pc, &library))
        pc = reinterpret_cast<const void*>(static_cast<const char*>(pc) - static_cast<const char*>(library.dli_fbase));
    ++out;
  }
  return races::found.size();
}

// What -fsanitize=thread makes of a load or a store. A volatile one is for the kernel to answer for.
#define EMULATED_ACCESS(kind, write, size)                                           \
  void __tsan_##kind##size(void* p) {                                                \
    if (races::on) races::access(p, size, write, id(), __builtin_return_address(0)); \
  }                                                                                  \
  void __tsan_unaligned_##kind##size(void* p) {                                      \
    if (races::on) races::access(p, size, write, id(), __builtin_return_address(0)); \
  }                                                                                  \
  void __tsan_volatile_##kind##size(void*) {}
#define EMULATED_ACCESSES(size) EMULATED_ACCESS(read, false, size) EMULATED_ACCESS(write, true, size)
EMULATED_ACCESSES(1)
EMULATED_ACCESSES(2)
EMULATED_ACCESSES(4)
EMULATED_ACCESSES(8)
EMULATED_ACCESSES(16)
void __tsan_read_range(void* p, size_t n) {
  if (races::on) races::access(p, n, false, id(), __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
  if (races::on) races::access(p, n, true, id(), __builtin_return_address(0));
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_init() {}

// Runs a grid to its end. 0: done; 1: everybody waits (a deadlock); 2: too many steps.
int emulated_run(void (*kernel)(const void*), const void* parameters, int grid, int threads, int shared, uint64_t seed,
                 uint64_t most) {
  entry = kernel;
  launch = parameters;
  state = seed * 0x9e3779b97f4a7c15ull + 0x1234567;
  steps = 0;
  fibers.clear();
  blocks.clear();
  ready.clear();
  copies.clear();
  phases.clear();
  blocks.resize(grid);
  for (int b = 0; b < grid; ++b) {
    blocks[b].memory.reset(new unsigned char[shared + 1024]);
    std::memset(blocks[b].memory.get(), 0x7b, shared + 1024);  // what nobody wrote is a strange number
    blocks[b].warps.resize(threads / 32);
    auto* base =
        reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(blocks[b].memory.get()) + 1023) / 1024 * 1024);
    for (int t = 0; t < threads; ++t) {
      fibers.push_back(std::make_unique<Fiber>());
      Fiber& f = *fibers.back();
      f.thread = {{unsigned(t)}, {unsigned(b)}, {unsigned(grid)}, base};
      f.stack.reset(new char[kStack]);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = nullptr;
      makecontext(&f.context, body, 0);
      ready.push_back(&f);
    }
  }
  if (races::on) {
    races::ranges.erase(
        std::remove_if(races::ranges.begin(), races::ranges.end(), [](const races::Range& r) { return r.name < 0; }),
        races::ranges.end());
    for (int b = 0; b < grid; ++b) {
      const auto* base = reinterpret_cast<const char*>(fibers[b * threads]->thread.shared);
      races::ranges.push_back({base, base + shared, -1 - b, {}});
    }
    races::start(fibers.size(), grid);
  }
  size_t left = fibers.size();
  while (left) {
    if (++steps > most) return 2;
    if (!copies.empty() && (ready.empty() || draw() % 64 == 0)) {
      const size_t n = draw() % copies.size();
      land(copies[n]);
      copies.erase(copies.begin() + n);
      if (ready.empty()) continue;
    }
    if (ready.empty()) return 1;
    // Mostly the newest, which keeps lanes of a warp together; now and then anybody.
    const size_t n = draw() % 4 ? ready.size() - 1 : draw() % ready.size();
    Fiber* f = ready[n];
    ready[n] = ready.back();
    ready.pop_back();
    emulated_thread = &f->thread;
    if (!_setjmp(scheduler)) {
      if (f->started) _longjmp(f->at, 1);
      f->started = true;
      swapcontext(&main_context, &f->context);
    }
    if (f->finished) --left;
  }
  while (!copies.empty()) land(copies.back()), copies.pop_back();
  return 0;
}
}

namespace {
Fiber* now() { return reinterpret_cast<Fiber*>(emulated_thread); }
}  // namespace
