// mpk_fuzz [--seed N] [--from N] [--trials N] PROGRAM...: damages programs, gives them the hash of their new content, loads
// them, and runs what loads. A program may be refused or compute garbage; it may not touch memory that is not its own, nor
// run for ever. Built with -fsanitize=address,undefined and nothing recovered, the first error ends the process that does
// it, and its parent says which trial that was: `--seed S --from T --trials 1` repeats it (same files, same order).
// At the end: how many programs were refused, by which check, and how many ran. See CMakeLists.txt,
// tests/unit/test_executor_damaged.py.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <regex>
#include <string>

#define MPK_ABI_FIELDS
#include "operands.h"
#include "../sha256.h"

using namespace mpk;

namespace {

constexpr unsigned kTooLong = 120;    // seconds of a trial
constexpr size_t kMemory = 64 << 20;  // bytes of operands and results of what is run
constexpr int64_t kDeadline = 20;     // ms

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
uint64_t interesting(Random& r, int bits, uint64_t now, uint64_t elsewhere) {
  switch (r.below(14)) {
    case 0: return 0;
    case 1: return 1;
    case 2: return ~uint64_t{0};
    case 3: return uint64_t{1} << (bits - 1);
    case 4: return (uint64_t{1} << (bits - 1)) - 1;
    case 5: return now + 1;
    case 6: return now - 1;
    case 7: return now ^ uint64_t{1} << r.below(static_cast<size_t>(bits));
    case 8: return r.bits();
    case 9: return r.below(20);
    case 10: return (uint64_t{1} << r.below(static_cast<size_t>(bits))) - r.below(2);
    case 11: return now * 2;
    case 12: return -now;
    default: return elsewhere;
  }
}

constexpr int section(abi::Section s) { return static_cast<int>(s); }

class Damage {
 public:
  Damage(std::vector<char>& blob, Random& r)
      : blob_(blob), r_(r), h_(*reinterpret_cast<const abi::Header*>(blob.data())) {
    for (const abi::Field& f : abi::FIELDS)
      if (count(f.section)) fields_[f.section].push_back(f);
  }

  void run() {
    for (size_t edits = r_.once_in(2) ? 1 : 1 + r_.below(4); edits; --edits) r_.once_in(3) ? aimed() : anywhere();
    // What the checks of the header itself refuse at once is worth a few trials only.
    auto& head = *reinterpret_cast<abi::Header*>(blob_.data());
    if (!r_.once_in(16)) head.magic = h_.magic, head.version = h_.version, head.bytes = h_.bytes;
    const Digest d = content_hash(blob_.data(), blob_.size());
    std::memcpy(head.hash, d.data(), d.size());
  }

 private:
  std::vector<char>& blob_;
  Random& r_;
  const abi::Header h_;  // where things are, whatever becomes of them
  std::map<int, std::vector<abi::Field>> fields_;

  size_t count(int which) const { return which < 0 ? 1 : h_.section_count[which]; }

  char* record(const abi::Field& f, size_t n) {
    return blob_.data() + (f.section < 0 ? 0 : h_.section_offset[f.section] + n * f.record);
  }

  // Element `i` of a field of record `n`: something interesting, or what stands in another element or another record.
  void edit(const abi::Field& f, size_t n, size_t i, size_t elements) {
    char* at = record(f, n) + f.offset + f.bytes * i;
    char* other = r_.once_in(2) ? record(f, r_.below(count(f.section))) + f.offset + f.bytes * i
                                : record(f, n) + f.offset + f.bytes * r_.below(elements);
    uint64_t now = 0, elsewhere = 0;
    std::memcpy(&now, at, f.bytes);
    std::memcpy(&elsewhere, other, f.bytes);
    if (r_.once_in(8)) std::memcpy(other, &now, f.bytes), now = elsewhere;
    else now = interesting(r_, 8 * f.bytes, now, elsewhere);
    std::memcpy(at, &now, f.bytes);
  }

  // Any field of any record: sections first, so that long ones do not get everything.
  void anywhere() {
    auto at = fields_.begin();
    std::advance(at, r_.below(fields_.size()));
    const bool dull =
        at->first == section(abi::Section::Const) || at->first == section(abi::Section::Name) || at->first < 0;
    if (dull && !r_.once_in(4)) return;
    const abi::Field& f = at->second[r_.below(at->second.size())];
    const size_t n = r_.below(count(f.section));
    if (f.section >= 0 && r_.once_in(12)) {  // whole records: swapped, or one over the other
      const size_t m = r_.below(count(f.section));
      std::vector<char> one(record(f, n), record(f, n) + f.record);
      std::memmove(record(f, n), record(f, m), f.record);
      if (r_.once_in(2)) std::memcpy(record(f, m), one.data(), f.record);
      return;
    }
    edit(f, n, r_.below(f.count), f.count);
  }

