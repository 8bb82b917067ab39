// A loaded program: the blob in aligned memory, typed views of its sections, and what was derived from it once.
//
// Invariant: a `Program` that exists is memory-safe to run, whatever its bytes are (a matching hash proves nothing), and
// every launch of it ends. The constructor throws ProgramError, with a text that says which record is wrong, unless
//   - sections are inside of the blob, and every number in a record is an index of something that is there;
//   - enumerations have a member, counts fit the arrays of their record, ranges are not negative;
//   - registers have a value when they are read, in the file and below the number that the code declares;
//   - the extreme elements of every access are inside of its buffer or scratch and aligned for their type, stores do not go
//     to operands or constants, and the terms of every access, also one that only INDEX uses, add up without overflow;
//   - operators have the tiles and the flattened strides that their kind relies on, equal prologues equal activations;
//   - an event is triggered no more often than its waits want: counters go on from launch to launch;
//   - names end;
//   - scratch, constants, workspace and the checks themselves are bounded.
// What an operand or a missing store makes of a value is not checked: coordinates from registers are clamped, and garbage
// stays a value. A launch ends because its tasks and waits look at the deadline (launch.h). Sizes and alignment of the
// operands are checked by `launch`. Programs are immutable but for the free list of launch states and the task lists.
#pragma once
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "view.h"

namespace mpk {

struct ProgramError : std::runtime_error { using std::runtime_error::runtime_error; };

template <class T>
struct Span {
  const T* data = nullptr;
  size_t size = 0;
  const T& operator[](size_t i) const { return data[i]; }
  const T* begin() const { return data; }
  const T* end() const { return data + size; }
};

struct OutOfMemory : std::bad_alloc {
  explicit OutOfMemory(size_t bytes) : bytes(bytes) {}
  const char* what() const noexcept override { return "out of memory"; }
  size_t bytes;  // that were asked for
};

// 64-byte aligned memory; throws OutOfMemory.
struct AlignedDelete { void operator()(char* p) const; };
using AlignedBytes = std::unique_ptr<char[], AlignedDelete>;
AlignedBytes aligned_bytes(size_t n);

// Scratch that the largest task needs: bytes of act, acc and panel, numbers of keys and accesses.
struct ScratchSize { int64_t act = 0, acc[MAX_ACC + 1] = {}, panel = 0, keys = 0, accesses = 0; };

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
  std::shared_ptr<LaunchState> take_state();
  void give_state(std::shared_ptr<LaunchState> state);

  // Microseconds of the last launch.
  int64_t took() const { return took_.load(std::memory_order_relaxed); }
  void took(int64_t us) { took_.store(us, std::memory_order_relaxed); }

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
  std::vector<CodeInfo> code_info;
  ScratchSize scratch;
  View view{};

 private:
  void check_buffers();
  void check_tasks();

  AlignedBytes blob_;
  std::atomic<int64_t> took_{INT64_MAX};
  std::mutex mutex_;
  std::map<uint32_t, std::vector<std::vector<uint32_t>>> lists_;
  std::vector<std::shared_ptr<LaunchState>> states_;
};

// check_ops.cc: fills in `info`, `code_info` and `scratch`, throws ProgramError.
void check_ops(Program& p);

[[noreturn]] void program_error(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace mpk
