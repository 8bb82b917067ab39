// mpk_stress PROGRAM...: launches saved programs from many threads at once and compares every result, bit for bit, with
// a launch on one thread. Built with -fsanitize=thread or address it checks the event protocol, the pool and the
// loader (see CMakeLists.txt, tests/unit/test_executor_launch.py). Prints one line a program.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <thread>

#include "operands.h"

using namespace mpk;

namespace {

// The number of launches that failed or gave other bits.
int stress(const std::shared_ptr<Program>& program, int callers, int launches) {
  const Program& p = *program;
  const auto args = operands(p);
  LaunchOptions alone;
  alone.threads = 1;
  const Memory want = memory_for(p, args);
  LaunchError e = launch(program, want.o, alone);
  if (e.kind != LaunchError::kNone) {
    std::printf("%s\n", e.text.c_str());
    return 1;
  }
  std::atomic<int> bad{0};
  std::vector<std::thread> threads;
  for (int c = 0; c < callers; ++c)
    threads.emplace_back([&, c] {
      for (int i = 0; i < launches; ++i) {
        const Memory have = memory_for(p, args);
        LaunchOptions options;
        options.threads = 1 + static_cast<uint32_t>(c + i) % 4;
        const LaunchError error = launch(program, have.o, options);
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
    const std::vector<char> blob = read_file(argv[i]);
    try {
      const auto p = std::make_shared<Program>(blob.data(), blob.size());
      const int bad = stress(p, 4, 25);
      std::printf("%s: %zu tasks, %d of 100 launches differ\n", argv[i], p->tasks.size, bad);
      failed += bad != 0;
    } catch (const ProgramError& e) {
      std::printf("%s: %s\n", argv[i], e.what());
    }
  }
  return failed;
}
