// Launching a loaded program: binds operands, runs every task once under the event protocol, reports what went wrong.
//
// A launch ends: it fails when no task has ended for the deadline, and then also leaves the tasks that are running. It
// fails when a worker finds no memory; nothing is thrown across threads.
// Called by the XLA handler (handler.cc), by the test entry of the extension module (module.cc), and by the standalone
// ThreadSanitizer binary. A launch that fails leaves nothing behind: the next one starts with fresh counters.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "program.h"

namespace mpk {

// Event counters, and the epoch of the launch that last claimed each task. Of one launch at a time; `epoch` counts the
// launches that used them.
struct LaunchState {
  explicit LaunchState(const Program& p) : counters(p.events.size, 0), claims(p.tasks.size, 0) {}
  std::vector<uint32_t> counters, claims;
  uint32_t epoch = 0;
};

struct Operands {
  std::vector<char*> args, results;
  std::vector<size_t> arg_bytes, result_bytes;
  char* workspace = nullptr;
  size_t workspace_bytes = 0;
};

struct LaunchOptions {
  uint32_t threads = 0;         // 0: default_threads()
  int64_t deadline_ms = 60000;  // without any task finishing
  int64_t seed = -1;            // >= 0: one thread, in a random order that the events allow
  const Isa* isa = nullptr;     // null: the best for this processor
  uint64_t* times = nullptr;    // [tasks][3]: when each began and ended (steady clock, ns), and its worker
};

struct LaunchError {
  enum Kind { kNone, kArguments, kDeadline, kMemory } kind = kNone;
  std::string text;
};

LaunchError launch(const std::shared_ptr<Program>& p, const Operands& operands, const LaunchOptions& options);

// The instruction set named `name` (null when this processor or build has none), the best one for "".
const Isa* isa_named(const std::string& name);

}  // namespace mpk
