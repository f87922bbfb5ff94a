// What the row kernels share: vector loads and stores, and the softmax sums that are built in one pass.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace flowrl::cuda {

constexpr int VECTOR_BYTES = 16;

// Loads a thread has in flight before it uses any: 64 bytes as vectors, or as many as the registers hold one by one.
template <int VEC>
constexpr int LOADS = VEC == 1 ? 16 : 4;

// -inf in every element of T that a 32-bit word holds.
template <typename T>
constexpr unsigned MASKED = sizeof(T) == 4 ? 0xff800000u : std::is_same_v<T, __half> ? 0xfc00fc00u : 0xff80ff80u;

// N values of T as one register image.
template <typename T, int N>
using Raw = std::conditional_t<
    N * sizeof(T) == 16, uint4,
    std::conditional_t<N * sizeof(T) == 8, uint2, std::conditional_t<N * sizeof(T) == 4, unsigned, unsigned short>>>;

template <int N, typename T>
__device__ Raw<T, N> load(const T* from) {
  return __ldcs(reinterpret_cast<const Raw<T, N>*>(from));  // read once: the first to leave the cache
}

// The same values, at any address that T may have: by 4-byte words, of which the first and the last may hold a half
// that is another row's (it is in memory, since its word is).
template <int N, typename T>
__device__ Raw<T, N> load_unaligned(const T* from) {
  constexpr int WORDS = N * sizeof(T) / 4;
  const uintptr_t address = reinterpret_cast<uintptr_t>(from);
  const unsigned* words = reinterpret_cast<const unsigned*>(address & ~uintptr_t{3});
  unsigned word[WORDS + 1];
#pragma unroll
  for (int i = 0; i < WORDS; ++i) word[i] = __ldcs(words + i);
  if constexpr (sizeof(T) < 4) {
    const unsigned shift = 8 * static_cast<unsigned>(address & 3);  // one for the row: vectors are multiples of it apart
    word[WORDS] = shift ? __ldcs(words + WORDS) : 0;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) word[i] = __funnelshift_r(word[i], word[i + 1], shift);
  }
  Raw<T, N> raw;
  memcpy(&raw, word, sizeof(raw));
  return raw;
}

template <int N, typename T>
__device__ void unpack(const Raw<T, N>& raw, float* x) {
  T values[N];
  memcpy(values, &raw, sizeof(values));
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = static_cast<float>(values[i]);
}

template <int N, typename T>
__device__ void store(T* to, const float* x) {
  T values[N];
  Raw<T, N> raw;
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = static_cast<T>(x[i]);
  memcpy(&raw, values, sizeof(raw));
  *reinterpret_cast<Raw<T, N>*>(to) = raw;
}

// The column of this shard that holds `label`, or -1. Compared, not subtracted first: a label can be any number.
__device__ inline int owned_column(const Rows& r, int64_t label) {
  const bool owned = label >= r.vocab_start && label < r.vocab_start + r.vocab_valid;
  return owned ? static_cast<int>(label - r.vocab_start) : -1;
}

