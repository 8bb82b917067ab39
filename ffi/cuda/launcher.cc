#include "launcher.h"

#include <cstring>
#include <iterator>
#include <set>

#include "../sha256.h"

namespace mpk::cuda {
namespace {

#define MPK_TRY(call)                                   \
  do {                                                  \
    if (Result r_ = (call)) return describe(#call, r_); \
  } while (0)

struct Registry {
  std::mutex mutex;
  std::set<Site*> sites;
};
Registry& registry() {
  static Registry* r = new Registry;  // outlives every site
  return *r;
}

// The stream's context is current while this lives.
class Current {
 public:
  Current(const Driver& d, Context c) : driver_(d) { result = d.CtxPushCurrent(c); }
  ~Current() {
    Context c;
    if (!result) driver_.CtxPopCurrent(&c);
  }
  Result result;

 private:
  const Driver& driver_;
};

// Packs tables one after the other, 256-byte aligned, into what becomes one allocation.
struct Packer {
  std::vector<uint8_t> bytes;
  template <class T> uint64_t add(const T* data, uint64_t n) {
    const uint64_t at = (bytes.size() + 255) / 256 * 256;
    bytes.resize(at + n * sizeof(T));
    if (data && n) std::memcpy(bytes.data() + at, data, n * sizeof(T));
    return at;
  }
};

}  // namespace

std::shared_ptr<const Code> Code::get(const uint8_t* program, size_t bytes, const uint8_t* cubin, size_t cubin_bytes,
                                      Error* why) {
  using Table = std::map<Digest, std::weak_ptr<const Code>>;
  static std::mutex mutex;
  static auto* table = new Table;  // outlives every site
  abi::Header h{};
  if (bytes >= sizeof h) std::memcpy(&h, program, sizeof h);
  if (h.magic != abi::MAGIC || h.version != abi::VERSION || h.bytes != bytes) {
    *why = "the program attribute is not a program of version " + std::to_string(abi::VERSION);
    return nullptr;
  }
  Digest hash;
  std::memcpy(hash.data(), h.hash, hash.size());
  std::lock_guard lock(mutex);
  const auto known = table->find(hash);
  if (known != table->end())
    if (auto code = known->second.lock(); code && code->cubin.size() == cubin_bytes && code->header().bytes == bytes &&
                                          !std::memcmp(code->blob.data(), program, bytes) &&
                                          !std::memcmp(code->cubin.data(), cubin, cubin_bytes))
      return code;
  Sha256 sha;
  sha.update(cubin, cubin_bytes);
  const Digest machine = sha.finish();
  if (!undamaged(program, bytes)) *why = "damaged program: the content does not match its hash";
  else if (std::memcmp(machine.data(), h.key, machine.size()))
    *why = "the machine code is not the one that the program was planned for";
  else if (h.section_count[int(abi::Section::Kernel)] != 1) *why = "the program is not one for CUDA";
  if (!why->empty()) return nullptr;
  auto code = std::make_shared<Code>();
  code->blob.resize((bytes + 7) / 8);
  std::memcpy(code->blob.data(), program, bytes);
  code->cubin.assign(cubin, cubin + cubin_bytes);
  for (auto i = table->begin(); i != table->end();) i = i->second.expired() ? table->erase(i) : std::next(i);
  (*table)[hash] = code;
  return code;
}

Site::Site(std::shared_ptr<const Code> code, int64_t deadline_ms) : code_(std::move(code)), deadline_ms_(deadline_ms) {
  std::lock_guard lock(registry().mutex);
  registry().sites.insert(this);
}

Site::~Site() {
  {
    std::lock_guard lock(registry().mutex);
    registry().sites.erase(this);
  }
  const Driver* cu = driver(nullptr);
  for (auto& [context, d] : devices_) {
    Current current(*cu, context);
    if (current.result) continue;  // the process is going down
    if (d->arena) cu->MemFree(d->arena);
    if (d->status) cu->MemFreeHost(d->status);
    if (d->module) cu->ModuleUnload(d->module);
  }
}

// Launch::base of cuda/runtime/launch.cuh: operands, results with the workspace as the last, constants.
uint32_t Site::base_of(const abi::Buffer& b) const {
  const abi::Header& h = code_->header();
  switch (abi::Space(b.space)) {
    case abi::Space::ARG: return b.index;
    case abi::Space::RESULT: return h.args + b.index;
    case abi::Space::WORKSPACE: return h.args + h.results;
    default: return h.args + h.results + 1;
  }
}

Error Site::load(Device& d) {
  const Driver& cu = *driver(nullptr);
  const Code& code = *code_;
  const abi::Header& h = code.header();
  int device = 0, processors = 0;
  MPK_TRY(cu.CtxGetDevice(&device));
  MPK_TRY(cu.DeviceGetAttribute(&processors, kMultiprocessors, device));
  if (processors < int(h.workers))
    return "the program was compiled for " + std::to_string(h.workers) + " multiprocessors, this device has " +
           std::to_string(processors);
  MPK_TRY(cu.ModuleLoadData(&d.module, code.cubin.data()));
  MPK_TRY(cu.ModuleGetFunction(&d.function, d.module, "mpk_program"));
  MPK_TRY(cu.FuncSetAttribute(d.function, kMaxDynamicShared, int(code.kernel().shared)));

  const uint64_t tasks = code.count(abi::Section::Task), streams = code.count(abi::Section::Stream);
  const auto* task = code.section<abi::Task>(abi::Section::Task);
  const auto* stream = code.section<abi::Stream>(abi::Section::Stream);
  std::vector<uint32_t> first(h.workers + 1), stream_first(h.workers + 1);
  for (uint64_t t = 0; t < tasks; ++t) ++first[task[t].worker + 1];
  for (uint64_t e = 0; e < streams; ++e) ++stream_first[stream[e].worker + 1];
  for (uint32_t w = 0; w < h.workers; ++w) first[w + 1] += first[w], stream_first[w + 1] += stream_first[w];

  const auto* buffer = code.section<abi::Buffer>(abi::Section::Buffer);
  const auto* slot = code.section<abi::Slot>(abi::Section::Slot);
  std::vector<abi::Slot> slots(slot, slot + code.count(abi::Section::Slot));
  for (abi::Slot& s : slots) {
    const abi::Buffer& b = buffer[s.buffer];
    s.buffer = base_of(b);
    s.offset += b.offset;
  }

  Packer p;
  abi::State state{};
  const uint64_t at = p.add(&state, 1);
  state.tasks = p.add(task, tasks);
  state.first = p.add(first.data(), first.size());
  state.units = p.add(code.section<abi::Unit>(abi::Section::Unit), code.count(abi::Section::Unit));
  state.slots = p.add(slots.data(), slots.size());
  state.stream = p.add(stream, streams);
  state.stream_first = p.add(stream_first.data(), stream_first.size());
  d.bits.resize(code.count(abi::Section::TensorMap));
  d.streamed.assign(d.bits.size(), nullptr);
  state.maps = p.add(d.bits.data(), d.bits.size());
  state.counter_words = uint32_t(code.count(abi::Section::Event)) * abi::EVENT_WORDS;
  state.counters = p.add<uint32_t>(nullptr, state.counter_words);
  state.ticket_words = code.kernel().tickets;
  state.tickets = p.add<uint32_t>(nullptr, state.ticket_words);
  const uint64_t constants = p.add(code.section<abi::Const>(abi::Section::Const), code.count(abi::Section::Const));
  MPK_TRY(cu.MemAlloc(&d.arena, p.bytes.size()));
  MPK_TRY(cu.MemHostAlloc(reinterpret_cast<void**>(&d.status), sizeof(abi::Status), kHostMapped));
  std::memset(d.status, 0, sizeof(abi::Status));
  DevicePtr status;
  MPK_TRY(cu.MemHostGetDevicePointer(&status, d.status, 0));
  state.status = status;
  for (uint64_t* x : {&state.tasks, &state.first, &state.units, &state.slots, &state.stream, &state.stream_first,
                      &state.maps, &state.counters, &state.tickets})
    *x += d.arena;
  state.limit_ns = uint64_t(deadline_ms_) * 1000000;
  state.spill = code.kernel().spill_at;
  state.epoch = 1;
  std::memcpy(p.bytes.data() + at, &state, sizeof state);
  // From pageable memory the copy returns when the bytes are staged, not when they have arrived, and XLA's streams do not
  // wait for the default stream: without the second line a first launch may read tables that are not there yet.
  MPK_TRY(cu.MemcpyHtoD(d.arena, p.bytes.data(), p.bytes.size()));
  MPK_TRY(cu.StreamSynchronize(nullptr));
  d.state = d.arena + at;
  d.constants = d.arena + constants;
  d.maps = state.maps;
  return {};
}

// Tensor maps name addresses: encode those whose operand has moved. Copied in stream order, so a launch that is still
// running keeps the maps that it was given.
Error Site::encode(Device& d, Stream stream, const std::vector<void*>& buffers) {
  const Driver& cu = *driver(nullptr);
  const auto* map = code_->section<abi::TensorMap>(abi::Section::TensorMap);
  const auto* buffer = code_->section<abi::Buffer>(abi::Section::Buffer);
  if (!code_->count(abi::Section::Stream)) return {};
  if (!cu.TensorMapEncodeTiled) return "the driver has no cuTensorMapEncodeTiled";
  bool changed = false;
  for (size_t m = 0; m < d.bits.size(); ++m) {
    const abi::Buffer& b = buffer[map[m].buffer];
    const uint32_t base = base_of(b);
    uint8_t* address =
        static_cast<uint8_t*>(base < buffers.size() ? buffers[base] : reinterpret_cast<void*>(d.constants));
    if (d.streamed[m] == address) continue;
    if (abi::Dtype(map[m].dtype) != abi::Dtype::BF16) continue;  // not streamed by this kernel
    uint64_t dims[4] = {1, 1, 1, 1}, strides[3];
    uint32_t box[4] = {1, 1, 1, 1}, step[4] = {1, 1, 1, 1};
    const int rank = map[m].rank;
    for (int i = 0; i < rank; ++i) dims[i] = map[m].dims[i], box[i] = map[m].box[i];
    for (int i = 0; i < 3; ++i) strides[i] = i + 1 < rank ? map[m].strides[i + 1] : 16;
    for (int i = rank > 1 ? rank - 1 : 0; i < 3; ++i) strides[i] = i ? strides[i - 1] * dims[i] : 16;  // unused: dims 1
    MPK_TRY(cu.TensorMapEncodeTiled(&d.bits[m], kBfloat16, 4, address + b.offset + map[m].offset, dims, strides, box,
                                    step, 0, kSwizzle128, kPromote256, 0));
    d.streamed[m] = address;
    changed = true;
  }
  if (changed) MPK_TRY(cu.MemcpyHtoDAsync(d.maps, d.bits.data(), d.bits.size() * sizeof(TensorMapBits), stream));
  return {};
}

Error Site::initialize(Stream stream, const std::vector<void*>& buffers) {
  std::string why;
  const Driver* cu = driver(&why);
  if (!cu) return why;
  Context context;
  MPK_TRY(cu->StreamGetCtx(stream, &context));
  Current current(*cu, context);
  if (current.result) return describe("cuCtxPushCurrent", current.result);
  std::lock_guard lock(mutex_);
  std::unique_ptr<Device>& d = devices_[context];
  if (!d) {
    auto fresh = std::make_unique<Device>();
    fresh->context = context;
    if (Error e = load(*fresh); !e.empty()) return e;
    d = std::move(fresh);
  }
  return encode(*d, stream, buffers);
}

Error Site::launch(Stream stream, const std::vector<void*>& buffers) {
  const Driver& cu = *driver(nullptr);
  Context context;
  MPK_TRY(cu.StreamGetCtx(stream, &context));
  Device* d = nullptr;
  {
    std::lock_guard lock(mutex_);
    auto it = devices_.find(context);
    if (it == devices_.end()) return "a launch before its initialisation";
    d = it->second.get();
    d->launched.insert(stream);
    if (Error e = message(*d); !e.empty()) return e;
  }
  std::vector<DevicePtr> parameters;  // struct Launch
  parameters.reserve(buffers.size() + 2);
  parameters.push_back(d->state);
  for (void* b : buffers) parameters.push_back(reinterpret_cast<DevicePtr>(b));
  parameters.push_back(d->constants);
  void* arguments[] = {parameters.data()};
  Current current(cu, context);
  if (current.result) return describe("cuCtxPushCurrent", current.result);
  MPK_TRY(cu.LaunchCooperativeKernel(d->function, code_->header().workers, 1, 1, abi::BLOCK, 1, 1,
                                     code_->kernel().shared, stream, arguments));
  return {};
}

Error Site::message(Device& d) {
  volatile abi::Status* s = d.status;
  if (!s->code) return {};
  const auto* task = code_->section<abi::Task>(abi::Section::Task);
  const auto* unit = code_->section<abi::Unit>(abi::Section::Unit);
  std::string where = "task " + std::to_string(s->task);
  if (s->task < code_->count(abi::Section::Task)) {
    const abi::Task& t = task[s->task];
    where += " (" + code_->name(unit[t.op].name) + "[" + std::to_string(t.index) + "] on worker " +
             std::to_string(s->worker) + ")";
  }
  std::string text = "a megakernel launch gave up after " + std::to_string(deadline_ms_) + " ms: " + where;
  if (abi::GaveUp(s->code) == abi::GaveUp::EVENT)
    text += " waits for event " + std::to_string(s->event) + ", which has " + std::to_string(s->have) + " of " +
            std::to_string(s->want);
  else text += " waits for a frame of the weight stream that does not come";
  s->code = 0;
  return text;
}

Error Site::check() {
  std::lock_guard lock(mutex_);
  for (auto& [context, d] : devices_)
    if (Error e = message(*d); !e.empty()) return e;
  return {};
}

void Site::streams(std::set<Stream>& into) {
  std::lock_guard lock(mutex_);
  for (auto& [context, d] : devices_) into.insert(d->launched.begin(), d->launched.end());
}

size_t streams_used() {
  std::lock_guard lock(registry().mutex);
  std::set<Stream> all;
  for (Site* s : registry().sites) s->streams(all);
  return all.size();
}

Error check_all() {
  std::lock_guard lock(registry().mutex);
  Error all;
  for (Site* s : registry().sites)
    if (Error e = s->check(); !e.empty()) all += (all.empty() ? "" : "\n") + e;
  return all;
}

}  // namespace mpk::cuda
