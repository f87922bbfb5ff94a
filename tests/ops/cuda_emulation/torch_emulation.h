// What csrc/cuda/binding.cpp asks of torch's CUDA part, and outputs that show what was not written, or written too far.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

#include "cuda_emulation.h"

namespace torch::stable {

// In memory of its own: NaN everywhere, and behind its end (to 16 bytes, where its start must lie) a page that nobody
// may touch.
inline Tensor emulated_new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                 std::optional<torch::headeronly::ScalarType> type = std::nullopt) {
  constexpr size_t PAGE = 4096, START = 16;
  const auto dtype = type.value_or(like.scalar_type());
  using torch::headeronly::ScalarType;
  size_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;  // what the binding makes
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 0;) {
    if (i + 1 < sizes.size()) strides[i] = strides[i + 1] * std::max<int64_t>(1, sizes[i + 1]);
    bytes *= sizes[i];
  }
  const size_t all = (bytes + PAGE - 1) / PAGE * PAGE + PAGE;
  void* memory = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  STD_TORCH_CHECK(memory != MAP_FAILED, "CUDA emulation: no memory");
  char* const end = static_cast<char*>(memory) + all - PAGE;
  char* const data = end - (bytes + START - 1) / START * START;
  std::memset(data, 0xff, end - data);
  mprotect(end, PAGE, PROT_NONE);
  return from_blob(data, sizes, strides, like.device(), dtype, [memory, all](void*) { munmap(memory, all); });
}

namespace accelerator {
struct EmulatedGuard {
  explicit EmulatedGuard(int) {}
};
}  // namespace accelerator
}  // namespace torch::stable

#define DeviceGuard EmulatedGuard
#define new_empty emulated_new_empty
#define aoti_torch_get_current_cuda_stream(device, stream) (*(stream) = nullptr, 0)

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(EXPR)                                   \
  do {                                                         \
    const cudaError_t error_ = (EXPR);                         \
    STD_TORCH_CHECK(!error_, error_ ? error_ : "no CUDA error"); \
  } while (0)
