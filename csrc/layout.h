// Boxes of all maps to the plan of a collage: pool, scale to pixels, merge, sort, squeeze out what no box covers.
//
// One block does it all, for at most kCapacity boxes with an area; n of them cost n^2 comparisons, shared by the threads.
// The merged set is the only one that is stable and finest, so neither the order of boxes nor of threads matters.
#pragma once

#include "union_find.h"

namespace hide {

constexpr int kCapacity = 1024;

// The result in one piece, for one read by the host. Boxes are half-open x0, y0, x1, y1, in reading order.
struct Plan {
  int status;  // kDone, kInvalid or kTooMany; with the last two only `most` means something
  int count;   // boxes
  int height, width;  // of the canvas
  int rows, columns;  // how many runs are kept
  int most;           // regions of the map that has most, also those beyond its slots
  int unused;
  int boxes[kCapacity][4];
  int positions[kCapacity][4];  // of each box on the canvas
  int kept_rows[kCapacity][2];  // start, stop of the source rows that some box covers
  int kept_columns[kCapacity][2];
};
static_assert(sizeof(Plan) == 4 * (8 + 12 * kCapacity), "hide_kernels/geometry.py");

enum Status { kDone, kInvalid, kTooMany };

struct LayoutMemory {
  int x0[kCapacity], y0[kCapacity], x1[kCapacity], y1[kCapacity];
  int parents[kCapacity];
  int starts[2][kCapacity], stops[2][kCapacity];  // of the runs along x and y, in no order
  int run_starts[2], run_stops[2];
  int pooled, invalid, changed;
};
static_assert(sizeof(LayoutMemory) <= 37 * 1024, "hide_kernels/geometry.py");

// A cell's edge in pixels: normalised first, then scaled and cut, as the reference does.
HIDE_FN int to_pixel(i64 edge, i64 cells, i64 pixels) {
  return cells == 0 ? int(edge) : int(double(edge) / double(cells) * double(pixels));
}

HIDE_FN bool touching(const LayoutMemory& at, int i, int j) {
  return at.x0[i] <= at.x1[j] && at.x0[j] <= at.x1[i] && at.y0[i] <= at.y1[j] && at.y0[j] <= at.y1[i];
}

HIDE_FN bool has_area(const LayoutMemory& at, int i) { return at.x0[i] < at.x1[i] && at.y0[i] < at.y1[i]; }

template <class Block, class Index>
HIDE_FN void pool_boxes(Block& block, LayoutMemory& at, Plan& plan, const Index* boxes, const int* counts, i64 maps,
                        i64 slots, i64 rows, i64 columns, i64 height, i64 width) {
  const i64 right = columns ? columns : width, bottom = rows ? rows : height;
  for (i64 item = block.thread; item < maps * slots; item += block.threads) {
    const i64 index = item / slots, slot = item % slots;
    if (counts != nullptr && slot == 0) block.max(&plan.most, counts[index]);
    if (counts != nullptr && slot >= counts[index]) continue;
    const Index* box = boxes + 4 * item;
    const i64 x0 = box[0], y0 = box[1], x1 = box[2], y1 = box[3];
    if (x0 < 0 || y0 < 0 || x0 > x1 || y0 > y1 || x1 > right || y1 > bottom) {
      block.max(&at.invalid, 1);
      continue;
    }
    const int left = to_pixel(x0, columns, width), top = to_pixel(y0, rows, height);
    const int stop_x = to_pixel(x1, columns, width), stop_y = to_pixel(y1, rows, height);
    if (left == stop_x || top == stop_y) continue;
    const int place = block.add(&at.pooled, 1);
    if (place >= kCapacity) continue;
    at.x0[place] = left;
    at.y0[place] = top;
    at.x1[place] = stop_x;
    at.y1[place] = stop_y;
  }
  block.sync();
}

// Boxes that touch become one, their hull, until none do; those that went into another are left without area.
template <class Block>
HIDE_FN void merge_boxes(Block& block, LayoutMemory& at, int count) {
  for (bool again = true; again;) {
    for (int i = block.thread; i < count; i += block.threads) at.parents[i] = i;
    if (block.thread == 0) at.changed = 0;
    block.sync();
    for (int i = block.thread; i < count; i += block.threads)
      for (int j = 0; j < i && has_area(at, i); ++j)
        if (has_area(at, j) && touching(at, i, j)) unite(block, at.parents, i, j);
    block.sync();
    for (int i = block.thread; i < count; i += block.threads) {
      const int root = find_root(block, at.parents, i);
      if (root == i) continue;
      block.min(&at.x0[root], at.x0[i]);
      block.min(&at.y0[root], at.y0[i]);
      block.max(&at.x1[root], at.x1[i]);
      block.max(&at.y1[root], at.y1[i]);
      at.x1[i] = at.x0[i];
      block.max(&at.changed, 1);
    }
    block.sync();
    again = at.changed != 0;
    block.sync();
  }
}

template <class Block>
HIDE_FN void sort_boxes(Block& block, LayoutMemory& at, Plan& plan, int count) {
  for (int i = block.thread; i < count; i += block.threads) {
    if (!has_area(at, i)) continue;
    int place = 0;
    for (int j = 0; j < count; ++j)
      place += has_area(at, j) && (at.y0[j] < at.y0[i] || (at.y0[j] == at.y0[i] && at.x0[j] < at.x0[i]));
    plan.boxes[place][0] = at.x0[i];
    plan.boxes[place][1] = at.y0[i];
    plan.boxes[place][2] = at.x1[i];
    plan.boxes[place][3] = at.y1[i];
    block.add(&plan.count, 1);
  }
  block.sync();
}

// Runs of covered columns (axis 0) or rows (axis 1): a start that no other box reaches over, and a stop likewise; of
// equal ones the first box counts.
template <class Block>
HIDE_FN void find_runs(Block& block, LayoutMemory& at, const Plan& plan, int axis) {
  for (int i = block.thread; i < plan.count; i += block.threads) {
    const int start = plan.boxes[i][axis], stop = plan.boxes[i][axis + 2];
    bool starts = true, stops = true;
    for (int j = 0; j < plan.count; ++j) {
      const int other_start = plan.boxes[j][axis], other_stop = plan.boxes[j][axis + 2];
      if ((other_start < start || (other_start == start && j < i)) && other_stop >= start) starts = false;
      if ((other_stop > stop || (other_stop == stop && j < i)) && other_start <= stop) stops = false;
    }
    if (starts) at.starts[axis][block.add(&at.run_starts[axis], 1)] = start;
    if (stops) at.stops[axis][block.add(&at.run_stops[axis], 1)] = stop;
  }
}

HIDE_FN int smaller(const int* values, int count, int than) {
  int found = 0;
  for (int i = 0; i < count; ++i) found += values[i] < than;
  return found;
}

// A coordinate less what is left out before it: the starts up to it less the stops up to it, which pair up.
HIDE_FN int squeezed(const LayoutMemory& at, int axis, int edge) {
  unsigned left_out = 0;
  for (int i = 0; i < at.run_starts[axis]; ++i) {
    if (at.starts[axis][i] <= edge) left_out += at.starts[axis][i];
    if (at.stops[axis][i] <= edge) left_out -= at.stops[axis][i];
  }
  return int(edge - left_out);
}

template <class Block>
HIDE_FN void squeeze(Block& block, const LayoutMemory& at, Plan& plan, int axis) {
  auto* runs = axis == 0 ? plan.kept_columns : plan.kept_rows;
  for (int i = block.thread; i < at.run_starts[axis]; i += block.threads) {
    runs[smaller(at.starts[axis], at.run_starts[axis], at.starts[axis][i])][0] = at.starts[axis][i];
    runs[smaller(at.stops[axis], at.run_starts[axis], at.stops[axis][i])][1] = at.stops[axis][i];
  }
  for (int i = block.thread; i < plan.count; i += block.threads) {
    const int start = plan.boxes[i][axis];
    const int placed = squeezed(at, axis, start), stop = placed + plan.boxes[i][axis + 2] - start;
    plan.positions[i][axis] = placed;
    plan.positions[i][axis + 2] = stop;
    block.max(axis == 0 ? &plan.width : &plan.height, stop);
  }
}

// Kernel: `boxes` holds `slots` boxes of each map, of which `counts` are used (all if null), in cells of a grid of
// rows x columns over an image of height x width, or in its pixels if rows and columns are 0.
template <class Block, class Index>
HIDE_FN void layout_boxes(Block& block, const Index* boxes, const int* counts, Plan* result, i64 maps, i64 slots,
                          i64 rows, i64 columns, i64 height, i64 width) {
  LayoutMemory& at = *reinterpret_cast<LayoutMemory*>(block.shared);
  Plan& plan = *result;
  if (block.thread == 0) {
    plan.status = plan.count = plan.height = plan.width = plan.most = plan.unused = 0;
    at.pooled = at.invalid = 0;
    for (int axis = 0; axis < 2; ++axis) at.run_starts[axis] = at.run_stops[axis] = 0;
  }
  block.sync();
  pool_boxes(block, at, plan, boxes, counts, maps, slots, rows, columns, height, width);
  if (at.invalid || at.pooled > kCapacity) {
    if (block.thread == 0) plan.status = at.invalid ? kInvalid : kTooMany;
    return;
  }
  merge_boxes(block, at, at.pooled);
  sort_boxes(block, at, plan, at.pooled);
  for (int axis = 0; axis < 2; ++axis) find_runs(block, at, plan, axis);
  block.sync();
  for (int axis = 0; axis < 2; ++axis) squeeze(block, at, plan, axis);
  if (block.thread == 0) {
    plan.columns = at.run_starts[0];
    plan.rows = at.run_starts[1];
  }
}

}  // namespace hide
