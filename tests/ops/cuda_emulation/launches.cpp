// The launch functions that the binding calls: those of whichever libraries of kernels were last asked for.
#include <dlfcn.h>

#include "kernels.h"

namespace {

template <auto OURS>
inline decltype(OURS) loaded = nullptr;

template <auto OURS, class... Arguments>
cudaError_t forward(const Arguments&... arguments) {
  return loaded<OURS> ? loaded<OURS>(arguments...) : "CUDA emulation: no kernels are loaded";
}

// The function of the same name in `library`, where there is one.
template <auto OURS>
void take(void* library) {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(OURS), &info)) return;
  if (void* found = dlsym(library, info.dli_sname)) loaded<OURS> = reinterpret_cast<decltype(OURS)>(found);
}

}  // namespace

namespace flowrl::cuda {

cudaError_t launch_stats(const Logits& logits, const Rows& rows, bool entropy, float* out, cudaStream_t stream) {
  return forward<launch_stats>(logits, rows, entropy, out, stream);
}
cudaError_t launch_backward(const Logits& logits, const Rows& rows, const Gradient& gradient, cudaStream_t stream) {
  return forward<launch_backward>(logits, rows, gradient, stream);
}
cudaError_t launch_segment_reduce(const Segments& segments, const Rows& rows, cudaStream_t stream) {
  return forward<launch_segment_reduce>(segments, rows, stream);
}

}  // namespace flowrl::cuda

// Takes from the library at `path` the launch functions that it has; the others stay. Returns what is wrong, or null.
extern "C" const char* cuda_emulation_use(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return dlerror();
  take<flowrl::cuda::launch_stats>(library);
  take<flowrl::cuda::launch_backward>(library);
  take<flowrl::cuda::launch_segment_reduce>(library);
  return nullptr;
}
