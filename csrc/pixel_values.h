// Pillow's bicubic resize of 8-bit RGB, bit for bit, and its pixels as the rows that a vision encoder eats.
//
// A resize is a pass over columns and one over rows, in the order that the host plans: weighted sums of 8-bit values in
// fixed point, rounded and clamped to 8 bits. The last pass may look each value up in a table, which holds it
// normalised, and put it where its patch has it.
#pragma once

#include "collage.h"

namespace hide {

// Of a weight, below its integer part; sums of a pixel's weights and 8-bit values stay within 32 bits.
constexpr int kWeightBits = 22;
constexpr int kHalf = 1 << (kWeightBits - 1);
// Rows that one thread resizes at once, their values side by side: vectors for the compiler.
constexpr int kStrip = 16;
static_assert(kStrip == 16, "hide_kernels/geometry.py");

enum Axis { kRows, kColumns };

// Weights of a pass (hide_kernels/patches/taps.py), as rows of `targets` integers: the first source of each target, how
// many there are, and then their weights.
struct Taps {
  const int* table;
  i64 targets;

  HIDE_FN int first(i64 target) const { return table[target]; }
  HIDE_FN int count(i64 target) const { return table[targets + target]; }
  HIDE_FN int weight(i64 target, int tap) const { return table[(2 + tap) * targets + target]; }
};

// One pass: the picture before it, whose transparency shows white, and the size after it.
struct Pass {
  Picture picture;
  Taps taps;
  Axis axis;
  i64 width;  // of the picture
  i64 rows, columns;

  HIDE_FN void read(const u8* source, u8* target) const {
    put_pixel(picture, {3, true, {255, 255, 255}}, source, target);
  }
};

HIDE_FN Pass pass_of(const u8* pixels, const int* table, i64 row_stride, i64 column_stride, i64 channel_stride,
                     i64 channels, i64 width, i64 rows, i64 columns, i64 axis) {
  return {{pixels, row_stride, column_stride, channel_stride, int(channels)},
          {table, axis == kColumns ? columns : rows},
          Axis(axis),
          width,
          rows,
          columns};
}

HIDE_FN u8 rounded(int sum) {
  const int value = sum >> kWeightBits;
  return u8(value < 0 ? 0 : value > 255 ? 255 : value);
}

HIDE_FN void resize_pixel(const Pass& pass, i64 y, i64 x, u8* target) {
  const bool along_row = pass.axis == kColumns;
  const i64 of = along_row ? x : y, step = along_row ? pass.picture.column_stride : pass.picture.row_stride;
  const int first = pass.taps.first(of), count = pass.taps.count(of);
  const u8* source = along_row ? pass.picture.at(int(y), first) : pass.picture.at(first, int(x));
  int sums[3] = {kHalf, kHalf, kHalf};
  for (int tap = 0; tap < count; ++tap, source += step) {
    u8 values[3];
    pass.read(source, values);
    const int weight = pass.taps.weight(of, tap);
    for (int channel = 0; channel < 3; ++channel) sums[channel] += values[channel] * weight;
  }
  for (int channel = 0; channel < 3; ++channel) target[channel] = rounded(sums[channel]);
}

#ifndef __CUDACC__
// One target of `length` values that lie side by side, `step` from one source to the next. Compiled for wider vectors as
// well; the machine that it runs on picks, which sanitizers are not ready for.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
__attribute__((target_clones("avx2", "default")))
#endif
static void resize_values(const u8* sources, i64 step, const Taps& taps, i64 target, i64 length, u8* result) {
  constexpr int kSums = 256;
  const u8* first = sources + taps.first(target) * step;
  const int count = taps.count(target);
  for (i64 start = 0; start < length; start += kSums) {
    const int some = int(length - start < kSums ? length - start : kSums);
    int sums[kSums];
    for (int i = 0; i < some; ++i) sums[i] = kHalf;
    for (int tap = 0; tap < count; ++tap) {
      const u8* values = first + tap * step + start;
      const int weight = taps.weight(target, tap);
      for (int i = 0; i < some; ++i) sums[i] += values[i] * weight;
    }
    for (int i = 0; i < some; ++i) result[start + i] = rounded(sums[i]);
  }
}

// Rows from `top` on into a dense result. A pass over rows wants a dense RGB picture; one over columns 3 * kStrip bytes of
// `memory` for each of the picture's.
inline void resize_strip(const Pass& pass, i64 top, i64 rows, u8* memory, u8* result) {
  constexpr int kValues = 3 * kStrip;
  const i64 length = 3 * pass.columns;
  if (pass.axis == kRows) {
    for (i64 row = 0; row < rows; ++row)
      resize_values(pass.picture.pixels, length, pass.taps, top + row, length, result + row * length);
    return;
  }
  for (; rows > 0; top += kStrip, rows -= kStrip, result += kStrip * length) {
    const int some = int(rows < kStrip ? rows : kStrip);
    for (int row = 0; row < some; ++row)
      for (i64 x = 0; x < pass.width; ++x)
        pass.read(pass.picture.at(int(top) + row, int(x)), memory + x * kValues + 3 * row);
    for (i64 x = 0; x < pass.columns; ++x) {
      u8 values[kValues];
      resize_values(memory, kValues, pass.taps, x, kValues, values);
      for (int row = 0; row < some; ++row) memcpy(result + row * length + 3 * x, values + 3 * row, 3);
    }
  }
}
#endif

// Kernel: one pass into dense RGB of rows x columns.
template <class Block>
HIDE_FN void resize(Block& block, const u8* pixels, const int* table, u8* resized, i64 row_stride, i64 column_stride,
                    i64 channel_stride, i64 channels, i64 width, i64 rows, i64 columns, i64 axis) {
  const Pass pass =
      pass_of(pixels, table, row_stride, column_stride, channel_stride, channels, width, rows, columns, axis);
  if constexpr (Block::kSerial) {
#ifndef __CUDACC__
    resize_strip(pass, 0, rows, reinterpret_cast<u8*>(block.shared), resized);
#endif
  } else {
    for (i64 y = block.block; y < rows; y += block.blocks)
      for (i64 x = block.thread; x < columns; x += block.threads)
        resize_pixel(pass, y, x, resized + (y * columns + x) * 3);
  }
}

// Where the patches of a picture hold its values: the patches of a block of merge x merge one after another; in a patch
// channel, frame, row and column. Every frame is the same.
struct Patches {
  int patch, merge, frames;
  int columns;  // of patches

