// CUDA's names for g++, as far as csrc/cuda uses them: any other is an error of the compiler. The environment says how
// to run: CUDA_EMULATION_ORDER=backwards (fibers.h), CUDA_EMULATION_EX2=-1 .. 1, the error of ex2.approx in units of
// the largest that its documentation allows.
#pragma once

#include <cmath>
#include <cstdlib>

#include "fibers.h"

#pragma GCC visibility push(hidden)  // as in fibers.h

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))

// The message itself; null is success.
using cudaError_t = const char*;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = nullptr, cudaErrorInvalidValue = "invalid argument";

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// The low 32 bits of high:low shifted right; `shift` counts modulo 32.
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32) | low) >> (shift % 32));
}

using __half = _Float16;
struct __nv_bfloat16 {  // rounded to the nearest, ties to even
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    const unsigned b = __float_as_uint(x);
    bits = x != x ? 0x7fff : static_cast<uint16_t>((b + (0x7fff + (b >> 16 & 1))) >> 16);
  }
  explicit operator float() const { return __uint_as_float(unsigned{bits} << 16); }
};

// Reads that a cache may drop at once.
template <class T>
T __ldcs(const T* from) {
  return *from;
}

inline void __syncthreads() { emulated::wait(emulated::State::WAITS_FOR_BLOCK); }

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  using namespace emulated;
  static_assert(sizeof(T) <= sizeof(Thread::shown));
  if (mask != 0xffffffffu) fault("a shuffle of some lanes only is not emulated");
  const unsigned me = block.current, from = me % WARP + offset < WARP ? me + offset : me;
  std::memcpy(&block.threads[me].shown, &value, sizeof(T));
  wait(State::WAITS_FOR_WARP);
  std::memcpy(&value, &block.threads[from].seen, sizeof(T));
  return value;
}

namespace emulated {

inline cudaError_t last_error = cudaSuccess;
inline double ex2_error;

inline bool is_set(const char* name, const char* value) {
  const char* found = std::getenv(name);
  return found && !std::strcmp(found, value);
}

// What `kernel<<<grid, threads, shared, stream>>>(...)` is translated to. A launch within this one's limits.
template <class F>
void launch(dim3 grid, dim3 threads, size_t shared, cudaStream_t, F kernel) {
  const bool fits = grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 && threads.x >= 1 &&
                    threads.x <= 1024 && grid.z * threads.y * threads.z == 1;
  if (!fits || shared) {
    last_error = shared ? "CUDA emulation: dynamic shared memory is not emulated" : "invalid configuration argument";
    return;
  }
  backwards = is_set("CUDA_EMULATION_ORDER", "backwards");
  const char* error = std::getenv("CUDA_EMULATION_EX2");
  ex2_error = error ? std::atof(error) : 0.0;
  run_grid(grid, threads.x, {[](const void* what) { (*static_cast<const F*>(what))(); }, &kernel});
  if (*message) last_error = message;
}

// The inline PTX that there is: translate.py gives each instruction its function.
inline float ptx_max_nan(float a, float b) { return a != a || b != b ? NAN : std::fmax(a, b); }

template <class Max>
unsigned of_bf16_pairs(unsigned a, unsigned b, Max max) {  // the larger is one of the two, or the NaN 0x7fff
  const float low = max(__uint_as_float(a << 16), __uint_as_float(b << 16));
  const float high = max(__uint_as_float(a & 0xffff0000), __uint_as_float(b & 0xffff0000));
  return unsigned{__nv_bfloat16(high).bits} << 16 | __nv_bfloat16(low).bits;
}
inline unsigned ptx_max_nan_bf16x2(unsigned a, unsigned b) { return of_bf16_pairs(a, b, ptx_max_nan); }
inline unsigned ptx_max_bf16x2(unsigned a, unsigned b) {
  return of_bf16_pairs(a, b, [](float x, float y) { return std::fmax(x, y); });
}

inline float ptx_ex2_approx_ftz(float x) {
  const auto flushed = [](float y) { return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, y) : y; };
  const double exact = std::exp2(static_cast<double>(flushed(x)));
  return flushed(static_cast<float>(exact * (1 + ex2_error * 0x1p-22)));
}

}  // namespace emulated

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulated::last_error;
  emulated::last_error = cudaSuccess;
  return error;
}

#pragma GCC visibility pop
