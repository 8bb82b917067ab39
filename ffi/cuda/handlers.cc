// The XLA custom call `jax_mpk_cuda`: instantiate (attributes), initialize (tables, modules), execute (the launch).
#include "handlers.h"

#include <nanobind/stl/string.h>

#include <cstring>

#include "bandwidth.h"
#include "launcher.h"
#include "xla/ffi/api/ffi.h"

namespace mpk::cuda {
namespace {

namespace ffi = xla::ffi;
namespace nb = nanobind;

struct SiteState {
  static ffi::TypeId id;
  std::unique_ptr<Site> site;
};
ffi::TypeId SiteState::id = {};

ffi::Error status(const Error& e) { return e.empty() ? ffi::Error::Success() : ffi::Error::Internal(e); }

// Sites of one program share its bytes; the last one to go frees them.
std::shared_ptr<const Code> intern(int64_t hash, ffi::Span<const uint8_t> program, ffi::Span<const uint8_t> cubin,
                                   int64_t smem, int64_t spill, int64_t tickets) {
  static std::mutex mutex;
  static auto* known = new std::map<std::pair<int64_t, size_t>, std::weak_ptr<const Code>>;
  std::lock_guard lock(mutex);
  auto& entry = (*known)[{hash, cubin.size()}];
  if (auto code = entry.lock(); code && std::memcmp(code->cubin.data(), cubin.begin(), cubin.size()) == 0) return code;
  auto code = std::make_shared<Code>();
  code->blob.resize((program.size() + 7) / 8);
  std::memcpy(code->blob.data(), program.begin(), program.size());
  code->cubin.assign(cubin.begin(), cubin.end());
  code->smem = smem;
  code->spill = spill;
  code->tickets = tickets;
  entry = code;
  return code;
}

ffi::ErrorOr<std::unique_ptr<SiteState>> instantiate(ffi::Dictionary attrs) {
  auto program = attrs.get<ffi::Span<const uint8_t>>("program");
  auto cubin = attrs.get<ffi::Span<const uint8_t>>("cubin");
  if (!program.has_value()) return ffi::Unexpected(program.error());
  if (!cubin.has_value()) return ffi::Unexpected(cubin.error());
  int64_t numbers[5];
  const char* names[5] = {"hash", "smem", "spill", "tickets", "deadline_ms"};
  for (int i = 0; i < 5; ++i) {
    auto x = attrs.get<int64_t>(names[i]);
    if (!x.has_value()) return ffi::Unexpected(x.error());
    numbers[i] = *x;
  }
  const auto* h = reinterpret_cast<const abi::Header*>(program->begin());
  if (program->size() < sizeof(abi::Header) || h->magic != abi::MAGIC || h->version != abi::VERSION || h->bytes != program->size())
    return ffi::Unexpected(ffi::Error::InvalidArgument("the program attribute is not a program of this version"));
  auto state = std::make_unique<SiteState>();
  state->site = std::make_unique<Site>(intern(numbers[0], *program, *cubin, numbers[1], numbers[2], numbers[3]), numbers[4]);
  return state;
}

std::vector<void*> addresses(ffi::RemainingArgs args, ffi::RemainingRets rets) {
  std::vector<void*> out;
  out.reserve(args.size() + rets.size());
  for (size_t i = 0; i < args.size(); ++i) out.push_back(args.get<ffi::AnyBuffer>(i)->untyped_data());
  for (size_t i = 0; i < rets.size(); ++i) out.push_back((*rets.get<ffi::AnyBuffer>(i))->untyped_data());
  return out;
}

ffi::Error initialize(Stream stream, SiteState* state, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary) {
  return status(state->site->initialize(stream, addresses(args, rets)));
}

ffi::Error execute(Stream stream, SiteState* state, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary) {
  return status(state->site->launch(stream, addresses(args, rets)));
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, instantiate, ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kInitialize, initialize,
                       ffi::Ffi::BindInitialize().Ctx<ffi::PlatformStream<Stream>>().Ctx<ffi::State<SiteState>>().RemainingArgs().RemainingRets().Attrs());
XLA_FFI_DEFINE_HANDLER(kExecute, execute,
                       ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>().Ctx<ffi::State<SiteState>>().RemainingArgs().RemainingRets().Attrs(),
                       {ffi::Traits::kCmdBufferCompatible});

template <class T> nb::capsule capsule(T* f) { return nb::capsule(reinterpret_cast<void*>(f)); }

}  // namespace

void bind(nb::module_& m) {
  m.def("cuda_handlers", [] {
    nb::dict d;
    d["instantiate"] = capsule(kInstantiate);
    d["initialize"] = capsule(kInitialize);
    d["execute"] = capsule(kExecute);
    return d;
  });
  m.def("cuda_state_type", [] {
    static auto info = ffi::MakeTypeInfo<SiteState>();
    nb::dict d;
    d["type_id"] = nb::capsule(reinterpret_cast<void*>(&SiteState::id));
    d["type_info"] = nb::capsule(reinterpret_cast<void*>(&info));
    return d;
  });
  m.def(
      "cuda_read_bandwidth",
      [](nb::bytes cubin, uint64_t bytes, int passes, int device) {
        const std::string code(cubin.c_str(), cubin.size());
        std::string why;
        double rate;
        {
          nb::gil_scoped_release free;
          rate = read_bandwidth(code, bytes, passes, device, &why);
        }
        if (!why.empty()) throw std::runtime_error("the read-only stream cannot be measured: " + why);
        return rate;
      },
      nb::arg("cubin"), nb::arg("bytes"), nb::arg("passes") = 5, nb::arg("device") = 0,
      "Bytes per second of a read-only stream over `bytes` of device memory, by the machine code of cuda/read.cu.");
  m.def("cuda_streams", [] { return streams_used(); }, "How many streams the launches of the executables alive were put on.");
  m.def("cuda_check", [] { return check_all(); }, "The messages of launches that gave up since the last call.");
}

}  // namespace mpk::cuda
