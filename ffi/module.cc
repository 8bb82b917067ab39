// The extension module jax_mpk._ext: registration and test entries only (signatures: jax_mpk/_ext.pyi).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstring>

#include "cpu/bandwidth.h"
#include "cpu/handler.h"
#include "cpu/launch.h"
#include "cpu/pool.h"
#ifdef MPK_CUDA
#include "cuda/handlers.h"
#endif

namespace nb = nanobind;
using namespace mpk;

namespace {

// Contiguous memory of a Python object (buffer protocol), held for the time of a call.
class Buffers {
 public:
  ~Buffers() {
    for (Py_buffer& v : views_) PyBuffer_Release(&v);
  }
  void add(nb::handle object, bool writable, std::vector<char*>& data, std::vector<size_t>& bytes) {
    Py_buffer v;
    if (PyObject_GetBuffer(object.ptr(), &v, PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0)))
      throw nb::python_error();
    views_.push_back(v);
    data.push_back(static_cast<char*>(v.buf)), bytes.push_back(static_cast<size_t>(v.len));
  }

 private:
  std::vector<Py_buffer> views_;
};

std::shared_ptr<Program> load(nb::bytes blob) { return std::make_shared<Program>(blob.c_str(), blob.size()); }

void run(nb::bytes blob, nb::sequence args, nb::sequence results, uint32_t threads, int64_t seed, bool poison,
         int64_t deadline_ms, const std::string& isa, nb::object times) {
  Operands o;
  Buffers held;
  for (nb::handle x : args) held.add(x, false, o.args, o.arg_bytes);
  for (nb::handle x : results) held.add(x, true, o.results, o.result_bytes);
  LaunchOptions options;
  options.threads = threads, options.seed = seed, options.deadline_ms = deadline_ms, options.isa = isa_named(isa);
  if (!options.isa) throw nb::value_error(("this processor or build has no instruction set named " + isa).c_str());
  std::vector<char*> stamps;
  std::vector<size_t> stamp_bytes;
  if (!times.is_none()) held.add(times, true, stamps, stamp_bytes);
  LaunchError e;
  {
    std::shared_ptr<Program> program;
    nb::gil_scoped_release release;
    program = Program::get(blob.c_str(), blob.size());
    if (!stamps.empty()) {
      if (stamp_bytes[0] != program->tasks.size * 3 * sizeof(uint64_t))
        throw ProgramError("times are not [tasks][3] of u64");
      options.times = reinterpret_cast<uint64_t*>(stamps[0]);
    }
    const size_t bytes = program->header->workspace;
    AlignedBytes workspace = aligned_bytes(bytes);
    o.workspace = workspace.get(), o.workspace_bytes = bytes;
    if (poison) {  // every byte 0xff is a NaN in every float type, and -1
      std::memset(o.workspace, 0xff, bytes);
      std::vector<bool> aliased(o.results.size());
      for (const abi::Buffer& b : program->buffers)
        if (static_cast<abi::Space>(b.space) == abi::Space::RESULT && b.alias >= 0 && b.index < aliased.size())
          aliased[b.index] = true;
      for (size_t i = 0; i < o.results.size(); ++i)
        if (!aliased[i]) std::memset(o.results[i], 0xff, o.result_bytes[i]);
    }
    e = launch(program, o, options);
  }
  if (e.kind == LaunchError::kArguments) throw nb::value_error(e.text.c_str());
  if (e.kind == LaunchError::kNone) return;
  PyErr_SetString(e.kind == LaunchError::kDeadline ? PyExc_TimeoutError : PyExc_MemoryError, e.text.c_str());
  throw nb::python_error();
}

nb::dict info() {
  nb::dict out;
  out["isa"] = isa_named("")->name;
  nb::list names;
  for (const char* name : {"avx512", "avx2", "neon", "plain"})
    if (isa_named(name)) names.append(name);
  out["isas"] = names;
  out["threads"] = default_threads();
  out["abi_version"] = abi::VERSION;
  out["ffi_version"] = nb::make_tuple(ffi_version()[0], ffi_version()[1]);
#ifdef MPK_CUDA
  out["cuda"] = true;
#else
  out["cuda"] = false;
#endif
  return out;
}

}  // namespace

NB_MODULE(_ext, m) {
  nb::exception<ProgramError>(m, "ProgramError", PyExc_ValueError);
  m.def("run", &run, nb::arg("blob"), nb::arg("args"), nb::arg("results"), nb::kw_only(), nb::arg("threads") = 0,
        nb::arg("seed") = -1, nb::arg("poison") = false, nb::arg("deadline_ms") = 60000, nb::arg("isa") = "",
        nb::arg("times") = nb::none());
  m.def("check", [](nb::bytes blob) { load(blob); }, nb::arg("blob"));
  m.def("info", &info);
  m.def(
      "read_bandwidth",
      [](size_t bytes, uint32_t threads, int rounds) {
        nb::gil_scoped_release release;
        return read_bandwidth(bytes, threads ? threads : default_threads(), rounds);
      },
      nb::arg("bytes"), nb::arg("threads") = 0, nb::arg("rounds") = 5);
  m.def("registrations", [] {
    nb::dict out;
    nb::dict stages;
    stages["instantiate"] = nb::capsule(cpu_handlers().instantiate);
    stages["execute"] = nb::capsule(cpu_handlers().execute);
    out[kCpuTarget] = stages;
    return out;
  });
  m.def("programs_kept", &Program::kept);
#ifdef MPK_CUDA
  mpk::cuda::bind(m);
#endif
}
