// Kernels of the operator `regions`; what they do stands in regions.h.
#pragma once

#include "device.cuh"
#include "regions.h"

#define HIDE_REGIONS(T, dtype)                                                                                         \
  HIDE_KERNEL regions_block_##dtype(const T* maps, const bool* valid, hide::Region* tables, int* boxes, float* scores, \
                                    int* sizes, int* counts, bool* overflow, hide::i64 number, hide::i64 height,       \
                                    hide::i64 width, hide::i64 stride, hide::i64 row_stride, hide::i64 column_stride,  \
                                    hide::i64 slots, double threshold) {                                               \
    hide::CudaBlock block;                                                                                             \
    hide::regions_block(block, maps, valid, tables, boxes, scores, sizes, counts, overflow, number, height, width,     \
                        stride, row_stride, column_stride, slots, threshold);                                          \
  }                                                                                                                    \
  HIDE_KERNEL regions_step_##dtype(const T* maps, const bool* valid, unsigned* masks, int* parents,                    \
                                   hide::Region* tables, int* counts, hide::i64 number, hide::i64 height,              \
                                   hide::i64 width, hide::i64 stride, hide::i64 row_stride, hide::i64 column_stride,   \
                                   hide::i64 step, double threshold) {                                                 \
    hide::CudaBlock block;                                                                                             \
    hide::regions_step(block, maps, valid, masks, parents, tables, counts, number, height, width, stride, row_stride,  \
                       column_stride, step, threshold);                                                                \
  }

HIDE_REGIONS(float, float32)
HIDE_REGIONS(double, float64)

HIDE_KERNEL regions_finish(hide::Region* tables, int* boxes, float* scores, int* sizes, int* counts, bool* overflow,
                           hide::i64 number, hide::i64 nodes, hide::i64 width, hide::i64 slots) {
  hide::CudaBlock block;
  hide::regions_finish(block, tables, boxes, scores, sizes, counts, overflow, number, nodes, width, slots);
}
