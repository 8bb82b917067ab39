// mpk_fuzz [--seed N] [--from N] [--trials N] PROGRAM...: damages programs, gives them the hash of their new content, loads
// them, and runs what loads. A program may be refused or compute garbage; it may not touch memory that is not its own, nor
// run for ever. Built with -fsanitize=address,undefined and nothing recovered, the first error ends the process, and the
// last line says which trial it was: `--seed S --from T --trials 1` repeats it (with the same files in the same order).
// At the end: how many programs were refused, by which check, and how many ran. See CMakeLists.txt,
// tests/unit/test_executor_damaged.py.
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <regex>
#include <string>

#define MPK_ABI_FIELDS
#include "operands.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

using namespace mpk;

namespace {

constexpr unsigned kTooLong = 120;                  // seconds of a trial
constexpr size_t kMemory = 64 << 20;                // bytes of operands and results of what is run
constexpr int64_t kDeadline = 20;                   // ms
uint64_t seed = 1, trial = 0;

void say_trial() {
  char text[96];
  const int n = std::snprintf(text, sizeof text, "\nmpk_fuzz: --seed %llu --from %llu --trials 1\n", (unsigned long long)seed,
                              (unsigned long long)trial);
  if (write(2, text, static_cast<size_t>(n)) < 0) _exit(4);
}

void on_signal(int number) {
  say_trial();
  _exit(number == SIGALRM ? 3 : 2);
}

class Random {
 public:
  explicit Random(uint64_t stream) : engine_(stream) {}
  uint64_t bits() { return engine_(); }
  size_t below(size_t n) { return static_cast<size_t>(engine_() % n); }
  bool once_in(size_t n) { return below(n) == 0; }

 private:
  std::mt19937_64 engine_;
};

// A number that is likely to be one too many, too large, negative, or plausible.
uint64_t interesting(Random& r, uint64_t now, uint64_t elsewhere) {
  switch (r.below(14)) {
    case 0: return 0;
    case 1: return 1;
    case 2: return ~uint64_t{0};
    case 3: return uint64_t{1} << 63 | uint64_t{1} << 31 | uint64_t{1} << 15 | uint64_t{1} << 7;  // least, of any width
    case 4: return ~(uint64_t{1} << 63 | uint64_t{1} << 31 | uint64_t{1} << 15 | uint64_t{1} << 7);
    case 5: return now + 1;
    case 6: return now - 1;
    case 7: return now ^ uint64_t{1} << r.below(64);
    case 8: return r.bits();
    case 9: return r.below(20);
    case 10: return (uint64_t{1} << r.below(64)) - r.below(2);
    case 11: return now * 2;
    case 12: return -now;
    default: return elsewhere;
  }
}

struct Damage {
  std::vector<char>& blob;
  Random& r;
  const abi::Header h = *reinterpret_cast<const abi::Header*>(blob.data());  // where things are, whatever becomes of it

  char* record(const abi::Field& f, size_t n) {
    return blob.data() + (f.section < 0 ? 0 : h.section_offset[f.section] + n * f.record);
  }

  void edit(const std::vector<abi::Field>& fields, const std::vector<size_t>& counts) {
    const size_t i = r.below(fields.size());
    const abi::Field& f = fields[i];
    const size_t n = r.below(counts[i]), m = r.below(counts[i]);
    if (f.section >= 0 && r.once_in(12)) {  // whole records: swapped, or one over the other
      std::vector<char> one(record(f, n), record(f, n) + f.record);
      std::memmove(record(f, n), record(f, m), f.record);
      if (r.once_in(2)) std::memcpy(record(f, m), one.data(), f.record);
      return;
    }
    const size_t at = f.offset + f.bytes * r.below(f.count);
    uint64_t now = 0, elsewhere = 0;
    std::memcpy(&now, record(f, n) + at, f.bytes);
    std::memcpy(&elsewhere, record(f, m) + at, f.bytes);
    now = interesting(r, now, elsewhere);
    std::memcpy(record(f, n) + at, &now, f.bytes);
  }

