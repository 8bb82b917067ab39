// The few functions of the CUDA driver that the launcher needs, found at run time: nothing of CUDA is needed to build.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../abi.h"

namespace mpk::cuda {

using Result = int;  // CUresult; 0 is success
using DevicePtr = unsigned long long;
struct Context_;
struct Module_;
struct Function_;
struct Stream_;
struct Event_;
using Context = Context_*;
using Module = Module_*;
using Function = Function_*;
using Stream = Stream_*;
using Event = Event_*;

struct alignas(128) TensorMapBits { unsigned char bytes[abi::MAP_BYTES]; };

constexpr int kMaxDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kMultiprocessors = 16;  // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr unsigned kHostMapped = 3;   // CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP
constexpr int kBfloat16 = 9;          // CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
constexpr int kSwizzle128 = 3, kPromote256 = 3;

struct Driver {
  Result (*GetErrorString)(Result, const char**);
  Result (*StreamGetCtx)(Stream, Context*);
  Result (*CtxPushCurrent)(Context);
  Result (*CtxPopCurrent)(Context*);
  Result (*CtxGetDevice)(int*);
  Result (*DeviceGetAttribute)(int*, int, int);
  Result (*ModuleLoadData)(Module*, const void*);
  Result (*ModuleUnload)(Module);
  Result (*ModuleGetFunction)(Function*, Module, const char*);
  Result (*FuncSetAttribute)(Function, int, int);
  Result (*MemAlloc)(DevicePtr*, size_t);
  Result (*MemFree)(DevicePtr);
  Result (*MemcpyHtoD)(DevicePtr, const void*, size_t);
  Result (*MemcpyHtoDAsync)(DevicePtr, const void*, size_t, Stream);
  Result (*StreamSynchronize)(Stream);
  Result (*MemHostAlloc)(void**, size_t, unsigned);
  Result (*MemFreeHost)(void*);
  Result (*MemHostGetDevicePointer)(DevicePtr*, void*, unsigned);
  Result (*LaunchCooperativeKernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                    Stream, void**);
  Result (*Init)(unsigned);
  Result (*DeviceGet)(int*, int);
  Result (*DevicePrimaryCtxRetain)(Context*, int);
  Result (*DevicePrimaryCtxRelease)(int);
  Result (*MemsetD32)(DevicePtr, unsigned, size_t);
  Result (*LaunchKernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**,
                         void**);
  Result (*EventCreate)(Event*, unsigned);
  Result (*EventDestroy)(Event);
  Result (*EventRecord)(Event, Stream);
  Result (*EventSynchronize)(Event);
  Result (*EventElapsedTime)(float*, Event, Event);
  Result (*TensorMapEncodeTiled)(TensorMapBits*, int, uint32_t, void*, const uint64_t*, const uint64_t*,
                                 const uint32_t*, const uint32_t*, int, int, int, int);  // null on drivers before 12.0
};

// The driver, or null and the reason in `why`.
const Driver* driver(std::string* why);

// "what: the driver's words".
std::string describe(const char* what, Result r);

}  // namespace mpk::cuda
