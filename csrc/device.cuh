// The block of threads that a kernel's body runs on; see block.h.
#pragma once

#include "block.h"

namespace hide {

extern __shared__ __align__(16) char shared_memory[];

struct CudaBlock {
  int block = blockIdx.x, blocks = gridDim.x;
  int thread = threadIdx.x, threads = blockDim.x;
  char* shared = shared_memory;
  static constexpr bool kSerial = false;

  __device__ void sync() { __syncthreads(); }
  // A read that races with no atomic.
  __device__ static int load(const int* at) { return atomicOr(const_cast<int*>(at), 0); }
  __device__ static int min(int* at, int value) { return atomicMin(at, value); }
  __device__ static void max(int* at, int value) { atomicMax(at, value); }
  __device__ static int add(int* at, int value) { return atomicAdd(at, value); }
  __device__ static void add(u64* at, u64 value) { atomicAdd(at, value); }
};

}  // namespace hide

// No kernel is launched with more threads per block than this (hide_kernels/geometry.py). Two blocks per multiprocessor
// are enough, which leaves 64 registers per thread; left to itself, the compiler spills to have more.
#define HIDE_KERNEL extern "C" __global__ void __launch_bounds__(512, 2)
