// segment_reduce: the shards' statistics -> log-probs a row -> sums a sequence. It reads 16 bytes a row and shard, so
// everything is computed in fp64 and rounded once. Fixed order throughout; a sequence's sums depend on its rows alone.
#include "row.cuh"

namespace flowrl::cuda {
namespace {

constexpr int THREADS = 256;

__global__ void __launch_bounds__(THREADS) rows_kernel(Segments s, Rows r) {
  const int64_t t = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (t >= s.rows) return;
  if (r.target[t] == r.ignore_index) {
    s.logp[t] = s.entropy[t] = s.maximum[t] = s.log_sum[t] = 0.0f;
    return;
  }
  const auto stat = [&](int64_t shard, int which) { return s.stats[(4 * shard + which) * s.rows + t]; };
  const double inv_temperature = r.inv_temperature[t * r.inv_temperature_stride];
  float maximum = -INFINITY;
  for (int64_t w = 0; w < s.shards; ++w) maximum = max_nan(maximum, stat(w, 0));
  double sum = 0.0, dsum = 0.0, target_logit = 0.0;
  for (int64_t w = 0; w < s.shards; ++w) {
    const double delta = (static_cast<double>(stat(w, 0)) - maximum) * inv_temperature;
    const double weight = stat(w, 0) == -INFINITY ? 0.0 : exp(delta);
    sum += weight * stat(w, 1);
    if (weight != 0.0) dsum += weight * (stat(w, 2) + delta * stat(w, 1));
    target_logit += stat(w, 3);
  }
  const double log_sum = log(sum);
  s.logp[t] = static_cast<float>((target_logit - maximum) * inv_temperature - log_sum);
  s.entropy[t] = static_cast<float>(log_sum - dsum / sum);
  s.maximum[t] = maximum;
  s.log_sum[t] = static_cast<float>(log_sum);
}

__device__ int64_t clamped(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// One block a sequence. Offsets are clamped: bad ones give wrong sums, never a read out of bounds.
__global__ void __launch_bounds__(THREADS) sequences_kernel(Segments s, Rows r) {
  __shared__ double sums[3][THREADS];
  const int64_t b = blockIdx.x;
  const int tid = threadIdx.x;
  const int64_t begin = clamped(s.cu_seqlens[b], 0, s.rows), end = clamped(s.cu_seqlens[b + 1], begin, s.rows);
  double logp = 0.0, count = 0.0, entropy = 0.0;
#pragma unroll 4
  for (int64_t t = begin + tid; t < end; t += THREADS) {  // ignored rows hold 0
    logp += s.logp[t];
    count += r.target[t] == r.ignore_index ? 0.0 : 1.0;
    entropy += s.entropy[t];
  }
  sums[0][tid] = logp;
  sums[1][tid] = count;
  sums[2][tid] = entropy;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (tid < half)
      for (int i = 0; i < 3; ++i) sums[i][tid] += sums[i][tid + half];
  }
  if (tid == 0)
    for (int i = 0; i < 3; ++i) s.sums[3 * b + i] = sums[i][0];
}

}  // namespace

cudaError_t launch_segment_reduce(const Segments& s, const Rows& r, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((s.rows + THREADS - 1) / THREADS);
  const unsigned sequences = static_cast<unsigned>(s.sequences);
  if (blocks > 0) rows_kernel<<<blocks, THREADS, 0, stream>>>(s, r);
  if (sequences > 0) sequences_kernel<<<sequences, THREADS, 0, stream>>>(s, r);
  return cudaGetLastError();
}

}  // namespace flowrl::cuda
