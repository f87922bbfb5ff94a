// One number at a time, on any CPU: the fall-back, and double for gradcheck.
#include "kernels.h"
#include "rows.h"

namespace flowrl {
namespace {

template <class S>
struct Plain {
  using Scalar = S;
  using Reg = S;
  static constexpr int width = 1;
  static constexpr int64_t block = 128;
  static constexpr S lowest = sizeof(S) == 8 ? -746 : -104;  // e^lowest is 0

  static Reg set(S x) { return x; }
  static Reg load(const S* x) { return *x; }
  static Reg load(const Bf16* x) { return from_bits(uint32_t(x->bits) << 16); }
  static Reg load(const F16* x) {
    const uint32_t sign = uint32_t(x->bits & 0x8000) << 16, rest = x->bits & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity, NaN
    const S magnitude = from_bits(rest << 13) * S(0x1p112);  // subnormal halves come out right
    return sign ? -magnitude : magnitude;
  }
  static void store(S* out, Reg x) { *out = x; }
  static void store(Bf16* out, Reg x) {
    const uint32_t bits = to_bits(x);
    out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static void store(F16* out, Reg x) {
    const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (x != x) out->bits = uint16_t(sign | 0x7e00);
    else if (magnitude >= 0x477ff000) out->bits = uint16_t(sign | 0x7c00);  // rounds to infinity
    else if (magnitude < 0x38800000)  // subnormal in half: let the addition do the rounding
      out->bits = uint16_t(sign | (to_bits(S(from_bits(magnitude)) + S(0.5)) - 0x3f000000));
    else out->bits = uint16_t(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13));
  }
  template <class T>
  static S one(const T* x) { return load(x); }
  template <class T>
  static void put(T* out, S x) { store(out, x); }
  template <class T>
  static void prefetch(const T*) {}

  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg fma(Reg a, Reg b, Reg c) { return S(double(a) * b + c); }  // float: one rounding, as the hardware does
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static double sum(Reg x) { return x; }
  static S top(Reg x) { return x; }
  static Reg exp(Reg d) { return d <= lowest ? S(0) : std::exp(d); }

  static S from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  static uint32_t to_bits(S value) {
    const float x = float(value);
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
  }
};

void plain_stats(const Stats& a, int64_t begin, int64_t end) {
  if (a.logits.type == Type::f64) stats_rows<Plain<double>, double>(a, begin, end);
  else stats<Plain<float>>(a, begin, end);
}

void plain_backward(const Backward& a, int64_t begin, int64_t end) {
  if (a.logits.type == Type::f64) backward_rows<Plain<double>, double, double>(a, begin, end);
  else backward<Plain<float>>(a, begin, end);
}

const Kernels kernels = {plain_stats, plain_backward};

}  // namespace

const Kernels& plain_kernels() { return kernels; }

}  // namespace flowrl