  // What an operator with a core relies on: its tiles, extents and parameters, and the strides of its accesses.
  void aimed() {
    std::vector<size_t> ops;
    for (size_t n = 0; n < count(section(abi::Section::Op)); ++n)
      if (op(n).kind >= static_cast<uint8_t>(abi::Kind::CONTRACT)) ops.push_back(n);
    if (ops.empty()) return anywhere();
    const size_t n = ops[r_.below(ops.size())];
    const abi::Op o = op(n);
    const bool access = o.accesses && o.access < count(section(abi::Section::Access)) && r_.once_in(2);
    constexpr uint16_t of_op[] = {offsetof(abi::Op, extent), offsetof(abi::Op, tile), offsetof(abi::Op, params),
                                  offsetof(abi::Op, prologue)};
    constexpr uint16_t of_access[] = {offsetof(abi::Access, stride), offsetof(abi::Access, stride),
                                      offsetof(abi::Access, offset), offsetof(abi::Access, dtype)};
    const int which = section(access ? abi::Section::Access : abi::Section::Op);
    const uint16_t offset = (access ? of_access : of_op)[r_.below(4)];
    for (const abi::Field& f : fields_[which]) {
      if (f.offset != offset) continue;
      const size_t used = f.count == abi::MAX_AXES && o.n_axes && o.n_axes <= abi::MAX_AXES ? o.n_axes : f.count;
      edit(f, access ? std::min<size_t>(o.access + r_.below(o.accesses), count(which) - 1) : n, r_.below(used), used);
    }
  }

  abi::Op op(size_t n) const {
    abi::Op out;
    std::memcpy(&out, blob_.data() + h_.section_offset[section(abi::Section::Op)] + n * sizeof out, sizeof out);
    return out;
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
  std::shared_ptr<Program> p;
  try {
    p = std::make_shared<Program>(blob.data(), blob.size());
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
    const LaunchError e = launch(p, memory.o, options);
    if (e.kind == LaunchError::kDeadline) ++counts.late;
    if (e.kind == LaunchError::kMemory) ++counts.memory;
    if (e.kind == LaunchError::kArguments) std::printf("unexpected: %s\n", e.text.c_str()), std::abort();
    if (e.kind != LaunchError::kNone) break;
  }
  ++counts.ran;
}

// Bits of the results of a program that is as it was.
std::vector<char> results(const std::vector<char>& blob) {
  const auto p = std::make_shared<Program>(blob.data(), blob.size());
  const auto args = operands(*p);
  const Memory memory = memory_for(*p, args);
  if (launch(p, memory.o, {}).kind != LaunchError::kNone) std::abort();
  std::vector<char> out;
  for (size_t i = 0; i < memory.o.results.size(); ++i)
    out.insert(out.end(), memory.o.results[i], memory.o.results[i] + memory.o.result_bytes[i]);
  return out;
}

// Runs the trials, the number of each in `*trial` before it begins; false when an intact program has other results.
bool fuzz(const std::vector<std::vector<char>>& blobs, uint64_t seed, uint64_t from, uint64_t trials,
          volatile uint64_t* trial) {
  std::vector<std::vector<char>> want;
  for (const auto& b : blobs) want.push_back(results(b));
  Counts counts;
  for (uint64_t t = from; t < from + trials; ++t) {
    *trial = t;
    alarm(kTooLong);
    Random r(seed << 40 ^ t);
    const size_t which = r.below(blobs.size());
    std::vector<char> blob = blobs[which];
    Damage(blob, r).run();
    run(blob, r, counts);
    if (t % 1000 == 999 && results(blobs[which]) != want[which]) return false;  // damage stays with the damaged
  }
  for (const auto& [text, n] : counts.why) std::printf("%8llu  %s\n", (unsigned long long)n, text.c_str());
  std::printf(
      "%llu damaged programs of %zu, seed %llu: %llu refused, %llu ran (%llu of their launches ended by the deadline, "
      "%llu for want of "
      "memory), %llu not run because of the size of their operands\n",
      (unsigned long long)trials, blobs.size(), (unsigned long long)seed, (unsigned long long)counts.refused,
      (unsigned long long)counts.ran, (unsigned long long)counts.late, (unsigned long long)counts.memory,
      (unsigned long long)counts.large);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t seed = 1, from = 0, trials = 1000;
  std::vector<std::vector<char>> blobs;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    uint64_t* number = word == "--seed" ? &seed : word == "--from" ? &from : word == "--trials" ? &trials : nullptr;
    if (!number) blobs.push_back(read_file(argv[i]));
    else if (++i < argc) *number = std::strtoull(argv[i], nullptr, 10);
  }
  if (blobs.empty()) return std::fprintf(stderr, "mpk_fuzz: no programs\n"), 1;
  auto* trial = static_cast<uint64_t*>(
      mmap(nullptr, sizeof(uint64_t), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  if (trial == MAP_FAILED) return std::perror("mmap"), 1;
  const pid_t child = fork();
  if (child < 0) return std::perror("fork"), 1;
  if (!child) return fuzz(blobs, seed, from, trials, trial) ? 0 : 1;
  int status = 0;
  waitpid(child, &status, 0);
  if (!status) return 0;
  std::fprintf(stderr, "mpk_fuzz: %s %d in trial --seed %llu --from %llu --trials 1\n",
               WIFSIGNALED(status) ? "signal" : "status", WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status),
               (unsigned long long)seed, (unsigned long long)*trial);
  return 1;
}
