#include "driver.h"

#include <dlfcn.h>

namespace mpk::cuda {
namespace {

struct Loaded {
  Driver table{};
  std::string why;

  Loaded() {
    void* lib = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!lib) {
      why = std::string("the CUDA driver does not load: ") + dlerror();
      return;
    }
    auto get = [&](auto& f, const char* name, bool needed = true) {
      f = reinterpret_cast<std::remove_reference_t<decltype(f)>>(dlsym(lib, name));
      if (!f && needed && why.empty()) why = std::string("the CUDA driver has no ") + name;
    };
    Driver& d = table;
    get(d.GetErrorString, "cuGetErrorString");
    get(d.StreamGetCtx, "cuStreamGetCtx");
    get(d.CtxPushCurrent, "cuCtxPushCurrent_v2");
    get(d.CtxPopCurrent, "cuCtxPopCurrent_v2");
    get(d.CtxGetDevice, "cuCtxGetDevice");
    get(d.DeviceGetAttribute, "cuDeviceGetAttribute");
    get(d.ModuleLoadData, "cuModuleLoadData");
    get(d.ModuleUnload, "cuModuleUnload");
    get(d.ModuleGetFunction, "cuModuleGetFunction");
    get(d.FuncSetAttribute, "cuFuncSetAttribute");
    get(d.MemAlloc, "cuMemAlloc_v2");
    get(d.MemFree, "cuMemFree_v2");
    get(d.MemcpyHtoD, "cuMemcpyHtoD_v2");
    get(d.MemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2");
    get(d.StreamSynchronize, "cuStreamSynchronize");
    get(d.MemHostAlloc, "cuMemHostAlloc");
    get(d.MemFreeHost, "cuMemFreeHost");
    get(d.MemHostGetDevicePointer, "cuMemHostGetDevicePointer_v2");
    get(d.LaunchCooperativeKernel, "cuLaunchCooperativeKernel");
    get(d.Init, "cuInit");
    get(d.DeviceGet, "cuDeviceGet");
    get(d.DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
    get(d.DevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2");
    get(d.MemsetD32, "cuMemsetD32_v2");
    get(d.LaunchKernel, "cuLaunchKernel");
    get(d.EventCreate, "cuEventCreate");
    get(d.EventDestroy, "cuEventDestroy_v2");
    get(d.EventRecord, "cuEventRecord");
    get(d.EventSynchronize, "cuEventSynchronize");
    get(d.EventElapsedTime, "cuEventElapsedTime");
    get(d.TensorMapEncodeTiled, "cuTensorMapEncodeTiled", false);
  }
};

}  // namespace

const Driver* driver(std::string* why) {
  static const Loaded loaded;  // for the life of the process, as the library
  if (loaded.why.empty()) return &loaded.table;
  if (why) *why = loaded.why;
  return nullptr;
}

std::string describe(const char* what, Result r) {
  const char* text = nullptr;
  if (const Driver* d = driver(nullptr)) d->GetErrorString(r, &text);
  return std::string(what) + ": " + (text ? text : "CUDA error " + std::to_string(r));
}

}  // namespace mpk::cuda
