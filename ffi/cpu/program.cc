// Loading: header, sections, buffers and tasks of a blob; the process-wide table of loaded programs.
#include "program.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <new>

#include "launch.h"
#include "../sha256.h"

namespace mpk {

void program_error(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  throw ProgramError(std::string("damaged program: ") + text);
}

void AlignedDelete::operator()(char* p) const { std::free(p); }

AlignedBytes aligned_bytes(size_t n) {
  void* p = nullptr;  // not rounded up: a sanitizer sees the byte after the last one
  if (posix_memalign(&p, 64, n ? n : 1)) throw OutOfMemory(n);
  return AlignedBytes(static_cast<char*>(p));
}

namespace {

template <class T>
Span<T> section(const abi::Header& h, const char* base, abi::Section which) {
  const auto i = static_cast<size_t>(which);
  const uint64_t at = h.section_offset[i], n = h.section_count[i];
  if (!n) return {};
  if (at % 64 || at < sizeof(abi::Header) || at > h.bytes || n > (h.bytes - at) / sizeof(T))
    program_error("section %zu (%llu records at %llu) is outside of the %llu bytes", i, (unsigned long long)n,
                  (unsigned long long)at, (unsigned long long)h.bytes);
  return {reinterpret_cast<const T*>(base + at), static_cast<size_t>(n)};
}

}  // namespace

Program::Program(const void* blob, size_t bytes) {
  if (bytes < sizeof(abi::Header)) program_error("it has %zu bytes, a header has %zu", bytes, sizeof(abi::Header));
  blob_ = aligned_bytes(bytes);
  std::memcpy(blob_.get(), blob, bytes);
  header = reinterpret_cast<const abi::Header*>(blob_.get());
  const abi::Header& h = *header;
  if (h.magic != abi::MAGIC) program_error("it does not begin with the magic number");
  if (h.version != abi::VERSION)
    throw ProgramError("the program has format version " + std::to_string(h.version) + ", this executor runs version " +
                       std::to_string(abi::VERSION));
  if (h.bytes != bytes) program_error("the header says %llu bytes, there are %zu", (unsigned long long)h.bytes, bytes);
  if (!undamaged(blob_.get(), bytes)) program_error("the content does not match its hash");
  if (h.workspace >> 40 || h.args > 1 << 20 || h.results > 1 << 20) program_error("the header is out of range");

  const char* base = blob_.get();
  buffers = section<abi::Buffer>(h, base, abi::Section::Buffer);
  slots = section<abi::Slot>(h, base, abi::Section::Slot);
  accesses = section<abi::Access>(h, base, abi::Section::Access);
  instrs = section<abi::Instr>(h, base, abi::Section::Instr);
  stages = section<abi::Stage>(h, base, abi::Section::Stage);
  codes = section<abi::Code>(h, base, abi::Section::Code);
  ops = section<abi::Op>(h, base, abi::Section::Op);
  tasks = section<abi::Task>(h, base, abi::Section::Task);
  events = section<abi::Event>(h, base, abi::Section::Event);
  consts = section<abi::Const>(h, base, abi::Section::Const);
  names = section<abi::Name>(h, base, abi::Section::Name);
  // Not for CPUs, but a program is damaged or it is not.
  section<abi::TensorMap>(h, base, abi::Section::TensorMap);
  section<abi::Stream>(h, base, abi::Section::Stream);
  section<abi::Unit>(h, base, abi::Section::Unit);

  check_buffers();
  check_ops(*this);
  check_tasks();
  view = View{ops.data, info.data(), codes.data, code_info.data(), stages.data, instrs.data, accesses.data};
}

Program::~Program() = default;

void Program::check_buffers() {
  if (names.size && names[names.size - 1].byte) program_error("the last name does not end");
  for (size_t i = 0; i < ops.size; ++i)
    if (ops[i].name >= names.size) program_error("operator %zu has a name beyond the end", i);
  for (size_t i = 0; i < buffers.size; ++i) {
    const abi::Buffer& b = buffers[i];
    if (b.name >= names.size) program_error("buffer %zu has a name beyond the end", i);
    const auto space = static_cast<abi::Space>(b.space);
    if (b.bytes >> 40 || b.offset >> 40) program_error("buffer %zu is too large", i);
    uint64_t limit = 0;
    if (space == abi::Space::ARG) {
      if (b.index >= header->args) program_error("buffer %zu is operand %u of %u", i, b.index, header->args);
      continue;
    }
    if (space == abi::Space::RESULT) {
      if (b.index >= header->results) program_error("buffer %zu is result %u of %u", i, b.index, header->results);
      if (b.alias < -1 || b.alias >= static_cast<int64_t>(header->args))
        program_error("buffer %zu is an alias of operand %d of %u", i, b.alias, header->args);
      continue;
    }
    if (space == abi::Space::WORKSPACE) limit = header->workspace;
    else if (space == abi::Space::CONST) limit = consts.size;
    else program_error("buffer %zu has space %u", i, b.space);
    if (b.offset > limit || b.bytes > limit - b.offset)
      program_error("buffer %zu ends at byte %llu of %llu", i, (unsigned long long)(b.offset + b.bytes),
                    (unsigned long long)limit);
    if (b.offset % 4) program_error("buffer %zu is not aligned", i);
  }
  for (size_t i = 0; i < slots.size; ++i) {
    const abi::Slot& s = slots[i];
    if (s.buffer >= buffers.size) program_error("slot %zu names buffer %u of %zu", i, s.buffer, buffers.size);
    if (s.offset < 0 || static_cast<uint64_t>(s.offset) > buffers[s.buffer].bytes)
      program_error("slot %zu is outside of its buffer", i);
  }
}

void Program::check_tasks() {
  std::vector<uint32_t> triggers(events.size);
  for (size_t i = 0; i < tasks.size; ++i) {
    const abi::Task& t = tasks[i];
    if (t.op >= ops.size || t.index >= info[t.op].tasks)
      program_error("task %zu names operator %u[%u]", i, t.op, t.index);
    if (t.n_waits > abi::MAX_WAITS || t.n_triggers > abi::MAX_TRIGGERS)
      program_error("task %zu has too many events", i);
    for (int j = 0; j < t.n_waits; ++j)
      if (t.wait[j] >= events.size) program_error("task %zu waits for event %u of %zu", i, t.wait[j], events.size);
    for (int j = 0; j < t.n_triggers; ++j)
      if (t.trigger[j] >= events.size) program_error("task %zu triggers event %u of %zu", i, t.trigger[j], events.size);
      else ++triggers[t.trigger[j]];
  }
  // Too few triggers end with the deadline. Too many would be counted by the next launch, whose waits would not wait.
  for (size_t e = 0; e < events.size; ++e)
    if (triggers[e] > events[e].threshold)
      program_error("event %zu is triggered %u times, its threshold is %u", e, triggers[e], events[e].threshold);
  for (size_t i = 0; i < tasks.size; ++i)
    for (int j = 0; j < tasks[i].n_waits; ++j)
      if (const uint32_t e = tasks[i].wait[j]; tasks[i].want[j] != events[e].threshold)
        program_error("task %zu waits for %u triggers of event %u, its threshold is %u", i, tasks[i].want[j], e,
                      events[e].threshold);
}

std::string Program::task_name(uint32_t task) const {
  const abi::Task& t = tasks[task];
  std::string name;
  for (size_t at = ops[t.op].name; names[at].byte && name.size() < 200; ++at) {
    char text[8];  // error messages are UTF-8 for whoever shows them, names may be anything
    std::snprintf(text, sizeof text, names[at].byte < 0x20 || names[at].byte > 0x7e ? "\\x%02x" : "%c", names[at].byte);
    name += text;
  }
  if (name.empty()) name = "op " + std::to_string(t.op);
  return "task " + std::to_string(task) + " (" + name + "[" + std::to_string(t.index) + "])";
}

const std::vector<std::vector<uint32_t>>& Program::lists(uint32_t threads) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto hit = lists_.find(threads);
  if (hit != lists_.end()) return hit->second;
  std::vector<std::vector<uint32_t>> out(threads);
  for (size_t i = 0; i < tasks.size; ++i) out[tasks[i].worker % threads].push_back(static_cast<uint32_t>(i));
  return lists_.emplace(threads, std::move(out)).first->second;
}

