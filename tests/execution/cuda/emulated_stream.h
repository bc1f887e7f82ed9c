// In place of a CUDA stream, which handlers on the CPU are not given.
#pragma once
#include <optional>

#include "xla/ffi/api/ffi.h"

struct EmulatedStream {};

template <>
struct xla::ffi::CtxDecoding<EmulatedStream> {
  using Type = void*;

  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*, DiagnosticEngine&) {
    return static_cast<void*>(nullptr);
  }
};
