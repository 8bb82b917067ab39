// A race detector for the emulator, with the order of accesses that CUDA guarantees: vector clocks, as in FastTrack
// (Flanagan and Freund, PLDI 2009). The kernel is compiled with -fsanitize=thread, whose calls (`__tsan_read4`, ...) end
// here instead of in that library, which knows nothing of CUDA's barriers.
//
// What orders two accesses: the program order of a thread; barriers of the block, arrivals included; __syncwarp; a release
// and an acquire of one word; the phases of an mbarrier. A shuffle, a vote or a matrix instruction orders nothing. A
// tensor copy is a thread of its own: it begins where it was issued, and the phase that it completes comes after it.
//
// In shared memory every race counts. In global memory threads may write a value that is there already: the parts of an
// attention all append the same row, and each of them reads what it wrote.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

namespace races {

using Times = std::vector<uint32_t>;  // one entry a thread; the copies of a block are one more
using Shared = std::shared_ptr<const Times>;

struct Meeting;

// What a thread knows of the others. Threads that met at a barrier share one vector; its own entry each has for itself.
struct Clock {
  Shared known;
  uint32_t own = 1;
  const Meeting* polled = nullptr;  // what it acquired last, and at which version
  uint64_t version = 0;
};
inline uint64_t joins = 0;  // of all meetings: no two versions are equal, whatever memory they lie in

// Where clocks meet: a barrier, a word that is released and acquired, the phase of an mbarrier.
struct Meeting {
  std::shared_ptr<Times> sum;
  Shared last;  // what the last one knew: the next one often knows the same
  uint64_t version = 0;

