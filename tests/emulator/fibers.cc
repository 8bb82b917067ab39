// CUDA blocks on one host thread: every CUDA thread is a fiber that runs until it waits for others. Who runs next is
// drawn from a seed, so a missing barrier shows as a result that depends on the seed. Asynchronous copies land when
// the draw says so, any time before somebody sees their barrier's phase end.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

constexpr int kStack = 64 << 10;

struct Index { unsigned x; };
struct Thread { Index thread, block, grid; unsigned char* shared; };

struct Fiber {
  Thread thread;  // first: the kernel sees only this
  jmp_buf at;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool started = false, finished = false;
};

struct Warp {
  unsigned slots[2][32][16];
  int arrived = 0, turn = 0;
};

struct Barrier {
  unsigned arrived = 0;
  std::vector<Fiber*> waiting;
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

struct Mbarrier { uint8_t count, missing, phase, pad; int bytes; };

struct Copy {
  unsigned char* to;
  const Map* map;
  int at[4];
  Mbarrier* barrier;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Block> blocks;
std::vector<Fiber*> ready;
std::vector<Copy> copies;
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
  c.barrier->bytes -= row * 128;
  if (!c.barrier->missing && !c.barrier->bytes) {
    c.barrier->missing = c.barrier->count;
    c.barrier->phase ^= 1;
  }
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

void emulated_barrier(unsigned id, unsigned threads, bool wait) {
  Barrier& b = blocks[emulated_thread->block.x].barriers[id];
  if (++b.arrived == threads) {
    b.arrived = 0;
    ready.insert(ready.end(), b.waiting.begin(), b.waiting.end());
    b.waiting.clear();
    if (wait) emulated_pause();
  } else if (wait) {
    b.waiting.push_back(now());
    leave();
  }
}

const unsigned (*emulated_exchange(const unsigned* mine, int words))[16] {
  const unsigned t = emulated_thread->thread.x;
  Warp& w = blocks[emulated_thread->block.x].warps[t / 32];
  const int turn = w.turn;
  std::memcpy(w.slots[turn][t % 32], mine, 4 * words);
  if (++w.arrived == 32) {
    w.arrived = 0;
    w.turn ^= 1;
    for (int i = 0; i < 32; ++i)
      if (i != int(t % 32)) ready.push_back(fibers[emulated_thread->block.x * (fibers.size() / blocks.size()) + t / 32 * 32 + i].get());
  } else {
    leave();
  }
  return w.slots[turn];
}

unsigned long long emulated_clock() { return steps * 1000; }

void emulated_copy(void* to, const void* map, int x, int y, int z, int u, unsigned long long* barrier) {
  copies.push_back({static_cast<unsigned char*>(to), static_cast<const Map*>(map), {x, y, z, u}, reinterpret_cast<Mbarrier*>(barrier)});
}

// Runs a grid to its end. 0: done; 1: everybody waits (a deadlock); 2: too many steps.
int emulated_run(void (*kernel)(const void*), const void* parameters, int grid, int threads, int shared, uint64_t seed, uint64_t most) {
  entry = kernel;
  launch = parameters;
  state = seed * 0x9e3779b97f4a7c15ull + 0x1234567;
  steps = 0;
  fibers.clear();
  blocks.clear();
  ready.clear();
  copies.clear();
  blocks.resize(grid);
  for (int b = 0; b < grid; ++b) {
    blocks[b].memory.reset(new unsigned char[shared + 1024]);
    std::memset(blocks[b].memory.get(), 0x7b, shared + 1024);  // what nobody wrote is a strange number
    blocks[b].warps.resize(threads / 32);
    auto* base = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(blocks[b].memory.get()) + 1023) / 1024 * 1024);
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
