// The ops of flowrl_mega/ops/kernels.py for CPU tensors, through torch's stable ABI.
#include "kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

namespace flowrl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// 0 plain, 1 AVX2, 2 AVX-512
int best_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
  if (avx512_kernels() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 2;
  if (avx2_kernels() && fma) return 1;  // every CPU with AVX2 has F16C
#endif
  return 0;
}

std::atomic<int> instruction_set{best_instruction_set()};

// Which kernels run, 0 to 2; `limit` >= 0 uses no better ones from now on, so that tests can try each.
int64_t cpu_instruction_set(int64_t limit) {
  const int best = best_instruction_set();
  if (limit >= 0) instruction_set = limit < best ? int(limit) : best;
  return instruction_set;
}

const Kernels& kernels(Type type) {
  if (type == Type::f64 || instruction_set == 0) return plain_kernels();
  return instruction_set == 2 ? *avx512_kernels() : *avx2_kernels();
}

Type type_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    case ScalarType::Double: return Type::f64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

// Statistics of float64 logits are float64, all others float32.
ScalarType stats_type(Type type) { return type == Type::f64 ? ScalarType::Double : ScalarType::Float; }

void check_vector(const Tensor& x, ScalarType type, int64_t size, const char* name) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == size, name, " must have shape [", size, "]");
  STD_TORCH_CHECK(x.scalar_type() == type, name, type == ScalarType::Long     ? " must be int64"
                                                 : type == ScalarType::Double ? " must be float64"
                                                                              : " must be float32");
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU, like the logits");
}

Logits check_logits(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "logits must have shape [T, V'], not ", x.dim(), " dimensions");
  const bool one_column = x.size(1) <= 1, one_row = x.size(0) <= 1;
  STD_TORCH_CHECK(one_column || x.stride(1) == 1, "logits must have neighbouring columns (stride 1, not ", x.stride(1),
                  "); call .contiguous()");
  STD_TORCH_CHECK(one_row || x.stride(0) >= x.size(1), "logits must not overlap: row stride ", x.stride(0),
                  " of ", x.size(1), " columns");
  return {x.const_data_ptr(), type_of(x.scalar_type(), "logits"), x.stride(0), x.size(1)};
}

Rows check_rows(const Tensor& target, const Tensor& inv_temperature, int64_t rows, ScalarType type,
                int64_t vocab_start, int64_t vocab_valid, int64_t ignore_index) {
  check_vector(target, ScalarType::Long, rows, "target");
  const bool shared = inv_temperature.dim() == 1 && inv_temperature.size(0) == 1;
  check_vector(inv_temperature, type, shared ? 1 : rows, "inv_temperature");
  return {target.const_data_ptr<int64_t>(), inv_temperature.const_data_ptr(), shared ? 0 : 1,
          vocab_start, vocab_valid, ignore_index};
}

void check_shard(const Logits& logits, int64_t vocab_valid) {
  STD_TORCH_CHECK(vocab_valid >= 0 && vocab_valid <= logits.columns, "vocab_valid = ", vocab_valid,
                  ": must lie in 0..", logits.columns, ", the columns of the logits");
}

// Rows for one thread: enough logits to be worth waking it up.
int64_t grain(int64_t columns) { return 1 + 32768 / (columns + 1); }

Tensor logprob_stats(const Tensor& logits, const Tensor& target, const Tensor& inv_temperature, int64_t vocab_start,
                     int64_t vocab_valid, int64_t ignore_index, bool entropy) {
  const Logits x = check_logits(logits);
  check_shard(x, vocab_valid);
  const int64_t rows = logits.size(0);
  const ScalarType type = stats_type(x.type);
  Tensor out = torch::stable::new_empty(logits, {4, rows}, type);
  const Stats a = {x, check_rows(target, inv_temperature, rows, type, vocab_start, vocab_valid, ignore_index),
                   entropy, out.mutable_data_ptr(), rows};
  torch::stable::parallel_for(0, rows, grain(vocab_valid), [&](int64_t begin, int64_t end) {
    kernels(x.type).stats(a, begin, end);
  });
  return out;
}

