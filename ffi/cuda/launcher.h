// One call site of a program: its machine code and tables on every device that runs it, and its launches.
//
// Memory of a launch that is not XLA's (tables, counters, status) is made in `initialize`, before any launch; `launch`
// neither allocates nor synchronises, so it may be recorded into a graph. What a launch counts (epochs, events) lives
// on the device, because a replayed graph does not come through here.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "../abi.h"
#include "driver.h"

namespace mpk::cuda {

// An error message, empty on success.
using Error = std::string;

// A program sealed to its machine code (jax_mpk/backends/cuda/build.py), and that. Immutable; equal sites share it.
struct Code {
  // The code of these bytes, from a table of those alive. Shared only if every byte is the same. Null, with a reason, for
  // what is no program of this version for CUDA, is damaged, or was planned for other machine code.
  static std::shared_ptr<const Code> get(const uint8_t* program, size_t bytes, const uint8_t* cubin, size_t cubin_bytes,
                                         Error* why);

  std::vector<uint64_t> blob;  // aligned for the records
  std::vector<uint8_t> cubin;

  const abi::Kernel& kernel() const { return *section<abi::Kernel>(abi::Section::Kernel); }
  const abi::Header& header() const { return *reinterpret_cast<const abi::Header*>(blob.data()); }
  template <class T> const T* section(abi::Section s) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const uint8_t*>(blob.data()) + header().section_offset[int(s)]);
  }
  uint64_t count(abi::Section s) const { return header().section_count[int(s)]; }
  std::string name(uint32_t at) const {
    return reinterpret_cast<const char*>(section<abi::Name>(abi::Section::Name)) + at;
  }
};

class Site {
 public:
  Site(std::shared_ptr<const Code> code, int64_t deadline_ms);
  ~Site();
  Site(const Site&) = delete;
  Site& operator=(const Site&) = delete;

  // Makes everything that a launch on the stream's device needs, and brings the tensor maps up to date with `buffers`
  // (operands, then results).
  Error initialize(Stream stream, const std::vector<void*>& buffers);

  // One launch. Reports a launch that gave up earlier, once.
  Error launch(Stream stream, const std::vector<void*>& buffers);

  // The message of a launch that gave up since the last look; empty: none. Touches host memory only.
  Error check();

  // Adds the streams that launches were put on.
  void streams(std::set<Stream>& into);

 private:
  struct Device {
    Context context = nullptr;
    Module module = nullptr;
    Function function = nullptr;
    DevicePtr arena = 0, state = 0, constants = 0, maps = 0;
    abi::Status* status = nullptr;
    std::set<Stream> launched;          // streams that launches were put on
    std::vector<const void*> streamed;  // base address behind every tensor map
    std::vector<TensorMapBits> bits;
  };

  Error load(Device& d);
  Error encode(Device& d, Stream stream, const std::vector<void*>& buffers);
  Error message(Device& d);
  uint32_t base_of(const abi::Buffer& b) const;

  std::shared_ptr<const Code> code_;
  int64_t deadline_ms_;
  std::mutex mutex_;
  std::map<Context, std::unique_ptr<Device>> devices_;
};

// The messages of all sites of this process, one a line.
Error check_all();

// How many different streams the launches of the sites alive were put on.
size_t streams_used();

}  // namespace mpk::cuda
