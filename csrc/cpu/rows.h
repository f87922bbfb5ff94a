// The kernels of one row, written once over a vector type V that each instruction set brings:
//   V::Scalar, V::Reg, V::width, V::lowest, V::block, and static functions
//   load, store, one, put, prefetch, set, add, sub, mul, fma, max, exp, sum, top.
// V::block logits are read together: twice, the second time from the first-level cache.
// V::max(a, b) gives b where either is a NaN. V::exp is for V::lowest <= d <= 0, is 0 at V::lowest, and keeps a NaN.
// Everything here is in an unnamed namespace: each instruction set must keep its own copy.
#pragma once

#include "kernels.h"

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>

namespace flowrl {
namespace {

struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };

// Cephes' expf: e^d = 2^n e^r with |r| <= ln 2 / 2, within 1 unit in the last place; V::scale multiplies by 2^n, or by 0
// where d is so low that the result would not be a normal number.
template <class V>
inline typename V::Reg exp_float(typename V::Reg d) {
  const auto n = V::round(V::mul(d, V::set(1.44269504088896341f)));
  const auto r = V::fma(n, V::set(2.12194440e-4f), V::fma(n, V::set(-0.693359375f), d));
  auto p = V::set(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = V::fma(p, r, V::set(c));
  return V::scale(V::add(V::fma(p, V::mul(r, r), r), V::set(1.0f)), n, d);
}

// n < V::width values; what is missing is -inf, which adds nothing to any sum.
template <class V, class T>
inline typename V::Reg load_some(const T* x, int64_t n) {
  alignas(64) typename V::Scalar lanes[V::width];
  alignas(64) T few[V::width] = {};
  std::memcpy(few, x, n * sizeof(T));
  V::store(lanes, V::load(few));
  for (int64_t i = n; i < V::width; ++i) lanes[i] = -std::numeric_limits<typename V::Scalar>::infinity();
  return V::load(lanes);
}

template <class V, class T>
inline typename V::Scalar block_top(const T* x, int64_t n) {
  constexpr int W = V::width;
  const auto lowest = V::set(-std::numeric_limits<typename V::Scalar>::infinity());
  typename V::Reg a = lowest, b = lowest, c = lowest, d = lowest;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a = V::max(V::load(x + i), a);
    b = V::max(V::load(x + i + W), b);
    c = V::max(V::load(x + i + 2 * W), c);
    d = V::max(V::load(x + i + 3 * W), d);
  }
  for (; i + W <= n; i += W) a = V::max(V::load(x + i), a);
  if (i < n) b = V::max(load_some<V>(x + i, n - i), b);
  return V::top(V::max(V::max(a, b), V::max(c, d)));
}

template <class V>
struct Sums {
  typename V::Reg total = V::set(0), weighted = V::set(0);

