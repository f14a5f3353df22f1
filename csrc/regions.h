// Maps to regions: the 8-connected components of `map >= threshold`, their boxes, sizes and scores, in order.
//
// Under 8-connectivity all foreground cells of a 2x2 block belong together, so blocks are the nodes of the union-find:
// a quarter of the cells. A strip is eight blocks in a row, 2 x 16 cells, whose foreground is one 32-bit mask; a thread
// takes a strip at a time. The steps in order, a barrier (or a launch) between each:
//
//   start     read the cells, note the foreground; every block is its own set
//   merge     unite neighbouring blocks
//   compress  let every block name its root
//   number    give every root a row in the table
//   measure   cells, edges, first cell and exponent of every region
//   add       its score, in fixed point
//   finish    sort and write
//
// Scores do not depend on the order of summation. With 2^e above every magnitude in the region and 2^b not below its
// number of cells, cells are rounded to multiples of 2^(e + b - 62) (half to even) and added as integers, which cannot
// overflow; the sum is rounded to float64 and then to float32. A region with an infinite cell scores infinity.
#pragma once

#include "union_find.h"

namespace hide {

constexpr int kStripBlocks = 8;
constexpr int kFractionBits = 62;
constexpr int kZeroExponent = -(1 << 20);
constexpr int kInfiniteExponent = 1 << 20;
constexpr int kNone = 0x7fffffff;

struct Region {
  u64 sum;   // fixed point, two's complement; once finished, the key to sort by
  int first;  // first cell in raster order; its row is the top edge
  int left, right, bottom;
  int cells;
  int exponent;
};
static_assert(sizeof(Region) == 32, "hide_kernels/geometry.py");

// One map; one that is not used has no rows.
template <class T>
struct Map {
  const T* cells;
  i64 row_stride, column_stride;
  int height, width;
  T threshold;

  HIDE_FN T at(int y, int x) const { return cells[y * row_stride + x * column_stride]; }
};

template <class T>
HIDE_FN Map<T> map_at(const T* maps, const bool* valid, i64 index, i64 stride, i64 row_stride, i64 column_stride,
                      i64 height, i64 width, double threshold) {
  const bool used = valid == nullptr || valid[index];
  return {maps + index * stride, row_stride, column_stride, used ? int(height) : 0, int(width), T(threshold)};
}

// The blocks of one map as nodes of a graph, and the table of its regions.
struct Graph {
  int rows, columns, strips_per_row;
  unsigned* masks;  // per strip, four bits per block: top left, top right, bottom left, bottom right
  int* parents;     // per block; once numbered, a root holds ~(row in the table)
  Region* table;
  int* count;

