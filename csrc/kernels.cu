// All kernels in one translation unit, found by name and launched. Compiled by nvcc; needs the CUDA runtime, no torch.
#include <cuda_runtime.h>

#include <cstring>
#include <mutex>
#include <set>
#include <utility>

#include "collage.cuh"
#include "pixel_values.cuh"
#include "regions.cuh"

namespace {

struct Kernel {
  const char* name;
  const void* function;
};

#define HIDE_ENTRY(name) {#name, reinterpret_cast<const void*>(name)}

const Kernel kKernels[] = {
    HIDE_ENTRY(regions_block_float32), HIDE_ENTRY(regions_block_float64), HIDE_ENTRY(regions_step_float32),
    HIDE_ENTRY(regions_step_float64),  HIDE_ENTRY(regions_finish),        HIDE_ENTRY(layout_boxes_int32),
    HIDE_ENTRY(layout_boxes_int64),    HIDE_ENTRY(collage_rows),          HIDE_ENTRY(resize),
    HIDE_ENTRY(resize_to_patches_16),  HIDE_ENTRY(resize_to_patches_32),
};

// Lets a kernel have all the shared memory that a block of the device can have; the device is the current one. Once for
// each, and never less: another thread may be about to launch the same kernel with more than this call needs.
cudaError_t allow_shared(const void* function, int device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({function, device})) return cudaSuccess;
  int most = 0;
  cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) allowed.insert({function, device});
  return error;
}

cudaError_t launch(const void* function, int device, int blocks, int threads, int shared, void** arguments,
                   void* stream) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = allow_shared(function, device);
  if (error == cudaSuccess)
    error = cudaLaunchKernel(function, dim3(blocks), dim3(threads), arguments, shared,
                             static_cast<cudaStream_t>(stream));
  cudaSetDevice(before);
  return error;
}

}  // namespace

// Returns null, or what went wrong.
extern "C" const char* hide_launch(const char* name, int device, int blocks, int threads, int shared, void** arguments,
                                   void* stream) {
  for (const Kernel& kernel : kKernels) {
    if (std::strcmp(kernel.name, name) != 0) continue;
    const cudaError_t error = launch(kernel.function, device, blocks, threads, shared, arguments, stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  return "no such kernel";
}
