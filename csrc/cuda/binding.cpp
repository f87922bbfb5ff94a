// The ops of flowrl_mega/ops/kernels.py for CUDA tensors, through torch's stable ABI. The values of targets and offsets
// are not looked at, which would wait for the device: the kernels only promise not to leave their buffers on bad ones.
#include "kernels.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace flowrl::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

Type type_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 on CUDA, not ", toString(type));
  }
}

void check_vector(const Tensor& x, ScalarType type, int64_t size, const char* name, const Tensor& first) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == size, name, " must have shape [", size, "]");
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must be ", toString(type), ", not ", toString(x.scalar_type()));
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(x.device() == first.device(), name, " must be on one CUDA device with the logits or statistics");
}

Logits check_logits(const Tensor& x, int64_t vocab_valid) {
  STD_TORCH_CHECK(x.dim() == 2, "logits must have shape [T, V'], not ", x.dim(), " dimensions");
  const int64_t rows = x.size(0), columns = x.size(1);
  STD_TORCH_CHECK(rows <= INT32_MAX && columns <= MAX_COLUMNS, "logits may have at most 2^31 - 1 rows and ",
                  MAX_COLUMNS, " columns, not [", rows, ", ", columns, "]");
  STD_TORCH_CHECK(columns <= 1 || x.stride(1) == 1, "logits must have neighbouring columns (stride 1, not ",
                  x.stride(1), "); call .contiguous()");
  STD_TORCH_CHECK(rows <= 1 || x.stride(0) >= columns, "logits must not overlap: row stride ", x.stride(0), " of ",
                  columns, " columns");
  STD_TORCH_CHECK(vocab_valid >= 0 && vocab_valid <= columns, "vocab_valid = ", vocab_valid, ": must lie in 0..",
                  columns, ", the columns of the logits");
  return {x.const_data_ptr(), type_of(x.scalar_type(), "logits"), rows, columns, x.stride(0)};
}

// `first` is the tensor that the others must share a device with.
Rows check_rows(const Tensor& first, const Tensor& target, const Tensor& inv_temperature, int64_t rows,
                int64_t vocab_start, int64_t vocab_valid, int64_t ignore_index) {
  check_vector(target, ScalarType::Long, rows, "target", first);
  const bool shared = inv_temperature.dim() == 1 && inv_temperature.size(0) == 1;
  check_vector(inv_temperature, ScalarType::Float, shared ? 1 : rows, "inv_temperature", first);
  return {target.const_data_ptr<int64_t>(), inv_temperature.const_data_ptr<float>(), shared ? 0 : 1,
          vocab_start, vocab_valid, ignore_index};
}

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor logprob_stats(const Tensor& logits, const Tensor& target, const Tensor& inv_temperature, int64_t vocab_start,
                     int64_t vocab_valid, int64_t ignore_index, bool entropy) {
  const Logits x = check_logits(logits, vocab_valid);
  const Rows r = check_rows(logits, target, inv_temperature, x.rows, vocab_start, vocab_valid, ignore_index);
  const DeviceGuard guard(logits.get_device_index());
  Tensor out = torch::stable::new_empty(logits, {4, x.rows}, ScalarType::Float);
  STD_CUDA_CHECK(launch_stats(x, r, entropy, out.mutable_data_ptr<float>(), current_stream(logits)));
  return out;
}

void run_backward(const Tensor& logits, const Tensor& target, const Tensor& grad, const Tensor& maximum,
                  const Tensor& log_sum, const Tensor& inv_temperature, int64_t vocab_start, int64_t vocab_valid,
                  int64_t ignore_index, const std::optional<Tensor>& offset, const std::optional<Tensor>& slope,
                  const Tensor& out) {
  const Logits x = check_logits(logits, vocab_valid);
  const Rows r = check_rows(logits, target, inv_temperature, x.rows, vocab_start, vocab_valid, ignore_index);
  check_vector(grad, ScalarType::Float, x.rows, "grad", logits);
  check_vector(maximum, ScalarType::Float, x.rows, "maximum", logits);
  check_vector(log_sum, ScalarType::Float, x.rows, "log_sum", logits);
  STD_TORCH_CHECK(offset.has_value() == slope.has_value(), "offset and slope go together");
  if (offset.has_value()) {
    check_vector(*offset, ScalarType::Float, x.rows, "offset", logits);
    check_vector(*slope, ScalarType::Float, x.rows, "slope", logits);
  }
  const Gradient g = {out.mutable_data_ptr(), type_of(out.scalar_type(), "dtype"), out.stride(0),
                      grad.const_data_ptr<float>(), maximum.const_data_ptr<float>(), log_sum.const_data_ptr<float>(),
                      offset ? offset->const_data_ptr<float>() : nullptr,
                      slope ? slope->const_data_ptr<float>() : nullptr};
  const DeviceGuard guard(logits.get_device_index());
  STD_CUDA_CHECK(launch_backward(x, r, g, current_stream(logits)));
}

