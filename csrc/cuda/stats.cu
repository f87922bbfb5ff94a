// logprob_stats: one read of the logits, one block a row, no atomics. How a row is split over the threads depends on its
// valid columns and dtype alone: a row gives the same bits wherever in memory it stands, however many there are.
#include "row.cuh"

namespace flowrl::cuda {
namespace {

constexpr int MAX_THREADS = 512;

// Columns of a vector, where it is aligned and where it is not.
template <typename T>
constexpr int WIDTH = VECTOR_BYTES / sizeof(T);

// A thread's LOADS vectors, `step` columns apart. With EDGE the chunk may end early: at and past `end` it reads -inf.
template <bool ALIGNED, bool EDGE, typename T, int VEC = WIDTH<T>>
__device__ void load_chunk(const T* row, int column, int step, int end, Raw<T, VEC> (&raw)[LOADS<VEC>]) {
#pragma unroll
  for (int k = 0; k < LOADS<VEC>; ++k) {
    if (!EDGE || column + k * step < end)
      raw[k] = ALIGNED ? load<VEC>(row + column + k * step) : load_unaligned<VEC>(row + column + k * step);
    else
      raw[k] = {MASKED<T>, MASKED<T>, MASKED<T>, MASKED<T>};
  }
}

// What a thread has of its row.
template <bool ENTROPY, typename T>
struct Sums {
  Partial partial{-INFINITY, 0.0f, 0.0f};
  float inv_temperature;
  unsigned floor = MASKED<T>;  // of add_pairs

  template <int VEC>
  __device__ void add_chunk(const Raw<T, VEC> (&raw)[LOADS<VEC>]) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      unsigned x[LOADS<VEC> * VEC / 2];
      memcpy(x, raw, sizeof(x));
      add_pairs<ENTROPY>(partial, floor, x, inv_temperature);
    } else {
      float x[LOADS<VEC> * VEC];
#pragma unroll
      for (int k = 0; k < LOADS<VEC>; ++k) unpack<VEC, T>(raw[k], x + k * VEC);
      add<ENTROPY>(partial, x, inv_temperature);
    }
  }

  __device__ void add_one(const T& logit) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const unsigned x[1] = {__float_as_uint(static_cast<float>(logit)) | (MASKED<T> & 0xffffu)};
      add_pairs<ENTROPY>(partial, floor, x, inv_temperature);
    } else {
      const float x[1] = {static_cast<float>(logit)};
      add<ENTROPY>(partial, x, inv_temperature);
    }
  }
};

template <bool ENTROPY, bool ALIGNED, typename T, int VEC = WIDTH<T>>
__device__ Partial thread_partial(const T* row, int valid, float inv_temperature) {
  const int step = blockDim.x * VEC;
  const int whole = valid - valid % VEC;  // where the last whole vector ends
  Sums<ENTROPY, T> sums;
  sums.inv_temperature = inv_temperature;
  Raw<T, VEC> raw[LOADS<VEC>];
  int column = threadIdx.x * VEC;
  for (; column + (LOADS<VEC> - 1) * step < whole; column += LOADS<VEC> * step) {
    load_chunk<ALIGNED, false>(row, column, step, whole, raw);
    sums.template add_chunk<VEC>(raw);
  }
  if (column < whole) {
    load_chunk<ALIGNED, true>(row, column, step, whole, raw);
    sums.template add_chunk<VEC>(raw);
  }
  if (static_cast<int>(threadIdx.x) < valid - whole) sums.add_one(row[whole + threadIdx.x]);
  return sums.partial;
}

__device__ Partial warp_merged(Partial p, float inv_temperature) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Partial other{__shfl_down_sync(0xffffffffu, p.max, offset), __shfl_down_sync(0xffffffffu, p.sum, offset),
                        __shfl_down_sync(0xffffffffu, p.dsum, offset)};
    p = merged(p, other, inv_temperature);
  }
  return p;  // of lane 0
}

// A fixed tree: lanes, then warps. The result is thread 0's.
__device__ Partial block_merged(Partial p, float inv_temperature) {
  __shared__ Partial of_warp[MAX_THREADS / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  p = warp_merged(p, inv_temperature);
  if (warps == 1) return p;
  if (lane == 0) of_warp[warp] = p;
  __syncthreads();
  if (warp == 0) p = warp_merged(lane < warps ? of_warp[lane] : Partial{-INFINITY, 0.0f, 0.0f}, inv_temperature);
  return p;
}

template <typename T, bool ALIGNED, bool ENTROPY>
__global__ void __launch_bounds__(MAX_THREADS, 2) stats_kernel(Logits logits, Rows r, float* out) {
  const int64_t t = blockIdx.x, label = r.target[t];
  Partial p{-INFINITY, 0.0f, 0.0f};
  float target_logit = 0.0f;
  if (label != r.ignore_index) {
    const T* row = static_cast<const T*>(logits.data) + t * logits.row_stride;
    const float inv_temperature = r.inv_temperature[t * r.inv_temperature_stride];
    const int target = owned_column(r, label);
    if (threadIdx.x == 0 && target >= 0) target_logit = static_cast<float>(row[target]);
    p = thread_partial<ENTROPY, ALIGNED>(row, static_cast<int>(r.vocab_valid), inv_temperature);
    p = finished(block_merged(p, inv_temperature));
  }
  if (threadIdx.x == 0) {
    out[t] = p.max;
    out[logits.rows + t] = p.sum;
    out[2 * logits.rows + t] = ENTROPY ? p.dsum : 0.0f;
    out[3 * logits.rows + t] = target_logit;
  }
}

template <typename T, bool ALIGNED, bool ENTROPY>
cudaError_t launch(const Logits& logits, const Rows& r, float* out, cudaStream_t stream) {
  constexpr int CHUNK = WIDTH<T> * LOADS<WIDTH<T>>;
  int threads = 32;  // about eight chunks each: small blocks, so that some load while others start or end
  while (threads < MAX_THREADS && threads * CHUNK * 8 < r.vocab_valid) threads *= 2;
  stats_kernel<T, ALIGNED, ENTROPY><<<static_cast<unsigned>(logits.rows), threads, 0, stream>>>(logits, r, out);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_stats(const Logits& logits, const Rows& r, bool entropy, float* out, cudaStream_t stream) {
  if (logits.rows == 0) return cudaSuccess;
  return with_type(logits.type, [&](auto zero) {
    using T = decltype(zero);
    if (aligned(logits.data, logits.row_stride, sizeof(T), VECTOR_BYTES))
      return entropy ? launch<T, true, true>(logits, r, out, stream) : launch<T, true, false>(logits, r, out, stream);
    return entropy ? launch<T, false, true>(logits, r, out, stream) : launch<T, false, false>(logits, r, out, stream);
  });
}

}  // namespace flowrl::cuda