  // -inf is a legal logit of weight 0; held at the lowest d, its d e^d is 0 as well and not NaN.
  inline void add(typename V::Reg x, typename V::Reg base, typename V::Reg inv_temperature) {
    const auto d = V::max(V::set(V::lowest), V::mul(V::sub(x, base), inv_temperature));
    const auto e = V::exp(d);
    total = V::add(total, e);
    weighted = V::fma(d, e, weighted);
  }
};

// Adds sum e^d and sum d e^d of one block. Equal logits round all the same way when they are added up in float, so no
// lane takes more than a few in a row: first the sums of short runs, then those of the block, then double.
template <class V, class T>
inline void block_sums(const T* x, int64_t n, typename V::Scalar base_, typename V::Scalar inv_temperature_,
                       double& total, double& weighted) {
  constexpr int W = V::width;
  constexpr int64_t run = 8 * 4 * W;
  const auto base = V::set(base_), inv_temperature = V::set(inv_temperature_);
  Sums<V> all;
  int64_t i = 0;
  while (i + 4 * W <= n) {
    const int64_t end = i + run < n ? i + run : n;
    Sums<V> a, b, c, d;
    for (; i + 4 * W <= end; i += 4 * W) {
      a.add(V::load(x + i), base, inv_temperature);
      b.add(V::load(x + i + W), base, inv_temperature);
      c.add(V::load(x + i + 2 * W), base, inv_temperature);
      d.add(V::load(x + i + 3 * W), base, inv_temperature);
      V::prefetch(x + i + V::block);  // the block after this one: the memory bus would idle during the exponentials
    }
    all.total = V::add(all.total, V::add(V::add(a.total, b.total), V::add(c.total, d.total)));
    all.weighted = V::add(all.weighted, V::add(V::add(a.weighted, b.weighted), V::add(c.weighted, d.weighted)));
  }
  for (; i + W <= n; i += W) all.add(V::load(x + i), base, inv_temperature);
  if (i < n) all.add(load_some<V>(x + i, n - i), base, inv_temperature);
  total += V::sum(all.total);
  weighted += V::sum(all.weighted);
}

template <class S>
struct RowStats { S maximum; double total, weighted; };

// Online softmax, a block at a time: the raw maximum m, sum e^d and sum d e^d with d = (x - m) / temperature.
template <class V, class T>
inline RowStats<typename V::Scalar> row_stats(const T* x, int64_t n, typename V::Scalar inv_temperature) {
  using S = typename V::Scalar;
  const S lowest = -std::numeric_limits<S>::infinity();
  RowStats<S> row = {lowest, 0, 0};
  for (int64_t i = 0; i < n; i += V::block) {
    const int64_t length = n - i < V::block ? n - i : V::block;
    const S top = block_top<V>(x + i, length);  // never NaN; a NaN comes out of the sums
    if (top > row.maximum) {
      if (row.maximum > lowest) {
        const double shift = (double(row.maximum) - double(top)) * inv_temperature, factor = std::exp(shift);
        row.weighted = factor * (row.weighted + shift * row.total);
        row.total *= factor;
      }
      row.maximum = top;
    }
    const S base = row.maximum > lowest ? row.maximum : S(0);  // -inf - -inf would be NaN
    block_sums<V>(x + i, length, base, inv_temperature, row.total, row.weighted);
  }
  return row;
}

template <class V, class T>
void stats_rows(const Stats& a, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const int64_t valid = a.rows.vocab_valid;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(a.logits.data) + t * a.logits.row_stride;
    const S inv_temperature = static_cast<const S*>(a.rows.inv_temperature)[t * a.rows.inv_temperature_stride];
    RowStats<S> row = {-std::numeric_limits<S>::infinity(), 0, 0};
    S picked = 0;
    if (a.rows.target[t] != a.rows.ignore_index) {
      row = row_stats<V>(x, valid, inv_temperature);
      const int64_t hit = a.rows.target[t] - a.rows.vocab_start;
      if (hit >= 0 && hit < valid) picked = V::one(x + hit);
    }
    S* out = static_cast<S*>(a.out) + t;
    out[0] = row.maximum;
    out[a.total_rows] = S(row.total);
    out[2 * a.total_rows] = a.entropy ? S(row.weighted) : S(0);
    out[3 * a.total_rows] = picked;
  }
}

template <class V>
struct Gradient {
  typename V::Reg maximum, inv_temperature, minus_log_sum, scale;

  // log p = (x - m) / temperature - log S, not below where e^ it is 0
  inline typename V::Reg logp(typename V::Reg x) const {
    return V::max(V::set(V::lowest), V::fma(V::sub(x, maximum), inv_temperature, minus_log_sum));
  }
  inline typename V::Reg of(typename V::Reg x) const { return V::mul(scale, V::exp(logp(x))); }
};

// p (scale + slope log p): the entropy has a gradient too.
template <class V>
struct SlopedGradient : Gradient<V> {
  typename V::Reg slope;

