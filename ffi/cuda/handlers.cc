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

ffi::ErrorOr<std::unique_ptr<SiteState>> instantiate(ffi::Dictionary attrs) {
  auto program = attrs.get<ffi::Span<const uint8_t>>("program");
  auto cubin = attrs.get<ffi::Span<const uint8_t>>("cubin");
  if (!program.has_value()) return ffi::Unexpected(program.error());
  if (!cubin.has_value()) return ffi::Unexpected(cubin.error());
  auto deadline_ms = attrs.get<int64_t>("deadline_ms");
  if (!deadline_ms.has_value()) return ffi::Unexpected(deadline_ms.error());
  Error why;
  auto code = Code::get(program->begin(), program->size(), cubin->begin(), cubin->size(), &why);
  if (!code) return ffi::Unexpected(ffi::Error::InvalidArgument("jax_mpk: " + why));
  auto state = std::make_unique<SiteState>();
  state->site = std::make_unique<Site>(std::move(code), *deadline_ms);
  return state;
}

std::vector<void*> addresses(ffi::RemainingArgs args, ffi::RemainingRets rets) {
  std::vector<void*> out;
  out.reserve(args.size() + rets.size());
  for (size_t i = 0; i < args.size(); ++i) out.push_back(args.get<ffi::AnyBuffer>(i)->untyped_data());
  for (size_t i = 0; i < rets.size(); ++i) out.push_back((*rets.get<ffi::AnyBuffer>(i))->untyped_data());
  return out;
}

ffi::Error initialize(Stream stream, SiteState* state, ffi::RemainingArgs args, ffi::RemainingRets rets,
                      ffi::Dictionary) {
  return status(state->site->initialize(stream, addresses(args, rets)));
}

ffi::Error execute(Stream stream, SiteState* state, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary) {
  return status(state->site->launch(stream, addresses(args, rets)));
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, instantiate, ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kInitialize, initialize,
                       ffi::Ffi::BindInitialize()
                           .Ctx<ffi::PlatformStream<Stream>>()
                           .Ctx<ffi::State<SiteState>>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs());
XLA_FFI_DEFINE_HANDLER(kExecute, execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<Stream>>()
                           .Ctx<ffi::State<SiteState>>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs(),
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
  m.def(
      "cuda_code",
      [](nb::bytes program, nb::bytes cubin) {
        auto bytes = [](const nb::bytes& b) { return reinterpret_cast<const uint8_t*>(b.c_str()); };
        Error why;
        auto code = Code::get(bytes(program), program.size(), bytes(cubin), cubin.size(), &why);
        if (!code) throw nb::value_error(why.c_str());
        auto* held = new std::shared_ptr<const Code>(code);
        return nb::make_tuple(reinterpret_cast<uintptr_t>(code.get()), nb::capsule(held, [](void* p) noexcept {
                                delete static_cast<std::shared_ptr<const Code>*>(p);
                              }));
      },
      nb::arg("program"), nb::arg("cubin"), "What a call site holds, with its identity: equal sites share it.");
  m.def(
      "cuda_streams", [] { return streams_used(); },
      "How many streams the launches of the executables alive were put on.");
  m.def("cuda_check", [] { return check_all(); }, "The messages of launches that gave up since the last call.");
}

}  // namespace mpk::cuda