std::shared_ptr<LaunchState> Program::take_state() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (states_.empty()) return std::make_shared<LaunchState>(*this);
  auto out = std::move(states_.back());
  states_.pop_back();
  return out;
}

void Program::give_state(std::shared_ptr<LaunchState> state) {
  std::lock_guard<std::mutex> lock(mutex_);
  states_.push_back(std::move(state));
}

namespace {

// The programs of this process, most recently used first. Running programs stay alive beyond the bounds: launches hold
// a reference. The table outlives static destruction: XLA's threads may still launch.
struct Table {
  static constexpr size_t kPrograms = 256, kBytes = size_t{256} << 20;

  std::mutex mutex;
  std::list<std::shared_ptr<Program>> recent;
  std::map<Digest, std::list<std::shared_ptr<Program>>::iterator> by_hash;
  size_t bytes = 0;

  std::shared_ptr<Program> find(const Digest& hash) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto hit = by_hash.find(hash);
    if (hit == by_hash.end()) return nullptr;
    recent.splice(recent.begin(), recent, hit->second);
    return *hit->second;
  }

  // The entry of this hash: `program`, or that of a thread that was first.
  std::shared_ptr<Program> add(const Digest& hash, std::shared_ptr<Program> program) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto hit = by_hash.find(hash);
    if (hit != by_hash.end()) return *hit->second;
    recent.push_front(program);
    by_hash[hash] = recent.begin();
    bytes += program->header->bytes;
    while (recent.size() > 1 && (recent.size() > kPrograms || bytes > kBytes)) {
      bytes -= recent.back()->header->bytes;
      by_hash.erase(hash_of(recent.back()->header));
      recent.pop_back();
    }
    return program;
  }

  static Digest hash_of(const void* blob) {
    abi::Header h;
    std::memcpy(&h, blob, sizeof h);
    Digest d;
    std::memcpy(d.data(), h.hash, d.size());
    return d;
  }
};

Table& table() {
  static Table* t = new Table;
  return *t;
}

}  // namespace

std::shared_ptr<Program> Program::get(const void* blob, size_t bytes) {
  if (bytes < sizeof(abi::Header)) return std::make_shared<Program>(blob, bytes);  // throws
  const Digest hash = Table::hash_of(blob);
  const std::shared_ptr<Program> known = table().find(hash);
  if (known && known->header->bytes == bytes && !std::memcmp(known->blob_.get(), blob, bytes)) return known;
  return table().add(hash, std::make_shared<Program>(blob, bytes));
}

std::shared_ptr<Program> Program::again(const void* blob, size_t bytes) {
  if (bytes >= sizeof(abi::Header))
    if (auto known = table().find(Table::hash_of(blob))) return known;
  return get(blob, bytes);
}

size_t Program::kept() {
  std::lock_guard<std::mutex> lock(table().mutex);
  return table().recent.size();
}

}  // namespace mpk