  inline typename V::Reg of(typename V::Reg x) const {
    const auto logp = Gradient<V>::logp(x);
    return V::mul(V::exp(logp), V::fma(slope, logp, Gradient<V>::scale));
  }
};

template <class V, class T, class O, class G>
inline void row_gradient(const T* x, O* out, int64_t n, const G& g) {
  constexpr int W = V::width;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const auto a = g.of(V::load(x + i)), b = g.of(V::load(x + i + W));
    V::store(out + i, a);
    V::store(out + i + W, b);
  }
  for (; i < n; i += W) {
    const int64_t left = n - i < W ? n - i : W;
    O few[W];
    V::store(few, g.of(load_some<V>(x + i, left)));
    std::memcpy(out + i, few, left * sizeof(O));
  }
}

template <class V, class T, class O>
void backward_rows(const Backward& a, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const int64_t valid = a.rows.vocab_valid, columns = a.logits.columns;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(a.logits.data) + t * a.logits.row_stride;
    O* out = static_cast<O*>(a.out) + t * a.out_stride;
    const S grad = static_cast<const S*>(a.grad)[t];
    const S offset = a.offset ? static_cast<const S*>(a.offset)[t] : S(0);
    const S slope = a.slope ? static_cast<const S*>(a.slope)[t] : S(0);
    const bool sloped = offset != 0 || slope != 0;
    if (a.rows.target[t] == a.rows.ignore_index || (grad == 0 && !sloped)) {
      std::memset(static_cast<void*>(out), 0, columns * sizeof(O));
      continue;
    }
    const S inv_temperature = static_cast<const S*>(a.rows.inv_temperature)[t * a.rows.inv_temperature_stride];
    const S maximum = static_cast<const S*>(a.maximum)[t], log_sum = static_cast<const S*>(a.log_sum)[t];
    const S scale = grad * inv_temperature;
    const int64_t hit = a.rows.target[t] - a.rows.vocab_start;
    const bool owned = hit >= 0 && hit < valid;
    const S logp = owned ? (V::one(x + hit) - maximum) * inv_temperature - log_sum : S(0);  // before it is overwritten
    Gradient<V> g{V::set(maximum), V::set(inv_temperature), V::set(-log_sum), V::set(-scale)};
    S own = -scale * std::expm1(logp);  // 1 - p without cancellation
    if (sloped) {
      g.scale = V::set(-inv_temperature * (grad + offset));
      row_gradient<V>(x, out, valid, SlopedGradient<V>{g, V::set(-inv_temperature * slope)});
      if (!(logp <= V::lowest)) own -= inv_temperature * std::exp(logp) * (offset + slope * logp);
    } else {
      row_gradient<V>(x, out, valid, g);
    }
    if (owned) V::put(out + hit, own);
    std::memset(static_cast<void*>(out + valid), 0, (columns - valid) * sizeof(O));
  }
}

template <class V>
void stats(const Stats& a, int64_t begin, int64_t end) {
  switch (a.logits.type) {
    case Type::f32: return stats_rows<V, float>(a, begin, end);
    case Type::bf16: return stats_rows<V, Bf16>(a, begin, end);
    case Type::f16: return stats_rows<V, F16>(a, begin, end);
    case Type::f64: return;  // plain_kernels' own
  }
}

// From any type to itself, or from float to a half.
template <class V>
void backward(const Backward& a, int64_t begin, int64_t end) {
  switch (a.logits.type) {
    case Type::bf16: return backward_rows<V, Bf16, Bf16>(a, begin, end);
    case Type::f16: return backward_rows<V, F16, F16>(a, begin, end);
    case Type::f64: return;
    case Type::f32: break;
  }
  switch (a.out_type) {
    case Type::f32: return backward_rows<V, float, float>(a, begin, end);
    case Type::bf16: return backward_rows<V, float, Bf16>(a, begin, end);
    case Type::f16: return backward_rows<V, float, F16>(a, begin, end);
    case Type::f64: return;
  }
}

}  // namespace
}  // namespace flowrl
