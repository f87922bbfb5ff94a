// 16 floats at a time. Compiled with AVX-512 (F, BW, DQ, VL), and called only where the CPU has it.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "rows.h"

#include <immintrin.h>

namespace flowrl {
namespace {

struct Avx512 {
  using Scalar = float;
  using Reg = __m512;
  static constexpr int width = 16;
  static constexpr int64_t block = 2048;
  static constexpr float lowest = -88.0f;

  static Reg set(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* x) { return _mm512_loadu_ps(x); }
  static Reg load(const Bf16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
  }
  static Reg load(const F16* x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x)); }
  static void store(float* out, Reg x) { _mm512_storeu_ps(out, x); }
  static void store(Bf16* out, Reg x) {  // to the nearest, ties to even; a NaN stays one
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi32_epi16(high));
  }
  static void store(F16* out, Reg x) {
    _mm256_storeu_si256((__m256i*)out, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <class T>
  static float one(const T* x) { return _mm512_cvtss_f32(load_some<Avx512>(x, 1)); }
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

  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static double sum(Reg x) { return _mm512_reduce_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x))) +
                                    _mm512_reduce_add_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))); }
  static float top(Reg x) { return _mm512_reduce_max_ps(x); }
  static Reg round(Reg x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg exp(Reg d) { return exp_float<Avx512>(d); }
  static Reg scale(Reg p, Reg n, Reg d) {
    return _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), _mm512_cmp_ps_mask(d, set(-87.3f), _CMP_LT_OQ), set(0));
  }
};

const Kernels kernels = {stats<Avx512>, backward<Avx512>};

}  // namespace

const Kernels* avx512_kernels() { return &kernels; }

}  // namespace flowrl

#else

const flowrl::Kernels* flowrl::avx512_kernels() { return nullptr; }

#endif
