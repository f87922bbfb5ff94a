// 8 floats at a time. Compiled with AVX2, FMA and F16C, and called only where the CPU has them.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "rows.h"

#include <immintrin.h>

namespace flowrl {
namespace {

struct Avx2 {
  using Scalar = float;
  using Reg = __m256;
  static constexpr int width = 8;
  static constexpr int64_t block = 1024;
  static constexpr float lowest = -88.0f;

  static Reg set(float x) { return _mm256_set1_ps(x); }
  static Reg load(const float* x) { return _mm256_loadu_ps(x); }
  static Reg load(const Bf16* x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16));
  }
  static Reg load(const F16* x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)); }
  static void store(float* out, Reg x) { _mm256_storeu_ps(out, x); }
  static void store(Bf16* out, Reg x) {  // to the nearest, ties to even; a NaN stays one
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    _mm_storeu_si128((__m128i*)out, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
  }
  static void store(F16* out, Reg x) {
    _mm_storeu_si128((__m128i*)out, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <class T>
  static float one(const T* x) { return _mm256_cvtss_f32(load_some<Avx2>(x, 1)); }
  template <class T>
  static void put(T* out, float x) {
    T lanes[width];
    store(lanes, set(x));
    *out = lanes[0];
  }
  template <class T>
  static void prefetch(const T* x) {
    for (size_t i = 0; i < 4 * width * sizeof(T); i += 64) _mm_prefetch((const char*)x + i, _MM_HINT_T0);
  }

  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static double sum(Reg x) {
    alignas(32) float lanes[width];
    store(lanes, x);
    double total = 0;
    for (float lane : lanes) total += lane;
    return total;
  }
  static float top(Reg x) {
    alignas(32) float lanes[width];
    store(lanes, x);
    float highest = lanes[0];
    for (float lane : lanes) highest = lane > highest ? lane : highest;
    return highest;
  }
  static Reg round(Reg x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg exp(Reg d) { return exp_float<Avx2>(d); }
  static Reg scale(Reg p, Reg n, Reg d) {
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    const Reg scaled = mul(p, _mm256_castsi256_ps(power));  // a NaN is in p
    return _mm256_andnot_ps(_mm256_cmp_ps(d, set(-87.3f), _CMP_LT_OQ), scaled);
  }
};

const Kernels kernels = {stats<Avx2>, backward<Avx2>};

}  // namespace

const Kernels* avx2_kernels() { return &kernels; }

}  // namespace flowrl

#else

const flowrl::Kernels* flowrl::avx2_kernels() { return nullptr; }

#endif