  HIDE_FN i64 area() const { return i64(patch) * patch; }
  HIDE_FN i64 channel() const { return frames * area(); }
  HIDE_FN i64 start(int row, int column) const {
    const i64 block = i64(row / merge) * (columns / merge) + column / merge;
    return ((block * merge + row % merge) * merge + column % merge) * 3 * channel();
  }
};

// Kernel: one pass, of which each value goes through `values`, 256 of each channel, into the patches. T is as wide as a
// normalised value and stands for its bits.
template <class Block, class T>
HIDE_FN void resize_to_patches(Block& block, const u8* pixels, const int* table, const T* values, T* result,
                               i64 row_stride, i64 column_stride, i64 channel_stride, i64 channels, i64 width, i64 rows,
                               i64 columns, i64 axis, i64 patch, i64 merge, i64 frames) {
  const Pass pass =
      pass_of(pixels, table, row_stride, column_stride, channel_stride, channels, width, rows, columns, axis);
  const Patches patches = {int(patch), int(merge), int(frames), int(columns / patch)};
  if constexpr (Block::kSerial) {
#ifndef __CUDACC__
    // A row of patches at a time, so that each patch is written in one go.
    u8* memory = reinterpret_cast<u8*>(block.shared);
    u8* strip = memory + (pass.axis == kColumns ? 3 * kStrip * width : 0);
    for (int row = 0; row < rows / patch; ++row) {
      resize_strip(pass, row * patch, patch, memory, strip);
      for (int column = 0; column < patches.columns; ++column) {
        T* target = result + patches.start(row, column);
        for (int channel = 0; channel < 3; ++channel, target += patches.channel()) {
          const T* of_channel = values + 256 * channel;
          for (i64 y = 0; y < patch; ++y) {
            const u8* source = strip + 3 * (y * columns + column * patch) + channel;
            for (i64 x = 0; x < patch; ++x) target[y * patch + x] = of_channel[source[3 * x]];
          }
          for (i64 frame = 1; frame < frames; ++frame)
            memcpy(target + frame * patches.area(), target, sizeof(T) * patches.area());
        }
      }
    }
#endif
  } else {
    const int side = patches.patch;
    for (int y = block.block; y < rows; y += block.blocks)
      for (int x = block.thread; x < columns; x += block.threads) {
        u8 pixel[3];
        resize_pixel(pass, y, x, pixel);
        T* target = result + patches.start(y / side, x / side) + y % side * side + x % side;
        for (int channel = 0; channel < 3; ++channel, target += patches.channel())
          for (i64 frame = 0; frame < frames; ++frame)
            target[frame * patches.area()] = values[256 * channel + pixel[channel]];
      }
  }
}

}  // namespace hide
