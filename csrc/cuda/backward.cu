// logprob_backward: logits -> gradient, one read and one write of each element, in place or into another tensor.
#include "row.cuh"

namespace flowrl::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int ROUNDS = 4;  // chunks a thread goes through: long enough to pay for the start of a block

// Columns of one block.
template <int VEC>
constexpr int SEGMENT = THREADS * VEC * LOADS<VEC> * ROUNDS;

// What one row needs. log p = (x - m) * it - log S, so a logit's gradient is -scale * p, and the target's is
// scale * (1 - p), computed as -expm1 of the same exponent: 1 - p has no digits left when p is nearly 1.
// SLOPED, where the entropy has a gradient: p (offset + slope log p) less, which is 0 where p is.
template <bool SLOPED>
struct RowGradient {
  float scale, maximum, log_sum, inv_temperature, offset, slope;
  __device__ float exponent(float x) const { return (x - maximum) * inv_temperature - log_sum; }
  __device__ float other(float x) const {
    const float e = exponent(x), p = expf(e);
    if constexpr (SLOPED) return p == 0.0f ? 0.0f : -p * fmaf(slope, e, scale + offset);
    return -scale * p;
  }
  __device__ float target(float x) const {
    const float e = exponent(x), own = -scale * expm1f(e);
    if constexpr (SLOPED) {
      const float p = expf(e);
      if (p != 0.0f) return own - p * fmaf(slope, e, offset);
    }
    return own;
  }
};

// Block (t, s) does columns s * SEGMENT ... of row t. Each thread reads a chunk of vectors and then writes the same
// places, so in and out may be one tensor (hence no __restrict__).
template <typename IN, typename OUT, int VEC, bool SLOPED>
__global__ void __launch_bounds__(THREADS) backward_kernel(Logits logits, Rows r, Gradient g) {
  constexpr int STEP = THREADS * VEC;
  const int64_t t = blockIdx.x, label = r.target[t];
  const IN* in = static_cast<const IN*>(logits.data) + t * logits.row_stride;
  OUT* out = static_cast<OUT*>(g.out) + t * g.row_stride;
  const float grad = g.grad[t], inv_temperature = r.inv_temperature[t * r.inv_temperature_stride];
  const float offset = SLOPED ? g.offset[t] : 0.0f, slope = SLOPED ? g.slope[t] : 0.0f;
  const RowGradient<SLOPED> row{grad * inv_temperature, g.maximum[t],            g.log_sum[t],
                                inv_temperature,        offset * inv_temperature, slope * inv_temperature};
  const bool zero = label == r.ignore_index || (grad == 0.0f && offset == 0.0f && slope == 0.0f);
  const int valid = zero ? 0 : static_cast<int>(r.vocab_valid);  // the columns that are read
  const int target = owned_column(r, label), columns = static_cast<int>(logits.columns);
  const int first = static_cast<int>(blockIdx.y) * SEGMENT<VEC> + static_cast<int>(threadIdx.x) * VEC;

  for (int round = 0; round < ROUNDS; ++round) {
    const int column = first + round * LOADS<VEC> * STEP;
    if (column >= columns) return;
    Raw<IN, VEC> raw[LOADS<VEC>];
#pragma unroll
    for (int k = 0; k < LOADS<VEC>; ++k)
      if (column + k * STEP + VEC <= valid) raw[k] = load<VEC>(in + column + k * STEP);
#pragma unroll
    for (int k = 0; k < LOADS<VEC>; ++k) {
      const int c = column + k * STEP;
      if (c + VEC <= valid) {
        float x[VEC], y[VEC];
        unpack<VEC, IN>(raw[k], x);
#pragma unroll
        for (int i = 0; i < VEC; ++i) y[i] = row.other(x[i]);
        if (target >= c && target < c + VEC) {
#pragma unroll
          for (int i = 0; i < VEC; ++i)
            if (c + i == target) y[i] = row.target(x[i]);
        }
        store<VEC>(out + c, y);
      } else if (c >= valid && c + VEC <= columns) {
        const float y[VEC] = {};
        store<VEC>(out + c, y);
      } else {  // the vector holds the end of the valid columns, or of the row
        for (int i = c; i < c + VEC && i < columns; ++i) {
          float y = 0.0f;
          if (i < valid) y = i == target ? row.target(static_cast<float>(in[i])) : row.other(static_cast<float>(in[i]));
          out[i] = static_cast<OUT>(y);
        }
      }
    }
  }
}

template <typename IN, typename OUT, int VEC, bool SLOPED>
cudaError_t launch(const Logits& logits, const Rows& r, const Gradient& g, cudaStream_t stream) {
  static_assert(MAX_COLUMNS / SEGMENT<VEC> < 65535, "grid.y");
  const int64_t segments = (logits.columns + SEGMENT<VEC> - 1) / SEGMENT<VEC>;
  const dim3 grid(static_cast<unsigned>(logits.rows), static_cast<unsigned>(segments));
  backward_kernel<IN, OUT, VEC, SLOPED><<<grid, THREADS, 0, stream>>>(logits, r, g);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_backward(const Logits& logits, const Rows& r, const Gradient& g, cudaStream_t stream) {
  if (logits.rows == 0 || logits.columns == 0) return cudaSuccess;
  return with_type(logits.type, [&](auto from) {
    return with_type(g.type, [&](auto to) {
      using IN = decltype(from);
      using OUT = decltype(to);
      if constexpr (std::is_same_v<IN, OUT> || std::is_same_v<IN, float>) {
        constexpr int VEC = VECTOR_BYTES / sizeof(IN);  // stored as 16 bytes, or as 8 where the gradient is narrower
        const bool whole = aligned(logits.data, logits.row_stride, sizeof(IN), VECTOR_BYTES) &&
                           aligned(g.out, g.row_stride, sizeof(OUT), VEC * sizeof(OUT));
        if (g.slope)
          return whole ? launch<IN, OUT, VEC, true>(logits, r, g, stream)
                       : launch<IN, OUT, 1, true>(logits, r, g, stream);
        return whole ? launch<IN, OUT, VEC, false>(logits, r, g, stream)
                     : launch<IN, OUT, 1, false>(logits, r, g, stream);
      } else {
        return cudaErrorInvalidValue;  // the binding refuses this pair
      }
    });
  });
}

}  // namespace flowrl::cuda
