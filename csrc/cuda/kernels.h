// What the CUDA kernels take, without torch. Each launch function queues its kernels on `stream`, launches nothing for
// empty inputs, and returns cudaGetLastError(). Fields as in flowrl_mega/ops/kernels.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flowrl::cuda {

enum class Type { f32, bf16, f16 };

constexpr int64_t MAX_COLUMNS = int64_t{1} << 29;  // column numbers are int, with room for a block's stride

// [rows, columns] with column stride 1; rows < 2^31.
struct Logits {
  const void* data;
  Type type;
  int64_t rows, columns, row_stride;
};

// What belongs to each row, and which labels the shard owns.
struct Rows {
  const int64_t* target;           // [T]
  const float* inv_temperature;    // [T] or [1]
  int64_t inv_temperature_stride;  // 1 or 0
  int64_t vocab_start, vocab_valid, ignore_index;
};

// out [4, T]
cudaError_t launch_stats(const Logits& logits, const Rows& rows, bool entropy, float* out, cudaStream_t stream);

struct Gradient {
  void* out;  // may be the logits
  Type type;  // that of the logits; any of them if the logits are f32
  int64_t row_stride;
  const float *grad, *maximum, *log_sum;  // [T] each
  const float *offset, *slope;            // [T] each, or both nullptr
};
cudaError_t launch_backward(const Logits& logits, const Rows& rows, const Gradient& gradient, cudaStream_t stream);

struct Segments {
  const float* stats;  // [shards, 4, rows]
  int64_t shards, rows;
  const int64_t* cu_seqlens;  // [sequences + 1]
  int64_t sequences;
  float *logp, *entropy, *maximum, *log_sum;  // [rows] each
  double* sums;                               // [sequences, 3]
};
cudaError_t launch_segment_reduce(const Segments& segments, const Rows& rows, cudaStream_t stream);

}  // namespace flowrl::cuda