void run_backward(const Logits& x, const Tensor& target, const Tensor& grad, const Tensor& maximum,
                  const Tensor& log_sum, const Tensor& inv_temperature, int64_t vocab_start, int64_t vocab_valid,
                  int64_t ignore_index, const std::optional<Tensor>& offset, const std::optional<Tensor>& slope,
                  int64_t rows, void* out, Type out_type, int64_t out_stride) {
  check_shard(x, vocab_valid);
  const ScalarType type = stats_type(x.type);
  check_vector(grad, type, rows, "grad");
  check_vector(maximum, type, rows, "maximum");
  check_vector(log_sum, type, rows, "log_sum");
  STD_TORCH_CHECK(offset.has_value() == slope.has_value(), "offset and slope go together");
  if (offset.has_value()) {
    check_vector(*offset, type, rows, "offset");
    check_vector(*slope, type, rows, "slope");
  }
  const Rows r = check_rows(target, inv_temperature, rows, type, vocab_start, vocab_valid, ignore_index);
  const Backward a = {x, r, grad.const_data_ptr(), maximum.const_data_ptr(), log_sum.const_data_ptr(),
                      offset ? offset->const_data_ptr() : nullptr, slope ? slope->const_data_ptr() : nullptr,
                      out, out_type, out_stride};
  torch::stable::parallel_for(0, rows, grain(x.columns), [&](int64_t begin, int64_t end) {
    kernels(x.type).backward(a, begin, end);
  });
}

void logprob_backward_(Tensor logits, const Tensor& target, const Tensor& grad, const Tensor& maximum,
                       const Tensor& log_sum, const Tensor& inv_temperature, int64_t vocab_start,
                       int64_t vocab_valid, int64_t ignore_index, std::optional<Tensor> offset,
                       std::optional<Tensor> slope) {
  const Logits x = check_logits(logits);
  run_backward(x, target, grad, maximum, log_sum, inv_temperature, vocab_start, vocab_valid, ignore_index, offset,
               slope, logits.size(0), logits.mutable_data_ptr(), x.type, x.row_stride);
}

Tensor logprob_backward(const Tensor& logits, const Tensor& target, const Tensor& grad, const Tensor& maximum,
                        const Tensor& log_sum, const Tensor& inv_temperature, int64_t vocab_start,
                        int64_t vocab_valid, int64_t ignore_index, ScalarType dtype, std::optional<Tensor> offset,
                        std::optional<Tensor> slope) {
  const Logits x = check_logits(logits);
  const Type type = type_of(dtype, "dtype");
  STD_TORCH_CHECK(type == x.type || (x.type == Type::f32 && type != Type::f64),
                  "dtype must be that of the logits; only float32 logits can give a bfloat16 or float16 gradient");
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)}, dtype);
  run_backward(x, target, grad, maximum, log_sum, inv_temperature, vocab_start, vocab_valid, ignore_index, offset,
               slope, logits.size(0), out.mutable_data_ptr(), type, x.columns);
  return out;
}

// One row of all shards, in rank order. A NaN, of a statistic or of -inf - -inf where all logits are -inf, stays one.
template <class S>
struct Combined {
  double maximum = -std::numeric_limits<double>::infinity(), total = 0, weighted = 0, picked = 0;

  Combined(const S* stats, int64_t shards, int64_t rows, double inv_temperature) {
    for (int64_t w = 0; w < shards; ++w) {
      const double m = stats[4 * w * rows];
      if (m > maximum) maximum = m;
    }
    for (int64_t w = 0; w < shards; ++w) {
      const S* shard = stats + 4 * w * rows;
      const double shift = (shard[0] - maximum) * inv_temperature, factor = std::exp(shift);  // all padding: exactly 0
      picked += shard[3 * rows];
      total += factor * shard[rows];
      if (factor > 0) weighted += factor * (shard[2 * rows] + shift * shard[rows]);
    }
  }
};