  HIDE_FN int strips() const { return rows * strips_per_row; }
  HIDE_FN int node(int row, int column) const { return row * columns + column; }
  HIDE_FN unsigned mask(int row, int column) const {
    return masks[row * strips_per_row + column / kStripBlocks] >> 4 * (column % kStripBlocks) & 15;
  }
  HIDE_FN Region& region(int node) const {
    const int parent = parents[node];
    return table[parent < 0 ? ~parent : ~parents[parent]];
  }
};

HIDE_FN Graph graph_of(i64 height, i64 width, unsigned* masks, int* parents, Region* table, int* count) {
  const int rows = int((height + 1) / 2), columns = int((width + 1) / 2);
  return {rows, columns, (columns + kStripBlocks - 1) / kStripBlocks, masks, parents, table, count};
}

// Calls f(row, column, mask) for the blocks of a strip that hold foreground.
template <class F>
HIDE_FN void each_block(const Graph& graph, int strip, F f) {
  const int row = strip / graph.strips_per_row, first = strip % graph.strips_per_row * kStripBlocks;
  unsigned mask = graph.masks[strip];
  for (int column = first; mask != 0; ++column, mask >>= 4)
    if (mask & 15) f(row, column, mask & 15);
}

template <class T>
HIDE_FN void start_strip(const Map<T>& map, const Graph& graph, int strip) {
  const int row = strip / graph.strips_per_row, first = strip % graph.strips_per_row * kStripBlocks;
  const int columns = graph.columns - first < kStripBlocks ? graph.columns - first : kStripBlocks;
  unsigned mask = 0;
  for (int below = 0; below < 2 && 2 * row + below < map.height; ++below)
    for (int i = 0; i < 2 * columns && 2 * first + i < map.width; ++i)
      if (map.at(2 * row + below, 2 * first + i) >= map.threshold) mask |= 1u << (4 * (i / 2) + 2 * below + i % 2);
  graph.masks[strip] = mask;
  for (int i = 0; i < columns; ++i) graph.parents[graph.node(row, first + i)] = graph.node(row, first + i);
  if (strip == 0) *graph.count = 0;
}

// Each block looks left and up; the others look at it.
template <class Block>
HIDE_FN void merge_strip(Block& block, const Graph& graph, int strip) {
  constexpr unsigned kTop = 3, kBottom = 12, kLeft = 5, kRight = 10;
  each_block(graph, strip, [&](int row, int column, unsigned mask) {
    const auto join = [&](unsigned own, int other_row, int other_column, unsigned facing) {
      if ((mask & own) && (graph.mask(other_row, other_column) & facing))
        unite(block, graph.parents, graph.node(row, column), graph.node(other_row, other_column));
    };
    if (column > 0) join(kLeft, row, column - 1, kRight);
    if (row > 0) join(kTop, row - 1, column, kBottom);
    if (row > 0 && column > 0) join(kTop & kLeft, row - 1, column - 1, kBottom & kRight);
    if (row > 0 && column + 1 < graph.columns) join(kTop & kRight, row - 1, column + 1, kBottom & kLeft);
  });
}

template <class Block>
HIDE_FN void compress_strip(Block& block, const Graph& graph, int strip) {
  each_block(graph, strip, [&](int row, int column, unsigned) {
    const int node = graph.node(row, column);
    block.min(graph.parents + node, find_root(block, graph.parents, node));
  });
}

template <class Block>
HIDE_FN void number_strip(Block& block, const Graph& graph, int strip) {
  each_block(graph, strip, [&](int row, int column, unsigned) {
    const int node = graph.node(row, column);
    if (graph.parents[node] != node) return;
    const int number = block.add(graph.count, 1);
    graph.parents[node] = ~number;
    graph.table[number] = {0, kNone, kNone, 0, 0, 0, kZeroExponent};
  });
}

HIDE_FN int exponent_of(double value) {
  if (value == 0) return kZeroExponent;
  return isinf(value) ? kInfiniteExponent : ilogb(value) + 1;
}

// Regions change seldom along a strip, so what its cells give is gathered before it goes to the table.
template <class Block, class T>
HIDE_FN void measure_strip(Block& block, const Map<T>& map, const Graph& graph, int strip) {
  Region* current = nullptr;
  Region part = {};
  const auto flush = [&] {
    if (current == nullptr) return;
    block.min(&current->first, part.first);
    block.min(&current->left, part.left);
    block.max(&current->right, part.right);
    block.max(&current->bottom, part.bottom);
    block.add(&current->cells, part.cells);
    block.max(&current->exponent, part.exponent);
  };
  each_block(graph, strip, [&](int row, int column, unsigned mask) {
    Region* region = &graph.region(graph.node(row, column));
    if (region != current) {
      flush();
      current = region;
      part = {0, kNone, kNone, 0, 0, 0, kZeroExponent};
    }
    for (int cell = 0; cell < 4; ++cell) {
      if (!(mask >> cell & 1)) continue;
      const int y = 2 * row + cell / 2, x = 2 * column + cell % 2, index = y * map.width + x;
      const int exponent = exponent_of(map.at(y, x));
      if (index < part.first) part.first = index;
      if (x < part.left) part.left = x;
      if (x + 1 > part.right) part.right = x + 1;
      if (y + 1 > part.bottom) part.bottom = y + 1;
      if (exponent > part.exponent) part.exponent = exponent;
      ++part.cells;
    }
  });
  flush();
}

// The power of two that is one unit of the region's sum.
HIDE_FN int unit_exponent(const Region& region) {
  int bits = 0;
  while ((region.cells - 1) >> bits) ++bits;
  return region.exponent + bits - kFractionBits;
}

template <class Block, class T>
HIDE_FN void add_strip(Block& block, const Map<T>& map, const Graph& graph, int strip) {
  Region* current = nullptr;
  int unit = 0;
  u64 sum = 0;
  each_block(graph, strip, [&](int row, int column, unsigned mask) {
    Region* region = &graph.region(graph.node(row, column));
    if (region->exponent == kInfiniteExponent || region->exponent == kZeroExponent) return;
    if (region != current) {
      if (current != nullptr) block.add(&current->sum, sum);
      current = region;
      unit = unit_exponent(*region);
      sum = 0;
    }
    for (int cell = 0; cell < 4; ++cell)
      if (mask >> cell & 1) sum += u64(llrint(scalbn(double(map.at(2 * row + cell / 2, 2 * column + cell % 2)), -unit)));
  });
  if (current != nullptr) block.add(&current->sum, sum);
}

// Keys ascend as scores descend and, where those are equal, as first cells ascend; no two regions share one.
HIDE_FN u64 key_of(const Region& region) {
  unsigned bits = 0x7f800000;  // infinity
  if (region.exponent != kInfiniteExponent) {
    // A sum of zero has no use for its unit. Adding zero makes -0 into 0, which it equals.
    const double sum = double(i64(region.sum));
    const float score = float(sum == 0 ? 0 : scalbn(sum, unit_exponent(region))) + 0.0f;
    memcpy(&bits, &score, sizeof bits);
  }
  const unsigned ascending = bits >> 31 ? ~bits : bits | 1u << 31;
  return u64(~ascending) << 32 | unsigned(region.first);
}

HIDE_FN float score_of(u64 key) {
  const unsigned ascending = ~unsigned(key >> 32);
  const unsigned bits = ascending >> 31 ? ascending & ~(1u << 31) : ~ascending;
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

// Bitonic sort of any number of rows: those beyond the end count as largest and never move.
template <class Block>
HIDE_FN void sort_regions(Block& block, Region* table, int count) {
  const auto pass = [&](int flip) {
    block.sync();
    for (int i = block.thread; i < count; i += block.threads) {
      const int partner = i ^ flip;
      if (partner <= i || partner >= count || table[i].sum < table[partner].sum) continue;
      const Region moved = table[i];
      table[i] = table[partner];
      table[partner] = moved;
    }
  };
  for (i64 size = 2; size < 2 * i64(count); size *= 2) {
    pass(int(size - 1));
    for (int flip = int(size / 4); flip > 0; flip /= 2) pass(flip);
  }
  block.sync();
}

// The results of one map; slots beyond its regions are zeros.
struct Slots {
  int* boxes;
  float* scores;
  int *sizes, *count;
  bool* overflow;
};

HIDE_FN Slots slots_at(i64 index, i64 slots, int* boxes, float* scores, int* sizes, int* counts, bool* overflow) {
  return {boxes + 4 * slots * index, scores + slots * index, sizes + slots * index, counts + index, overflow + index};
}

template <class Block>
HIDE_FN void finish_map(Block& block, Region* table, int count, int width, i64 slots, const Slots& out) {
  for (int i = block.thread; i < count; i += block.threads) table[i].sum = key_of(table[i]);
  sort_regions(block, table, count);
  for (i64 slot = block.thread; slot < slots; slot += block.threads) {
    const bool used = slot < count;
    const Region region = used ? table[slot] : Region{};
    out.boxes[4 * slot] = region.left;
    out.boxes[4 * slot + 1] = region.first / width;
    out.boxes[4 * slot + 2] = region.right;
    out.boxes[4 * slot + 3] = region.bottom;
    out.scores[slot] = used ? score_of(region.sum) : 0.0f;
    out.sizes[slot] = region.cells;
  }
  if (block.thread == 0) {
    *out.count = count;
    *out.overflow = count > slots;
  }
}

// Kernel: one block per map, the graph in shared memory, everything in one launch. Blocks take maps in turn, each with
// a table of its own for as many regions as there are 2x2 blocks.
template <class Block, class T>
HIDE_FN void regions_block(Block& block, const T* maps, const bool* valid, Region* tables, int* boxes, float* scores,
                           int* sizes, int* counts, bool* overflow, i64 number, i64 height, i64 width, i64 stride,
                           i64 row_stride, i64 column_stride, i64 slots, double threshold) {
  int* count = reinterpret_cast<int*>(block.shared);
  Graph graph = graph_of(height, width, nullptr, count + 1, nullptr, count);
  const i64 nodes = i64(graph.rows) * graph.columns;
  graph.masks = reinterpret_cast<unsigned*>(graph.parents + nodes);
  graph.table = tables + block.block * nodes;
  const int strips = graph.strips();
  for (i64 index = block.block; index < number; index += block.blocks) {
    const Map<T> map =
        map_at(maps, valid, index, stride, row_stride, column_stride, height, width, threshold);
    for (int i = block.thread; i < strips; i += block.threads) start_strip(map, graph, i);
    block.sync();
    for (int i = block.thread; i < strips; i += block.threads) merge_strip(block, graph, i);
    block.sync();
    for (int i = block.thread; i < strips; i += block.threads) compress_strip(block, graph, i);
    block.sync();
    for (int i = block.thread; i < strips; i += block.threads) number_strip(block, graph, i);
    block.sync();
    for (int i = block.thread; i < strips; i += block.threads) measure_strip(block, map, graph, i);
    block.sync();
    for (int i = block.thread; i < strips; i += block.threads) add_strip(block, map, graph, i);
    block.sync();
    finish_map(block, graph.table, *count, map.width, slots,
               slots_at(index, slots, boxes, scores, sizes, counts, overflow));
  }
}

// Kernel for maps that do not fit: one step for the strips of all maps, the graphs in global memory.
template <class Block, class T>
HIDE_FN void regions_step(Block& block, const T* maps, const bool* valid, unsigned* masks, int* parents, Region* tables,
                          int* counts, i64 number, i64 height, i64 width, i64 stride, i64 row_stride,
                          i64 column_stride, i64 step, double threshold) {
  const Graph shape = graph_of(height, width, nullptr, nullptr, nullptr, nullptr);
  const i64 strips = shape.strips(), nodes = i64(shape.rows) * shape.columns;
  for (i64 item = i64(block.block) * block.threads + block.thread; item < number * strips;
       item += i64(block.blocks) * block.threads) {
    const i64 index = item / strips;
    const int strip = int(item % strips);
    const Graph graph = graph_of(height, width, masks + index * strips, parents + index * nodes,
                                 tables + index * nodes, counts + index);
    const Map<T> map =
        map_at(maps, valid, index, stride, row_stride, column_stride, height, width, threshold);
    switch (step) {
      case 0: start_strip(map, graph, strip); break;
      case 1: merge_strip(block, graph, strip); break;
      case 2: compress_strip(block, graph, strip); break;
      case 3: number_strip(block, graph, strip); break;
      case 4: measure_strip(block, map, graph, strip); break;
      default: add_strip(block, map, graph, strip);
    }
  }
}

// Kernel: the last step after `regions_step`, one block per map.
template <class Block>
HIDE_FN void regions_finish(Block& block, Region* tables, int* boxes, float* scores, int* sizes, int* counts,
                            bool* overflow, i64 number, i64 nodes, i64 width, i64 slots) {
  for (i64 index = block.block; index < number; index += block.blocks)
    finish_map(block, tables + index * nodes, counts[index], int(width), slots,
               slots_at(index, slots, boxes, scores, sizes, counts, overflow));
}

}  // namespace hide
