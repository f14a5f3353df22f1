// Kernels of the operator `pixel_values`; what they do stands in pixel_values.h.
#pragma once

#include "device.cuh"
#include "pixel_values.h"

HIDE_KERNEL resize(const hide::u8* pixels, const int* table, hide::u8* resized, hide::i64 row_stride,
                   hide::i64 column_stride, hide::i64 channel_stride, hide::i64 channels, hide::i64 width,
                   hide::i64 rows, hide::i64 columns, hide::i64 axis) {
  hide::CudaBlock block;
  hide::resize(block, pixels, table, resized, row_stride, column_stride, channel_stride, channels, width, rows, columns,
               axis);
}

#define HIDE_PATCHES(T, bits)                                                                                          \
  HIDE_KERNEL resize_to_patches_##bits(const hide::u8* pixels, const int* table, const T* values, T* result,           \
                                       hide::i64 row_stride, hide::i64 column_stride, hide::i64 channel_stride,        \
                                       hide::i64 channels, hide::i64 width, hide::i64 rows, hide::i64 columns,         \
                                       hide::i64 axis, hide::i64 patch, hide::i64 merge, hide::i64 frames) {           \
    hide::CudaBlock block;                                                                                             \
    hide::resize_to_patches(block, pixels, table, values, result, row_stride, column_stride, channel_stride, channels, \
                            width, rows, columns, axis, patch, merge, frames);                                         \
  }

HIDE_PATCHES(unsigned short, 16)
HIDE_PATCHES(unsigned, 32)
