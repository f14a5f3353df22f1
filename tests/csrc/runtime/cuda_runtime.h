// As much of the CUDA runtime as csrc/kernels.cu calls, for the host: launches that are noted and checked.
#pragma once
#include <atomic>
#include <cstddef>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 blockIdx, gridDim, threadIdx, blockDim;
inline void __syncthreads() {}
template <class T>
T atomicOr(T* at, T) { return *at; }
template <class T>
T atomicMin(T* at, T) { return *at; }
template <class T>
T atomicMax(T* at, T) { return *at; }
template <class T>
T atomicAdd(T* at, T) { return *at; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value);
cudaError_t cudaLaunchKernel(const void* function, dim3 blocks, dim3 threads, void** arguments, size_t shared,
                             cudaStream_t stream);
const char* cudaGetErrorString(cudaError_t error);
