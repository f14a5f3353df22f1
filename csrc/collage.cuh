// Kernels of the operator `collage`; what they do stands in layout.h and collage.h.
#pragma once

#include "collage.h"
#include "device.cuh"
#include "layout.h"

#define HIDE_LAYOUT(Index, dtype)                                                                                     \
  HIDE_KERNEL layout_boxes_##dtype(const Index* boxes, const int* counts, hide::Plan* plan, hide::i64 maps,           \
                                   hide::i64 slots, hide::i64 rows, hide::i64 columns, hide::i64 height,              \
                                   hide::i64 width) {                                                                 \
    hide::CudaBlock block;                                                                                            \
    hide::layout_boxes(block, boxes, counts, plan, maps, slots, rows, columns, height, width);                        \
  }

HIDE_LAYOUT(int, int32)
HIDE_LAYOUT(hide::i64, int64)

HIDE_KERNEL collage_rows(const hide::u8* pixels, const int* boxes, const int* positions, hide::u8* canvas,
                         hide::i64 count, hide::i64 row_stride, hide::i64 column_stride, hide::i64 channel_stride,
                         hide::i64 source_channels, hide::i64 height, hide::i64 width, hide::i64 channels,
                         hide::i64 red, hide::i64 green, hide::i64 blue, hide::i64 blend) {
  hide::CudaBlock block;
  hide::collage_rows(block, pixels, boxes, positions, canvas, count, row_stride, column_stride, channel_stride,
                     source_channels, height, width, channels, red, green, blue, blend);
}
