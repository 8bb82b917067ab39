// mpk_stress PROGRAM...: launches saved programs from many threads at once and compares every result, bit for bit, with
// a launch on one thread. Built with -fsanitize=thread or address it checks the event protocol, the pool and the
// loader (see CMakeLists.txt, tests/unit/test_executor_threads.py). Prints one line a program.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <thread>

#include "launch.h"

using namespace mpk;

namespace {

struct Memory {
  std::vector<AlignedBytes> keep;
  Operands o;
};

// Operands of every type that are moderate numbers: 16-bit words that are bf16 between 0.5 and 2.
std::vector<AlignedBytes> inputs(const Program& p) {
  std::vector<size_t> bytes(p.header->args);
  for (const abi::Buffer& b : p.buffers) {
    if (static_cast<abi::Space>(b.space) == abi::Space::ARG) bytes[b.index] = std::max<size_t>(bytes[b.index], b.bytes);
    if (static_cast<abi::Space>(b.space) == abi::Space::RESULT && b.alias >= 0) bytes[b.alias] = std::max<size_t>(bytes[b.alias], b.bytes);
  }
  std::vector<AlignedBytes> out;
  uint32_t seed = 1;
  for (size_t n : bytes) {
    out.push_back(aligned_bytes(n));
    for (size_t i = 0; i + 2 <= n + 1; i += 2) {
      seed = seed * 1664525u + 1013904223u;
      const uint16_t word = static_cast<uint16_t>(0x3f00 + (seed >> 24));
      std::memcpy(out.back().get() + i, &word, 2);
    }
  }
  return out;
}

Memory outputs(const Program& p, const std::vector<AlignedBytes>& args) {
  Memory m;
  m.o.results.resize(p.header->results), m.o.result_bytes.resize(p.header->results);
  for (const AlignedBytes& a : args) m.o.args.push_back(a.get()), m.o.arg_bytes.push_back(SIZE_MAX);
  for (const abi::Buffer& b : p.buffers) {
    if (static_cast<abi::Space>(b.space) != abi::Space::RESULT || m.o.results[b.index]) continue;
    m.keep.push_back(aligned_bytes(b.bytes));
    std::memset(m.keep.back().get(), 0xff, b.bytes);
    m.o.results[b.index] = m.keep.back().get(), m.o.result_bytes[b.index] = b.bytes;
  }
  m.keep.push_back(aligned_bytes(p.header->workspace));
  m.o.workspace = m.keep.back().get(), m.o.workspace_bytes = p.header->workspace;
  return m;
}

// The number of launches that failed or gave other bits.
int stress(Program& p, int callers, int launches) {
  const auto args = inputs(p);
  LaunchOptions alone;
  alone.threads = 1;
  const Memory want = outputs(p, args);
  LaunchError e = launch(p, want.o, alone);
  if (e.kind != LaunchError::kNone) {
    std::printf("%s\n", e.text.c_str());
    return 1;
  }
  std::atomic<int> bad{0};
  std::vector<std::thread> threads;
  for (int c = 0; c < callers; ++c)
    threads.emplace_back([&, c] {
      for (int i = 0; i < launches; ++i) {
        const Memory have = outputs(p, args);
        LaunchOptions options;
        options.threads = 1 + static_cast<uint32_t>(c + i) % 4;
        const LaunchError error = launch(p, have.o, options);
        bool same = error.kind == LaunchError::kNone;
        for (size_t r = 0; same && r < have.o.results.size(); ++r)
          same = !std::memcmp(have.o.results[r], want.o.results[r], have.o.result_bytes[r]);
        if (!same) ++bad;
      }
    });
  for (std::thread& t : threads) t.join();
  return bad;
}

}  // namespace

int main(int argc, char** argv) {
  int failed = 0;
  for (int i = 1; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    const std::vector<char> blob((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    try {
      Program p(blob.data(), blob.size());
      const int bad = stress(p, 4, 25);
      std::printf("%s: %zu tasks, %d of 100 launches differ\n", argv[i], p.tasks.size, bad);
      failed += bad != 0;
    } catch (const ProgramError& e) {
      std::printf("%s: %s\n", argv[i], e.what());
    }
  }
  return failed;
}
