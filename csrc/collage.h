// Pixels of boxes to their places on a canvas, everything else to the fill colour, each canvas pixel written once.
//
// A block takes a canvas row: it lists the boxes that the row crosses, then walks the row. Boxes may overlap: a canvas
// pixel comes from one source pixel, whichever box brings it.
#pragma once

#include "block.h"

namespace hide {

// Part of a canvas row that one box fills, and the source pixel of its left end.
struct Span {
  int left, right, source_x, source_y;
};
static_assert(sizeof(Span) == 16, "hide_kernels/geometry.py");

struct Picture {
  const u8* pixels;
  i64 row_stride, column_stride, channel_stride;
  int channels;

  HIDE_FN const u8* at(int y, int x) const { return pixels + y * row_stride + x * column_stride; }
};

// How a source pixel looks on the canvas; r, g, b is the fill of an RGB canvas, an RGBA canvas is filled with zeros.
struct Paint {
  int channels;
  bool blend;
  u8 fill[3];
};

// x / 255 rounded as Pillow rounds it.
HIDE_FN u8 over(unsigned source, unsigned alpha, unsigned fill) {
  const unsigned mixed = source * alpha + fill * (255 - alpha) + 128;
  return u8((mixed + (mixed >> 8)) >> 8);
}

HIDE_FN void put_pixel(const Picture& picture, const Paint& paint, const u8* source, u8* target) {
  const bool blend = paint.blend && paint.channels == 3 && picture.channels == 4;
  const unsigned alpha = picture.channels == 4 ? source[3 * picture.channel_stride] : 255;
  for (int channel = 0; channel < 3; ++channel) {
    const u8 value = source[channel * picture.channel_stride];
    target[channel] = blend ? over(value, alpha, paint.fill[channel]) : value;
  }
  if (paint.channels == 4) target[3] = u8(alpha);
}

HIDE_FN void put_fill(const Paint& paint, u8* target) {
  for (int channel = 0; channel < 3; ++channel) target[channel] = paint.channels == 4 ? 0 : paint.fill[channel];
  if (paint.channels == 4) target[3] = 0;
}

// The box that covers column x, or null; `stop` is how far to the right that stays so, `width` at most.
HIDE_FN const Span* span_at(const Span* spans, int count, int x, int width, int& stop) {
  stop = width;
  for (int i = 0; i < count; ++i) {
    if (spans[i].left <= x && x < spans[i].right) {
      stop = spans[i].right;
      return spans + i;
    }
    if (spans[i].left > x && spans[i].left < stop) stop = spans[i].left;
  }
  return nullptr;
}

#ifndef __CUDACC__
// `length` canvas pixels from one box, or from none: whole where source and canvas hold them alike.
inline void put_span(const Picture& picture, const Paint& paint, const u8* source, u8* target, int length) {
  const int channels = paint.channels;
  if (source == nullptr) {
    if (channels == 4 || (paint.fill[0] == paint.fill[1] && paint.fill[1] == paint.fill[2])) {
      memset(target, channels == 4 ? 0 : paint.fill[0], size_t(length) * channels);
    } else {
      for (int i = 0; i < length; ++i) put_fill(paint, target + i * channels);
    }
  } else if (picture.channels == channels && picture.channel_stride == 1 && picture.column_stride == channels) {
    memcpy(target, source, size_t(length) * channels);
  } else {
    for (int i = 0; i < length; ++i) put_pixel(picture, paint, source + i * picture.column_stride, target + i * channels);
  }
}
#endif

// Kernel: `boxes` in the source and their `positions` on the canvas are x0, y0, x1, y1; the canvas is dense.
template <class Block>
HIDE_FN void collage_rows(Block& block, const u8* pixels, const int* boxes, const int* positions, u8* canvas, i64 count,
                          i64 row_stride, i64 column_stride, i64 channel_stride, i64 source_channels, i64 height,
                          i64 width, i64 channels, i64 red, i64 green, i64 blue, i64 blend) {
  const Picture picture = {pixels, row_stride, column_stride, channel_stride, int(source_channels)};
  const Paint paint = {int(channels), blend != 0, {u8(red), u8(green), u8(blue)}};
  int* crossed = reinterpret_cast<int*>(block.shared);
  Span* spans = reinterpret_cast<Span*>(block.shared + sizeof(Span));
  for (i64 y = block.block; y < height; y += block.blocks) {
    if (block.thread == 0) *crossed = 0;
    block.sync();
    for (int i = block.thread; i < count; i += block.threads) {
      const int *box = boxes + 4 * i, *position = positions + 4 * i;
      if (position[1] <= y && y < position[3])
        spans[block.add(crossed, 1)] = {position[0], position[2], box[0], box[1] + int(y) - position[1]};
    }
    block.sync();
    u8* row = canvas + y * width * channels;
    int stop;
    if constexpr (Block::kSerial) {
#ifndef __CUDACC__
      for (int x = 0; x < width; x = stop) {
        const Span* span = span_at(spans, *crossed, x, int(width), stop);
        const u8* source = span ? picture.at(span->source_y, span->source_x + x - span->left) : nullptr;
        put_span(picture, paint, source, row + x * channels, stop - x);
      }
#endif
    } else {
      for (int x = block.thread; x < width; x += block.threads) {
        const Span* span = span_at(spans, *crossed, x, int(width), stop);
        u8* target = row + x * channels;
        if (span) {
          put_pixel(picture, paint, picture.at(span->source_y, span->source_x + x - span->left), target);
        } else {
          put_fill(paint, target);
        }
      }
    }
    block.sync();
  }
}

}  // namespace hide