// fmaxf drops a NaN; this keeps it.
__device__ inline float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// The larger of two bf16, twice; with a NaN kept, or dropped.
__device__ inline unsigned max_nan_bf16x2(unsigned a, unsigned b) {
  unsigned result;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

__device__ inline unsigned max_bf16x2(unsigned a, unsigned b) {
  unsigned result;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

__device__ inline float low_bf16(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_bf16(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

// 2^x; below 2^-126 it is 0.
__device__ inline float exp2_ftz(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

// e^d for -86 <= d <= 0, with a relative error of at most 2^-22 + 1.4e-8 |d|, in six instructions where expf takes
// eight. The power of two is split off exactly (SHIFT rounds to an integer), so ex2 sees only [-1/2, 1/2]. Rounding
// d * log2(e) first, as __expf and the sums of bf16 do, would cost the entropy 6e-8 |d| more.
__device__ inline float exp_nonpositive(float d) {
  constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23
  const float shifted = fmaf(d, LOG2E, SHIFT);
  const float fraction = fmaf(d, LOG2E, SHIFT - shifted);
  return __uint_as_float(__float_as_uint(exp2_ftz(fraction)) + (__float_as_uint(shifted) << 23));
}

// m, S and E of some of a row's logits: S = sum e^d, E = sum d e^d, d = (x - m) * inv_temperature. m = -inf means that
// S = E = 0. A NaN or +inf logit shows in m alone, where it stays; what S and E are then is set at the end (finished).
struct Partial {
  float max, sum, dsum;
};

// The same seen from a maximum top >= p.max: E <- w (E + delta S), S <- w S, where a term of weight 0 counts 0.
__device__ inline Partial raised(const Partial& p, float top, float inv_temperature) {
  const float delta = (p.max - top) * inv_temperature;
  const float weight = p.max == -INFINITY ? 0.0f : expf(delta);
  return {top, weight * p.sum, weight == 0.0f ? 0.0f : weight * (p.dsum + delta * p.sum)};
}

__device__ inline Partial merged(const Partial& a, const Partial& b, float inv_temperature) {
  const float top = max_nan(a.max, b.max);
  const Partial left = raised(a, top, inv_temperature), right = raised(b, top, inv_temperature);
  return {top, left.sum + right.sum, left.dsum + right.dsum};
}

// Takes N logits in: their maximum first, at most one rescale, then the sums, in four short chains (speed, and less
// rounding than one long chain when many logits are equal).
template <bool ENTROPY, int N>
__device__ void add(Partial& p, const float (&x)[N], float inv_temperature) {
  float top = p.max;
#pragma unroll
  for (int i = 0; i < N; ++i) top = max_nan(top, x[i]);
  if (top == -INFINITY) return;  // only masked logits up to here
  if (top != p.max) p = raised(p, top, inv_temperature);
  float sum[4] = {}, dsum[4] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    // The clamp takes in a masked logit, d = -inf: e^-86 is 4e-38, nothing beside S >= 1, where 0 * -inf would be NaN.
    const float d = fmaxf((x[i] - top) * inv_temperature, -86.0f);
    const float e = exp_nonpositive(d);
    sum[i % 4] += e;
    if (ENTROPY) dsum[i % 4] = fmaf(e, d, dsum[i % 4]);
  }
  p.sum += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  p.dsum += (dsum[0] + dsum[1]) + (dsum[2] + dsum[3]);
}

// The same for N pairs of bf16, in 8 instructions a logit instead of 14: at 16 bits a logit an H200 has 14 to 15 issue
// slots a logit before memory is no longer what limits. Maxima are of pairs, d is in powers of two from the start, and
// its rounding costs the entropy up to 3e-6 where half the mass sits at d = -12; half a step of a bf16 logit there is
// 0.03. A logit below `floor` weighs 2^-149 or less, which is 0 here: raised to it, no masked one makes 0 * -inf.
template <bool ENTROPY, int N>
__device__ void add_pairs(Partial& p, unsigned& floor, const unsigned (&x)[N], float inv_temperature) {
  unsigned most = x[0];
#pragma unroll
  for (int i = 1; i < N; ++i) most = max_nan_bf16x2(most, x[i]);
  const float top = max_nan(p.max, max_nan(low_bf16(most), high_bf16(most)));
  if (top == -INFINITY) return;
  if (top != p.max) {
    p = raised(p, top, inv_temperature);
    const float low = top - 104.0f / inv_temperature;  // e^-104 < 2^-149
    const unsigned below = __float_as_uint(fmaxf(fmaf(fabsf(low), -0.0078125f, low), -3.3e38f)) >> 16;  // cut to bf16
    floor = below << 16 | below;
  }
  const float scale = inv_temperature * LOG2E;
  float sum[4] = {}, dsum[4] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const unsigned pair = max_bf16x2(x[i], floor);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float d = ((half ? high_bf16(pair) : low_bf16(pair)) - top) * scale, e = exp2_ftz(d);
      sum[2 * i % 4 + half] += e;
      if (ENTROPY) dsum[2 * i % 4 + half] = fmaf(e, d, dsum[2 * i % 4 + half]);
    }
  }
  p.sum += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  p.dsum += LN2 * ((dsum[0] + dsum[1]) + (dsum[2] + dsum[3]));
}

// E of a row whose every other logit is masked is 0, where the clamp of `add` leaves at most 86 e^-86 a column: 2e-27 in
// all, far below what an entropy can tell.
__device__ inline Partial finished(const Partial& p) {
  if (!(p.max < INFINITY)) return {p.max, NAN, NAN};
  return {p.max, p.sum, p.dsum > -1e-26f ? 0.0f : p.dsum};
}

// Calls f with a value of the C++ type that `type` names.
template <typename F>
cudaError_t with_type(Type type, F f) {
  switch (type) {
    case Type::f32: return f(float{});
    case Type::bf16: return f(__nv_bfloat16{});
    case Type::f16: return f(__half{});
  }
  return cudaErrorInvalidValue;
}

// Whether every row of a matrix starts on a multiple of `bytes`.
inline bool aligned(const void* data, int64_t row_stride, size_t element, size_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && row_stride * element % bytes == 0;
}

}  // namespace flowrl::cuda
