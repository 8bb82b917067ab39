// Which instruction sets this build has and this processor runs; and the sort, which no instruction set changes.
#include <algorithm>
#include <cstdlib>

#include "launch.h"

namespace mpk {

namespace plain { extern const Isa isa; }
#if defined(MPK_X86)
namespace avx2 { extern const Isa isa; }
namespace avx512 { extern const Isa isa; }
#elif defined(MPK_ARM)
namespace neon { extern const Isa isa; }
#endif

const Isa* isa_named(const std::string& name) {
  struct Entry {
    const Isa* isa;
    bool usable;
  };
  static const std::vector<Entry> all = [] {
    std::vector<Entry> out;
#if defined(MPK_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    out.push_back({&avx512::isa, avx2 && avx512});
    out.push_back({&avx2::isa, avx2});
#elif defined(MPK_ARM)
    out.push_back({&neon::isa, true});
#endif
    out.push_back({&plain::isa, true});
    return out;
  }();
  if (name.empty()) {
    static const Isa* best = [] {
      const char* option = std::getenv("JAX_MPK_ISA");
      if (option && *option)
        if (const Isa* wanted = isa_named(option)) return wanted;
      return std::find_if(all.begin(), all.end(), [](const Entry& e) { return e.usable; })->isa;
    }();
    return best;
  }
  for (const Entry& e : all)
    if (e.usable && name == e.isa->name) return e.isa;
  return nullptr;
}

void sort_keys(uint64_t* keys, int64_t n, int64_t count) {
  if (count < n / 8) std::partial_sort(keys, keys + count, keys + n);
  else std::sort(keys, keys + n);
}

}  // namespace mpk
