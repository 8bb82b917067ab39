// The XLA FFI handlers of the CPU. `instantiate`, once an executable and call site, loads the program from the attribute
// or compares it with the loaded one, byte for byte. `execute` finds it by the hash that was checked then: buffers in,
// launch, errors as text. No XLA state: a stateful handler could not be registered before the CPU backend has started.
#include "handler.h"

#include "launch.h"
#include "xla/ffi/api/ffi.h"

namespace mpk {
namespace {

namespace ffi = xla::ffi;

ffi::Error instantiate(ffi::Dictionary attrs) {
  const auto blob = attrs.get<ffi::Span<const uint8_t>>("program");
  if (!blob.has_value()) return blob.error();
  try {
    Program::get(blob->begin(), blob->size());
    return ffi::Error::Success();
  } catch (const ProgramError& e) {
    return ffi::Error::InvalidArgument(std::string("jax_mpk: ") + e.what());
  } catch (const std::exception& e) {
    return ffi::Error::Internal(std::string("jax_mpk: ") + e.what());
  }
}

ffi::Error execute(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attrs) {
  const auto blob = attrs.get<ffi::Span<const uint8_t>>("program");
  const auto deadline = attrs.get<int64_t>("deadline_ms");
  if (!blob.has_value()) return blob.error();
  if (!deadline.has_value()) return deadline.error();
  try {
    auto program = Program::again(blob->begin(), blob->size());
    Operands o;
    for (size_t i = 0; i < args.size(); ++i) {
      auto x = args.get<ffi::AnyBuffer>(i);
      if (!x.has_value()) return x.error();
      o.args.push_back(static_cast<char*>(x->untyped_data()));
      o.arg_bytes.push_back(x->size_bytes());
    }
    for (size_t i = 0; i < rets.size(); ++i) {
      auto x = rets.get<ffi::AnyBuffer>(i);
      if (!x.has_value()) return x.error();
      o.results.push_back(static_cast<char*>((*x)->untyped_data()));
      o.result_bytes.push_back((*x)->size_bytes());
    }
    if (o.results.size() == program->header->results + 1) {
      o.workspace = o.results.back(), o.workspace_bytes = o.result_bytes.back();
      o.results.pop_back(), o.result_bytes.pop_back();
    }
    LaunchOptions options;
    options.deadline_ms = *deadline;
    if (const auto threads = attrs.get<int64_t>("threads"); threads.has_value()) options.threads = *threads;
    if (const auto seed = attrs.get<int64_t>("seed"); seed.has_value()) options.seed = *seed;
    const LaunchError e = launch(program, o, options);
    if (e.kind == LaunchError::kDeadline) return ffi::Error(ffi::ErrorCode::kDeadlineExceeded, "jax_mpk: " + e.text);
    if (e.kind == LaunchError::kMemory) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_mpk: " + e.text);
    if (e.kind == LaunchError::kArguments) return ffi::Error::InvalidArgument("jax_mpk: " + e.text);
    return ffi::Error::Success();
  } catch (const ProgramError& e) {
    return ffi::Error::InvalidArgument(std::string("jax_mpk: ") + e.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_mpk: out of memory while a program is loaded");
  } catch (const std::exception& e) {
    return ffi::Error::Internal(std::string("jax_mpk: ") + e.what());
  }
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, instantiate, ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kExecute, execute, ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());

}  // namespace

const char* const kCpuTarget = "jax_mpk_cpu";
CpuHandlers cpu_handlers() { return {reinterpret_cast<void*>(kInstantiate), reinterpret_cast<void*>(kExecute)}; }
const int* ffi_version() {
  static const int version[] = {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  return version;
}

}  // namespace mpk
