// What lets one source be a CUDA kernel and a C++ function.
//
// A kernel's body is a template over the block that runs it: its place `block` of `blocks`, `thread` of `threads`, its
// `shared` memory, the barrier `sync()` and the atomics that the body needs. On the device that is CudaBlock
// (device.cuh); on the host a block of one thread, SerialBlock, for which barriers and atomics cost nothing.
#pragma once

#ifdef __CUDACC__
#define HIDE_FN __device__ inline
#else
#include <math.h>
#include <string.h>
#define HIDE_FN inline
#endif

namespace hide {

using u8 = unsigned char;
using u64 = unsigned long long;
using i64 = long long;

#ifndef __CUDACC__
struct SerialBlock {
  int block, blocks;
  char* shared;
  static constexpr int thread = 0, threads = 1;
  // Whether one thread runs the whole block, and may take many elements at once.
  static constexpr bool kSerial = true;

  void sync() {}
  static int load(const int* at) { return *at; }
  static int min(int* at, int value) {
    const int before = *at;
    if (value < before) *at = value;
    return before;
  }
  static void max(int* at, int value) {
    if (value > *at) *at = value;
  }
  static int add(int* at, int value) {
    const int before = *at;
    *at = before + value;
    return before;
  }
  static void add(u64* at, u64 value) { *at += value; }
};
#endif

}  // namespace hide
