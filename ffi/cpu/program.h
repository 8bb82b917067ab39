// A loaded program: the blob in aligned memory, typed views of its sections, and what was derived from it once.
//
// Invariant: a `Program` that exists is memory-safe to run. The constructor checks every index, every register and the
// extreme addresses of every access against its buffer, and throws ProgramError (with a text that says which record is
// wrong) otherwise. Programs are immutable but for the free list of launch states (launch.h) and the task lists.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "view.h"

namespace mpk {

struct ProgramError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class T>
struct Span {
  const T* data = nullptr;
  size_t size = 0;
  const T& operator[](size_t i) const { return data[i]; }
  const T* begin() const { return data; }
  const T* end() const { return data + size; }
};

// 64-byte aligned memory.
struct AlignedDelete {
  void operator()(char* p) const;
};
using AlignedBytes = std::unique_ptr<char[], AlignedDelete>;
AlignedBytes aligned_bytes(size_t n);

// Bytes of scratch that the largest task needs.
struct ScratchSize {
  int64_t act = 0, acc[MAX_ACC + 1] = {}, panel = 0, keys = 0, accesses = 0;
};

struct LaunchState;

class Program {
 public:
  Program(const void* blob, size_t bytes);
  ~Program();

  // The program of this content, from the process-wide table; loads it on the first call. An entry is reused only if
  // every byte is the same. Throws ProgramError.
  static std::shared_ptr<Program> get(const void* blob, size_t bytes);

  // The same for a blob that `get` has accepted in this process, so that its hash (256 bits) is known to be that of its
  // content: finds it by the hash, without a look at the rest.
  static std::shared_ptr<Program> again(const void* blob, size_t bytes);

  // How many programs the table keeps.
  static size_t kept();

  // Task numbers of each of `threads` threads, in record order.
  const std::vector<std::vector<uint32_t>>& lists(uint32_t threads);

  // Event counters of one launch; give them back after a successful launch only.
  std::unique_ptr<LaunchState> take_state();
  void give_state(std::unique_ptr<LaunchState> state);

  std::string task_name(uint32_t task) const;
  size_t const_bytes() const { return consts.size; }

  const abi::Header* header = nullptr;
  Span<abi::Buffer> buffers;
  Span<abi::Slot> slots;
  Span<abi::Access> accesses;
  Span<abi::Instr> instrs;
  Span<abi::Stage> stages;
  Span<abi::Code> codes;
  Span<abi::Op> ops;
  Span<abi::Task> tasks;
  Span<abi::Event> events;
  Span<abi::Const> consts;
  Span<abi::Name> names;
  std::vector<OpInfo> info;
  ScratchSize scratch;
  View view{};

 private:
  void check_buffers();
  void check_tasks();

  AlignedBytes blob_;
  std::mutex mutex_;
  std::map<uint32_t, std::vector<std::vector<uint32_t>>> lists_;
  std::vector<std::unique_ptr<LaunchState>> states_;
};

// check_ops.cc: fills in `info` and `scratch`, throws ProgramError.
void check_ops(Program& p);

[[noreturn]] void program_error(const char* format, ...) __attribute__((format(printf, 1, 2)));

inline int dtype_bytes(uint8_t dtype) {
  constexpr int bytes[] = {4, 2, 2, 4, 2, 1, 4, 2, 1, 1};
  return dtype < sizeof bytes / sizeof bytes[0] ? bytes[dtype] : 0;
}

}  // namespace mpk