void logprob_backward_(const Tensor& logits, const Tensor& target, const Tensor& grad, const Tensor& maximum,
                       const Tensor& log_sum, const Tensor& inv_temperature, int64_t vocab_start,
                       int64_t vocab_valid, int64_t ignore_index, std::optional<Tensor> offset,
                       std::optional<Tensor> slope) {
  run_backward(logits, target, grad, maximum, log_sum, inv_temperature, vocab_start, vocab_valid, ignore_index, offset,
               slope, logits);
}

Tensor logprob_backward(const Tensor& logits, const Tensor& target, const Tensor& grad, const Tensor& maximum,
                        const Tensor& log_sum, const Tensor& inv_temperature, int64_t vocab_start,
                        int64_t vocab_valid, int64_t ignore_index, ScalarType dtype, std::optional<Tensor> offset,
                        std::optional<Tensor> slope) {
  const Logits x = check_logits(logits, vocab_valid);
  STD_TORCH_CHECK(type_of(dtype, "dtype") == x.type || x.type == Type::f32,
                  "dtype must be that of the logits; only float32 logits can give a bfloat16 or float16 gradient");
  const DeviceGuard guard(logits.get_device_index());
  Tensor out = torch::stable::new_empty(logits, {x.rows, x.columns}, dtype);
  run_backward(logits, target, grad, maximum, log_sum, inv_temperature, vocab_start, vocab_valid, ignore_index, offset,
               slope, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> segment_reduce(const Tensor& stats, const Tensor& target,
                                                                  const Tensor& inv_temperature,
                                                                  const Tensor& cu_seqlens, int64_t ignore_index) {
  STD_TORCH_CHECK(stats.dim() == 3 && stats.size(1) == 4, "stats must have shape [W, 4, T]");
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Float, "stats must be float32 on CUDA");
  STD_TORCH_CHECK(stats.is_contiguous(), "stats must be contiguous");
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "cu_seqlens must have shape [B + 1]");
  const int64_t shards = stats.size(0), rows = stats.size(2), sequences = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(rows <= INT32_MAX && sequences <= INT32_MAX, "at most 2^31 - 1 rows and sequences, not ", rows,
                  " and ", sequences);
  const Rows r = check_rows(stats, target, inv_temperature, rows, 0, 0, ignore_index);
  check_vector(cu_seqlens, ScalarType::Long, sequences + 1, "cu_seqlens", stats);
  const DeviceGuard guard(stats.get_device_index());
  auto row = [&] { return torch::stable::new_empty(stats, {rows}); };
  Tensor logp = row(), entropy = row(), maximum = row(), log_sum = row();
  Tensor sums = torch::stable::new_empty(stats, {sequences, 3}, ScalarType::Double);
  const Segments s = {stats.const_data_ptr<float>(), shards, rows, cu_seqlens.const_data_ptr<int64_t>(), sequences,
                      logp.mutable_data_ptr<float>(), entropy.mutable_data_ptr<float>(),
                      maximum.mutable_data_ptr<float>(), log_sum.mutable_data_ptr<float>(),
                      sums.mutable_data_ptr<double>()};
  STD_CUDA_CHECK(launch_segment_reduce(s, r, current_stream(stats)));
  return {logp, entropy, maximum, log_sum, sums};
}

}  // namespace
}  // namespace flowrl::cuda

STABLE_TORCH_LIBRARY_IMPL(flowrl, CUDA, m) {
  m.impl("logprob_stats", TORCH_BOX(&flowrl::cuda::logprob_stats));
  m.impl("segment_reduce", TORCH_BOX(&flowrl::cuda::segment_reduce));
  m.impl("logprob_backward_", TORCH_BOX(&flowrl::cuda::logprob_backward_));
  m.impl("logprob_backward", TORCH_BOX(&flowrl::cuda::logprob_backward));
}
