#include "bandwidth.h"

#include <algorithm>

#include "driver.h"

namespace mpk::cuda {
namespace {

constexpr unsigned kThreads = 512, kBlocks = 4;  // of read_stream; blocks a multiprocessor holds

// Everything that a measurement takes from the driver; given back in reverse, whatever happens.
struct Taken {
  const Driver& cu;
  int device = 0;
  Context context = nullptr;
  bool pushed = false;
  Module module = nullptr;
  DevicePtr memory = 0;
  Event begin = nullptr, end = nullptr;

  ~Taken() {
    if (begin) cu.EventDestroy(begin);
    if (end) cu.EventDestroy(end);
    if (memory) cu.MemFree(memory);
    if (module) cu.ModuleUnload(module);
    Context c;
    if (pushed) cu.CtxPopCurrent(&c);
    if (context) cu.DevicePrimaryCtxRelease(device);
  }
};

#define MPK_TRY(call)                                   \
  do {                                                  \
    if (Result r_ = (call)) return describe(#call, r_); \
  } while (0)

std::string measure(const Driver& cu, const std::string& cubin, uint64_t bytes, int passes, int ordinal, double* rate) {
  Taken t{cu};
  MPK_TRY(cu.Init(0));
  MPK_TRY(cu.DeviceGet(&t.device, ordinal));
  MPK_TRY(cu.DevicePrimaryCtxRetain(&t.context, t.device));
  MPK_TRY(cu.CtxPushCurrent(t.context));
  t.pushed = true;
  int processors = 0;
  MPK_TRY(cu.DeviceGetAttribute(&processors, kMultiprocessors, t.device));
  Function function;
  MPK_TRY(cu.ModuleLoadData(&t.module, cubin.data()));
  MPK_TRY(cu.ModuleGetFunction(&function, t.module, "read_stream"));
  uint64_t n = bytes / 16;
  if (Result r = cu.MemAlloc(&t.memory, n * 16 + 16))
    return describe(("no room for " + std::to_string(bytes >> 20) + " MiB to read").c_str(), r);
  MPK_TRY(cu.MemsetD32(t.memory, 0, n * 4 + 4));
  MPK_TRY(cu.EventCreate(&t.begin, 0));
  MPK_TRY(cu.EventCreate(&t.end, 0));
  DevicePtr out = t.memory + n * 16;
  unsigned impossible = ~0u;  // the memory is zero
  void* arguments[] = {&t.memory, &n, &impossible, &out};
  *rate = 0;
  for (int pass = -1; pass < passes; ++pass) {  // the first one only wakes the device
    MPK_TRY(cu.EventRecord(t.begin, nullptr));
    MPK_TRY(cu.LaunchKernel(function, unsigned(processors) * kBlocks, 1, 1, kThreads, 1, 1, 0, nullptr, arguments,
                            nullptr));
    MPK_TRY(cu.EventRecord(t.end, nullptr));
    MPK_TRY(cu.EventSynchronize(t.end));
    float ms = 0;
    MPK_TRY(cu.EventElapsedTime(&ms, t.begin, t.end));
    if (pass >= 0 && ms > 0) *rate = std::max(*rate, double(n) * 16 / ms * 1e3);
  }
  return {};
}

}  // namespace

double read_bandwidth(const std::string& cubin, uint64_t bytes, int passes, int device, std::string* why) {
  const Driver* cu = driver(why);
  if (!cu) return 0;
  double rate = 0;
  *why = measure(*cu, cubin, bytes, passes, device, &rate);
  return why->empty() ? rate : 0;
}

}  // namespace mpk::cuda