  void join(const Clock& c, uint32_t id) {
    if (!sum) sum = std::make_shared<Times>(*c.known);
    else if (c.known != last)
      for (size_t i = 0; i < sum->size(); ++i) (*sum)[i] = (*sum)[i] > (*c.known)[i] ? (*sum)[i] : (*c.known)[i];
    if ((*sum)[id] < c.own) (*sum)[id] = c.own;
    last = c.known;
    version = ++joins;
  }
};

struct Access {
  uint32_t thread = 0, time = 0;  // 0: none
  const char* pc = nullptr;
};

using Accesses = std::vector<Access>;

struct Cell {
  Access write, read;
  // More than one reader, or writer of the same value, with no order among them: indices into `many`.
  int32_t readers = -1, writers = -1;
};

struct Word {  // four bytes, until somebody touches some of them
  Cell all;
  int32_t bytes = -1;  // an index into `split`
};

struct Range {
  const char *begin, *end;
  int name;
  std::vector<Word> words;
};

struct Race {
  int name;  // of the range
  uint64_t offset;
  uint32_t threads[2];
  uint32_t wrote[2];
  const void* pc[2];  // earlier, later
};

inline bool on = false;
inline std::vector<Clock> clocks;
inline std::vector<Range> ranges;
inline std::vector<Accesses> many;
inline std::vector<std::array<Cell, 4>> split;
inline std::vector<Race> found;
inline std::unordered_map<const void*, Meeting> words;

inline bool before(const Access& a, uint32_t id) {
  const Clock& c = clocks[id];
  return !a.time || a.thread == id || a.time <= (*c.known)[a.thread];
}

inline void report(const Range& r, const char* p, const Access& a, bool wrote, uint32_t id, bool write,
                   const void* pc) {
  for (const Race& x : found)
    if (x.pc[0] == a.pc && x.pc[1] == pc) return;
  if (found.size() < 16) found.push_back({r.name, uint64_t(p - r.begin), {a.thread, id}, {wrote, write}, {a.pc, pc}});
}

inline void add(int32_t& list, const Access& first, const Access& now) {
  if (list < 0) {
    list = int32_t(many.size());
    many.push_back({first});
  }
  Accesses& all = many[list];
  if (all.back().thread == now.thread) return void(all.back() = now);
  all.push_back(now);
  if (all.size() % 4096) return;  // the latest of every thread
  std::stable_sort(all.begin(), all.end(), [](const Access& a, const Access& b) { return a.thread < b.thread; });
  Accesses latest;
  for (size_t i = 0; i < all.size(); ++i)
    if (i + 1 == all.size() || all[i].thread != all[i + 1].thread) latest.push_back(all[i]);
  all = latest;
}

inline void read(const Range& r, Cell& c, const char* p, const Access& now) {
  if (c.writers < 0
          ? !before(c.write, now.thread)
          : std::none_of(
                many[c.writers].begin(), many[c.writers].end(), [&](const Access& a) { return before(a, now.thread); }))
    report(r, p, c.write, true, now.thread, false, now.pc);
  if (c.readers < 0 && before(c.read, now.thread)) c.read = now;
  else add(c.readers, c.read, now);
}

inline void write(const Range& r, Cell& c, const char* p, const Access& now, bool same) {
  if (same && c.write.time) return add(c.writers, c.write, now);
  const auto check = [&](int32_t list, const Access& one, bool wrote) {
    if (list < 0 && !before(one, now.thread)) report(r, p, one, wrote, now.thread, true, now.pc);
    if (list >= 0)
      for (const Access& a : many[list])
        if (!before(a, now.thread)) report(r, p, a, wrote, now.thread, true, now.pc);
  };
  check(c.writers, c.write, true);
  check(c.readers, c.read, false);
  c = Cell();
  c.write = now;
}

// A write to global memory whose value is not there yet: it is looked at before anything else happens.
struct Pending {
  Range* range = nullptr;
  const char* at;
  std::vector<char> old;
  Access now;
};
inline Pending pending;

inline void start(size_t threads, size_t blocks) {
  const auto nothing = std::make_shared<const Times>(threads + blocks);
  clocks.assign(threads + blocks, Clock{nothing, 1});
  words.clear();
  many.clear();
  found.clear();
  pending.range = nullptr;
  split.clear();
  for (Range& r : ranges) r.words.assign((r.end - r.begin + 3) / 4, Word());
}

// f(cell, bytes from the beginning of `r`, its size) for all cells of size bytes at `at`.
template <class F> void each(Range& r, size_t at, size_t size, const F& f) {
  for (const size_t end = at + size; at < end;) {
    Word& w = r.words[at / 4];
    const size_t most = std::min<size_t>(end - at, 4 - at % 4);
    if (w.bytes < 0 && most == 4) {
      f(w.all, at, size_t(4));
    } else {
      if (w.bytes < 0) {
        w.bytes = int32_t(split.size());
        split.push_back({w.all, w.all, w.all, w.all});
        for (int32_t Cell::* list : {&Cell::readers, &Cell::writers})
          for (size_t i = 1; i < 4 && w.all.*list >= 0; ++i) {
            split.back()[i].*list = int32_t(many.size());
            many.push_back(Accesses(many[w.all.*list]));
          }
      }
      for (size_t i = 0; i < most; ++i) f(split[w.bytes][at % 4 + i], at + i, size_t(1));
    }
    at += most;
  }
}

inline void settle() {
  if (!pending.range) return;
  Range& r = *pending.range;
  pending.range = nullptr;
  const size_t at = pending.at - r.begin;
  each(r, at, pending.old.size(), [&](Cell& c, size_t p, size_t n) {
    write(r, c, r.begin + p, pending.now, !std::memcmp(r.begin + p, pending.old.data() + (p - at), n));
  });
}

inline void access(const void* address, size_t size, bool writes, uint32_t id, const void* pc) {
  settle();
  const char* p = static_cast<const char*>(address);
  for (Range& r : ranges) {
    if (p < r.begin || p >= r.end) continue;
    const Access now{id, clocks[id].own, static_cast<const char*>(pc)};
    const char* end = std::min(p + size, r.end);
    if (writes && r.name >= 0) {
      pending.range = &r;
      pending.at = p;
      pending.old.assign(p, end);
      pending.now = now;
      return;
    }
    each(r, p - r.begin, end - p, [&](Cell& c, size_t q, size_t) {
      if (writes) write(r, c, r.begin + q, now, false);
      else read(r, c, r.begin + q, now);
    });
    return;
  }
}

inline void release(Meeting& m, uint32_t id) {
  settle();
  m.join(clocks[id], id);
  ++clocks[id].own;
}

// `own` keeps what others already know of this thread, and more.
inline void acquire(const Meeting& m, uint32_t id) {
  settle();
  if (!m.sum) return;
  Clock& c = clocks[id];
  if (c.polled == &m && c.version == m.version) return;
  c.polled = &m;
  c.version = m.version;
  bool more = false;
  for (size_t i = 0; i < m.sum->size() && !more; ++i) more = i != id && (*m.sum)[i] > (*c.known)[i];
  if (!more) return;
  Meeting both = {std::make_shared<Times>(*m.sum)};
  both.join(c, id);
  c.known = both.sum;
}

}  // namespace races