template <class S>
void finish_rows(const S* stats, int64_t shards, int64_t rows, const Rows& r, S* logp, S* entropy, S* maximum,
                 S* log_sum, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    logp[t] = entropy[t] = maximum[t] = log_sum[t] = 0;
    if (r.target[t] == r.ignore_index) continue;
    const double inv_temperature = static_cast<const S*>(r.inv_temperature)[t * r.inv_temperature_stride];
    const Combined<S> row(stats + t, shards, rows, inv_temperature);
    const double log_total = std::log(row.total);
    logp[t] = S((row.picked - row.maximum) * inv_temperature - log_total);
    entropy[t] = S(log_total - row.weighted / row.total);
    maximum[t] = S(row.maximum);
    log_sum[t] = S(log_total);
  }
}

template <class S>
void sum_segments(const S* logp, const S* entropy, const Rows& r, const int64_t* cu_seqlens, int64_t rows, double* out,
                  int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    double sum_logp = 0, count = 0, sum_entropy = 0;
    const int64_t first = cu_seqlens[b] < 0 ? 0 : cu_seqlens[b], last = cu_seqlens[b + 1] > rows ? rows : cu_seqlens[b + 1];
    for (int64_t t = first; t < last; ++t) {
      sum_logp += logp[t];
      sum_entropy += entropy[t];
      count += r.target[t] != r.ignore_index;
    }
    out[3 * b] = sum_logp;
    out[3 * b + 1] = count;
    out[3 * b + 2] = sum_entropy;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> segment_reduce(const Tensor& stats, const Tensor& target,
                                                                  const Tensor& inv_temperature,
                                                                  const Tensor& cu_seqlens, int64_t ignore_index) {
  STD_TORCH_CHECK(stats.dim() == 3 && stats.size(1) == 4, "stats must have shape [W, 4, T]");
  STD_TORCH_CHECK(stats.is_contiguous(), "stats must be contiguous");
  const ScalarType type = stats.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "stats must be float32 or float64");
  const int64_t shards = stats.size(0), rows = stats.size(2);
  const Rows r = check_rows(target, inv_temperature, rows, type, 0, 0, ignore_index);
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "cu_seqlens must have shape [B + 1]");
  const int64_t sequences = cu_seqlens.size(0) - 1;
  check_vector(cu_seqlens, ScalarType::Long, sequences + 1, "cu_seqlens");

  auto row = [&] { return torch::stable::new_empty(stats, {rows}); };
  Tensor logp = row(), entropy = row(), maximum = row(), log_sum = row();
  Tensor sums = torch::stable::new_empty(stats, {sequences, 3}, ScalarType::Double);
  auto run = [&](auto zero) {
    using S = decltype(zero);
    S *logp_ = logp.mutable_data_ptr<S>(), *entropy_ = entropy.mutable_data_ptr<S>();
    torch::stable::parallel_for(0, rows, 1024, [&](int64_t begin, int64_t end) {
      finish_rows<S>(stats.const_data_ptr<S>(), shards, rows, r, logp_, entropy_, maximum.mutable_data_ptr<S>(),
                     log_sum.mutable_data_ptr<S>(), begin, end);
    });
    torch::stable::parallel_for(0, sequences, 64, [&](int64_t begin, int64_t end) {
      sum_segments<S>(logp_, entropy_, r, cu_seqlens.const_data_ptr<int64_t>(), rows,
                      sums.mutable_data_ptr<double>(), begin, end);
    });
  };
  if (type == ScalarType::Double) run(double());
  else run(float());
  return {logp, entropy, maximum, log_sum, sums};
}

}  // namespace
}  // namespace flowrl

STABLE_TORCH_LIBRARY_IMPL(flowrl, CPU, m) {
  m.impl("logprob_stats", TORCH_BOX(&flowrl::logprob_stats));
  m.impl("segment_reduce", TORCH_BOX(&flowrl::segment_reduce));
  m.impl("logprob_backward_", TORCH_BOX(&flowrl::logprob_backward_));
  m.impl("logprob_backward", TORCH_BOX(&flowrl::logprob_backward));
}

STABLE_TORCH_LIBRARY_IMPL(flowrl, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&flowrl::cpu_instruction_set));
}