  void run() {
    // Sections first, then fields, so that wide records do not get everything. Constants and names hardly matter.
    std::map<int, std::pair<std::vector<abi::Field>, size_t>> sections;
    for (const abi::Field& f : abi::FIELDS) {
      const size_t count = f.section < 0 ? 1 : h.section_count[f.section];
      if (!count) continue;
      auto& [fields, n] = sections[f.section];
      fields.push_back(f), n = count;
    }
    for (size_t edits = r.once_in(2) ? 1 : 1 + r.below(4); edits; --edits) {
      auto at = sections.begin();
      std::advance(at, r.below(sections.size()));
      const bool dull = at->first == static_cast<int>(abi::Section::Const) || at->first == static_cast<int>(abi::Section::Name) || at->first < 0;
      if (dull && !r.once_in(4)) continue;
      edit(at->second.first, std::vector<size_t>(at->second.first.size(), at->second.second));
    }
    // What the checks of the header itself refuse at once is worth a few trials only.
    auto& head = *reinterpret_cast<abi::Header*>(blob.data());
    if (!r.once_in(16)) head.magic = h.magic, head.version = h.version, head.bytes = h.bytes, head.ranks = h.ranks, head.iterations = h.iterations;
    head.hash = content_hash(blob.data(), blob.size());
  }
};

struct Counts {
  uint64_t refused = 0, ran = 0, late = 0, memory = 0, large = 0;
  std::map<std::string, uint64_t> why;
};

// A message without its numbers.
std::string kind_of(const std::string& text) {
  return std::regex_replace(text, std::regex("-?(0x[0-9a-f]+|[0-9]+)"), "#");
}

bool fits(const Program& p) {
  size_t total = p.header->workspace;
  for (const auto& list : {operand_bytes(p), result_bytes(p)})
    for (size_t n : list) total += n + 64;
  return total <= kMemory;
}

void run(const std::vector<char>& blob, Random& r, Counts& counts) {
  std::unique_ptr<Program> p;
  try {
    p = std::make_unique<Program>(blob.data(), blob.size());
  } catch (const ProgramError& e) {
    ++counts.refused, ++counts.why[kind_of(e.what())];
    return;
  }
  if (!fits(*p)) {
    ++counts.large;
    return;
  }
  const auto args = operands(*p);
  const Memory memory = memory_for(*p, args);
  LaunchOptions options;
  options.deadline_ms = kDeadline;
  options.threads = static_cast<uint32_t>(1 + r.below(3));
  options.seed = r.once_in(4) ? static_cast<int64_t>(r.below(1000)) : -1;
  options.isa = r.once_in(3) ? isa_named("plain") : isa_named("");
  for (size_t launches = 1 + r.below(2); launches; --launches) {
    const LaunchError e = launch(*p, memory.o, options);
    if (e.kind == LaunchError::kDeadline) ++counts.late;
    if (e.kind == LaunchError::kMemory) ++counts.memory;
    if (e.kind == LaunchError::kArguments) std::printf("unexpected: %s\n", e.text.c_str()), std::abort();
    if (e.kind != LaunchError::kNone) break;
  }
  ++counts.ran;
}

// Bits of the results of a program that is as it was.
std::vector<char> results(const std::vector<char>& blob) {
  Program p(blob.data(), blob.size());
  const auto args = operands(p);
  const Memory memory = memory_for(p, args);
  if (launch(p, memory.o, {}).kind != LaunchError::kNone) std::abort();
  std::vector<char> out;
  for (size_t i = 0; i < memory.o.results.size(); ++i) out.insert(out.end(), memory.o.results[i], memory.o.results[i] + memory.o.result_bytes[i]);
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t from = 0, trials = 1000;
  std::vector<std::vector<char>> blobs;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    uint64_t* number = word == "--seed" ? &seed : word == "--from" ? &from : word == "--trials" ? &trials : nullptr;
    if (!number) blobs.push_back(read_file(argv[i]));
    else if (++i < argc) *number = std::strtoull(argv[i], nullptr, 10);
  }
  if (blobs.empty()) return std::fprintf(stderr, "mpk_fuzz: no programs\n"), 1;
  std::vector<std::vector<char>> want;
  for (const auto& b : blobs) want.push_back(results(b));
  signal(SIGALRM, on_signal);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(say_trial);
#else
  for (int s : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) signal(s, on_signal);
#endif
  Counts counts;
  for (trial = from; trial < from + trials; ++trial) {
    alarm(kTooLong);
    std::seed_seq sequence{seed, trial};
    uint64_t stream[1];
    sequence.generate(reinterpret_cast<uint32_t*>(stream), reinterpret_cast<uint32_t*>(stream) + 2);
    Random r(stream[0]);
    const size_t which = r.below(blobs.size());
    std::vector<char> blob = blobs[which];
    Damage{blob, r}.run();
    run(blob, r, counts);
    if (trial % 1000 == 999 && results(blobs[which]) != want[which]) {  // damage stays with the damaged
      std::fprintf(stderr, "an intact program has other results\n");
      return say_trial(), 1;
    }
  }
  for (const auto& [text, n] : counts.why) std::printf("%8llu  %s\n", (unsigned long long)n, text.c_str());
  std::printf("%llu damaged programs of %zu, seed %llu: %llu refused, %llu ran (%llu of their launches ended by the deadline, %llu for want of "
              "memory), %llu not run because of the size of their operands\n",
              (unsigned long long)trials, blobs.size(), (unsigned long long)seed, (unsigned long long)counts.refused,
              (unsigned long long)counts.ran, (unsigned long long)counts.late, (unsigned long long)counts.memory, (unsigned long long)counts.large);
}
