// The launch: operands to slot addresses, then the schedule on this thread and some of the pool.
#include "launch.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "pool.h"
#include "schedule.h"

namespace mpk {
namespace {

constexpr int64_t kShort = 100;  // us: a launch that is over sooner is not worth waking anybody

// Empty when the operands are what the program was compiled for.
std::string check(const Program& p, const Operands& o) {
  if (o.args.size() != p.header->args || o.results.size() != p.header->results)
    return "the program has " + std::to_string(p.header->args) + " operands and " + std::to_string(p.header->results) +
           " results, the call " + std::to_string(o.args.size()) + " and " + std::to_string(o.results.size());
  if (o.workspace_bytes < p.header->workspace)
    return "the workspace has " + std::to_string(o.workspace_bytes) + " bytes, not " +
           std::to_string(p.header->workspace);
  for (const abi::Buffer& b : p.buffers) {
    const auto space = static_cast<abi::Space>(b.space);
    const bool arg = space == abi::Space::ARG;
    if (!arg && space != abi::Space::RESULT) continue;
    const size_t bytes = arg ? o.arg_bytes[b.index] : o.result_bytes[b.index];
    const char* what = arg ? "operand " : "result ";
    if (bytes < b.bytes)
      return what + std::to_string(b.index) + " has " + std::to_string(bytes) + " bytes, not " +
             std::to_string(b.bytes);
    if (!arg && b.alias >= 0 && o.arg_bytes[b.alias] < b.bytes)
      return "operand " + std::to_string(b.alias) + " is too small for its result";
    if (reinterpret_cast<uintptr_t>(arg ? o.args[b.index] : o.results[b.index]) % (bytes >= 4 ? 4 : bytes >= 2 ? 2 : 1))
      return what + std::to_string(b.index) + " is not aligned";
  }
  return "";
}

}  // namespace

LaunchError launch(const std::shared_ptr<Program>& program, const Operands& o, const LaunchOptions& options) try {
  const Program& p = *program;
  const int64_t start = now_us();
  if (std::string bad = check(p, o); !bad.empty()) return {LaunchError::kArguments, bad};
  std::vector<char*> base(p.buffers.size), slots(p.slots.size);
  for (size_t i = 0; i < p.buffers.size; ++i) {
    const abi::Buffer& b = p.buffers[i];
    switch (static_cast<abi::Space>(b.space)) {
      case abi::Space::ARG: base[i] = o.args[b.index]; break;
      case abi::Space::RESULT:
        base[i] = o.results[b.index];
        if (b.alias >= 0 && b.bytes && o.args[b.alias] != base[i]) std::memmove(base[i], o.args[b.alias], b.bytes);
        break;
      case abi::Space::WORKSPACE: base[i] = o.workspace + b.offset; break;
      default: base[i] = const_cast<char*>(reinterpret_cast<const char*>(p.consts.data)) + b.offset;
    }
  }
  for (size_t i = 0; i < p.slots.size; ++i) slots[i] = base[p.slots[i].buffer] + p.slots[i].offset;

  uint32_t threads =
      options.threads ? std::min(options.threads, 255u) : std::min(default_threads(), std::max(1u, p.header->workers));
  threads = static_cast<uint32_t>(std::max<size_t>(1, std::min<size_t>(threads, p.tasks.size)));
  auto state = program->take_state();
  ++state->epoch;
  const auto schedule = [&](uint32_t n) {
    return std::make_shared<Schedule>(program, options.isa ? *options.isa : *isa_named(""), slots, state,
                                      options.deadline_ms, n, options.times);
  };
  std::shared_ptr<Schedule> s;
  if (options.seed >= 0) {
    s = schedule(1);
    s->work_in_random_order(static_cast<uint64_t>(options.seed));
  } else if (s = schedule(threads); offer(threads, s)) {
    s->rouse_at(program->took() < kShort ? start + kShort : start);
    s->work(0);
    withdraw(threads);
  } else {
    if (threads > 1) s = schedule(1);
    s->work(0);
  }
  program->took(now_us() - start);
  LaunchError e = s->error();
  if (e.kind == LaunchError::kNone) program->give_state(std::move(state));  // counters of another launch are dropped
  return e;
} catch (const OutOfMemory& e) {
  return {LaunchError::kMemory, "out of memory: a launch asked for " + std::to_string(e.bytes) + " bytes"};
} catch (const std::bad_alloc&) {
  return {LaunchError::kMemory, "out of memory"};
}

}  // namespace mpk
