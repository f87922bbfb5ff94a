// What binding.cpp asks of the kernels: rows begin..end of a matrix of logits, on the instruction set it chose.
#pragma once

#include <cstdint>

namespace flowrl {

enum class Type { f32, bf16, f16, f64 };

struct Logits {
  const void* data;
  Type type;
  int64_t row_stride;  // in elements
  int64_t columns;     // V', this shard's
};

struct Rows {
  const int64_t* target;  // [T] ids in the whole vocabulary
  const void* inv_temperature;
  int64_t inv_temperature_stride;  // 1, or 0 where all rows share one
  int64_t vocab_start;
  int64_t vocab_valid;  // columns from here on are padding
  int64_t ignore_index;
};

// The last members are float, or double for logits of Type::f64.
struct Stats {
  Logits logits;
  Rows rows;
  bool entropy;
  void* out;  // [4, T]
  int64_t total_rows;
};

struct Backward {
  Logits logits;
  Rows rows;
  const void* grad;     // [T]
  const void* maximum;  // [T]
  const void* log_sum;  // [T]
  const void* offset;   // [T] or nullptr
  const void* slope;    // [T], or nullptr with offset
  void* out;            // may be the logits themselves
  Type out_type;
  int64_t out_stride;
};

struct Kernels {
  void (*stats)(const Stats&, int64_t begin, int64_t end);
  void (*backward)(const Backward&, int64_t begin, int64_t end);
};

const Kernels& plain_kernels();  // any CPU, and double
const Kernels* avx2_kernels();   // nullptr where the library was built for another kind of CPU
const Kernels* avx512_kernels();

}  // namespace flowrl
