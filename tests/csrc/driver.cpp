// Runs the kernels' bodies as a GPU would, by blocks of real threads with a barrier, against naive definitions.
//
// Built with -fsanitize=thread it finds races between barriers, with address,undefined every access out of bounds and
// overflow; tests/test_csrc.py builds and runs it. `driver SECONDS` goes on with other random inputs for that long.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/collage.h"
#include "../../csrc/layout.h"
#include "../../csrc/pixel_values.h"
#include "../../csrc/regions.h"

namespace {

using namespace hide;

// All threads of a block meet here.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    std::unique_lock lock(mutex_);
    const int round = round_;
    if (++waiting_ == threads_) {
      waiting_ = 0;
      ++round_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  int threads_, waiting_ = 0, round_ = 0;
};

struct ThreadedBlock {
  int block, blocks, thread, threads;
  char* shared;
  Barrier* barrier;
  static constexpr bool kSerial = false;

  void sync() { barrier->wait(); }
  // Lets another thread in between now and then, so that atomics meet in many orders.
  static void stumble() {
    thread_local unsigned state = unsigned(std::hash<std::thread::id>()(std::this_thread::get_id()));
    state = state * 1664525u + 1013904223u;
    if (state >> 28 == 0) std::this_thread::yield();
  }
  static int load(const int* at) {
    stumble();
    return __atomic_load_n(at, __ATOMIC_RELAXED);
  }
  template <class Choose>
  static int change(int* at, Choose choose) {
    stumble();
    int before = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(at, &before, choose(before), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return before;
  }
  static int min(int* at, int value) { return change(at, [=](int before) { return value < before ? value : before; }); }
  static void max(int* at, int value) { change(at, [=](int before) { return value > before ? value : before; }); }
  static int add(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
  static void add(u64* at, u64 value) { __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
};

// Blocks one after another, their threads at once. Shared memory starts with garbage.
template <class Body>
void launch(int blocks, int threads, size_t shared, Body body) {
  for (int index = 0; index < blocks; ++index) {
    Barrier barrier(threads);
    std::vector<u64> memory(shared / 8 + 1, 0xdeadbeefdeadbeef);
    std::vector<std::thread> running;
    for (int thread = 0; thread < threads; ++thread)
      running.emplace_back([&, thread] {
        ThreadedBlock block{index, blocks, thread, threads, reinterpret_cast<char*>(memory.data()), &barrier};
        body(block);
      });
    for (std::thread& thread : running) thread.join();
  }
}

using Random = std::mt19937;

int upto(Random& random, int most) { return int(random() % unsigned(most + 1)); }

[[noreturn]] void fail(const char* what) {
  std::printf("wrong: %s\n", what);
  std::exit(1);
}

struct Found {
  int x0, y0, x1, y1, cells, first;
  float score;
};

// Flood fill; values are multiples of 1/8, so that sums are exact.
std::vector<Found> flood(const std::vector<float>& map, int height, int width, float threshold) {
  std::vector<bool> seen(map.size());
  std::vector<Found> found;
  for (int start = 0; start < height * width; ++start) {
    if (seen[start] || !(map[start] >= threshold)) continue;
    Found region{width, height, 0, 0, 0, start, 0};
    std::vector<int> queue{start};
    seen[start] = true;
    while (!queue.empty()) {
      const int cell = queue.back(), y = cell / width, x = cell % width;
      queue.pop_back();
      region = {std::min(region.x0, x), std::min(region.y0, y), std::max(region.x1, x + 1), std::max(region.y1, y + 1),
                region.cells + 1,       region.first,           region.score + map[cell]};
      for (int dy = -1; dy <= 1; ++dy)
        for (int dx = -1; dx <= 1; ++dx) {
          const int other = (y + dy) * width + x + dx;
          if (y + dy < 0 || y + dy >= height || x + dx < 0 || x + dx >= width || seen[other]) continue;
          if (map[other] >= threshold) {
            seen[other] = true;
            queue.push_back(other);
          }
        }
    }
    found.push_back(region);
  }
  std::stable_sort(found.begin(), found.end(), [](const Found& a, const Found& b) { return a.score > b.score; });
  return found;
}

void check_regions(Random& random, int threads) {
  const int number = 1 + upto(random, 2), height = 1 + upto(random, 20), width = 1 + upto(random, 40);
  const int slots = 1 + upto(random, 30), density = 1 + upto(random, 9);
  const bool flat = upto(random, 1);
  std::vector<float> maps(size_t(number) * height * width);
  for (float& value : maps) value = upto(random, 9) < density ? (flat ? 1 : 1 + upto(random, 7)) / 8.0f : 0;
  std::vector<char> valid(number, 1);
  if (upto(random, 3) == 0) valid[0] = 0;
  const float threshold = 1 / 8.0f;
  const Graph shape = graph_of(height, width, nullptr, nullptr, nullptr, nullptr);
  const int nodes = shape.rows * shape.columns, strips = shape.strips();
  std::vector<int> boxes(4 * number * slots, -1), sizes(number * slots, -1), counts(number, -1);
  std::vector<float> scores(number * slots, -1);
  std::vector<char> overflow(number, 7);
  const auto* used = reinterpret_cast<const bool*>(valid.data());
  auto* over = reinterpret_cast<bool*>(overflow.data());

  if (upto(random, 1)) {
    const int blocks = 1 + upto(random, number - 1);
    std::vector<Region> tables(size_t(blocks) * nodes);
    launch(blocks, threads, 4 * size_t(1 + nodes + strips), [&](ThreadedBlock& block) {
      regions_block(block, maps.data(), used, tables.data(), boxes.data(), scores.data(), sizes.data(), counts.data(),
                    over, number, height, width, i64(height) * width, width, 1, slots, threshold);
    });
  } else {
    std::vector<Region> tables(size_t(number) * nodes);
    std::vector<unsigned> masks(size_t(number) * strips, ~0u);
    std::vector<int> parents(size_t(number) * nodes, 1 << 30);
    for (int step = 0; step < 6; ++step)
      launch(1, threads, 0, [&](ThreadedBlock& block) {
        regions_step(block, maps.data(), used, masks.data(), parents.data(), tables.data(), counts.data(), number,
                     height, width, i64(height) * width, width, 1, step, threshold);
      });
    launch(1 + upto(random, number - 1), threads, 0, [&](ThreadedBlock& block) {
      regions_finish(block, tables.data(), boxes.data(), scores.data(), sizes.data(), counts.data(), over, number,
                     nodes, width, slots);
    });
  }

  for (int index = 0; index < number; ++index) {
    const auto first = maps.begin() + size_t(index) * height * width;
    auto want = flood({first, first + height * width}, height, width, threshold);
    if (!valid[index]) want.clear();
    if (counts[index] != int(want.size())) fail("number of regions");
    if (overflow[index] != (int(want.size()) > slots)) fail("overflow");
    want.resize(slots, {0, 0, 0, 0, 0, 0, 0});
    for (int slot = 0; slot < slots; ++slot) {
      const int at = index * slots + slot, *box = &boxes[4 * at];
      const Found& region = want[slot];
      if (box[0] != region.x0 || box[1] != region.y0 || box[2] != region.x1 || box[3] != region.y1) fail("box");
      if (sizes[at] != region.cells || scores[at] != region.score) fail("size or score");
    }
  }
}

struct Box {
  int edge[4];
  bool operator<(const Box& other) const {
    return std::pair(edge[1], edge[0]) < std::pair(other.edge[1], other.edge[0]);
  }
};

std::vector<Box> merged(std::vector<Box> boxes) {
  const auto pass = [&] {
    for (size_t i = 0; i < boxes.size(); ++i)
      for (size_t j = 0; j < i; ++j) {
        Box &a = boxes[i], &b = boxes[j];
        if (a.edge[2] < b.edge[0] || b.edge[2] < a.edge[0] || a.edge[3] < b.edge[1] || b.edge[3] < a.edge[1]) continue;
        for (int k = 0; k < 2; ++k) {
          b.edge[k] = std::min(a.edge[k], b.edge[k]);
          b.edge[k + 2] = std::max(a.edge[k + 2], b.edge[k + 2]);
        }
        boxes.erase(boxes.begin() + i);
        return true;
      }
    return false;
  };
  while (pass()) {
  }
  std::sort(boxes.begin(), boxes.end());
  return boxes;
}

// Plans a collage of random boxes, then copies its pixels; both must be what the definitions give.
void check_collage(Random& random, int threads) {
  const int height = 8 + upto(random, 40), width = 8 + upto(random, 40), largest = 1 + upto(random, 12);
  const int maps = 1 + upto(random, 2), slots = 1 + upto(random, 8);
  std::vector<int> boxes(4 * maps * slots, -5), counts(maps);
  std::vector<Box> used;
  for (int index = 0; index < maps; ++index) {
    counts[index] = upto(random, slots + 2);
    for (int slot = 0; slot < std::min(counts[index], slots); ++slot) {
      int* box = &boxes[4 * (index * slots + slot)];
      box[0] = upto(random, width), box[1] = upto(random, height);
      box[2] = std::min(width, box[0] + upto(random, largest)), box[3] = std::min(height, box[1] + upto(random, largest));
      if (box[0] < box[2] && box[1] < box[3]) used.push_back({{box[0], box[1], box[2], box[3]}});
    }
  }
  std::vector<Plan> memory(1);
  Plan& plan = memory[0];
  memset(&plan, 0x55, sizeof plan);
  launch(1, threads, sizeof(LayoutMemory), [&](ThreadedBlock& block) {
    layout_boxes(block, boxes.data(), counts.data(), &plan, maps, slots, 0, 0, height, width);
  });
  const std::vector<Box> want = merged(used);
  if (plan.status != kDone || plan.count != int(want.size())) fail("number of merged boxes");
  if (plan.most != *std::max_element(counts.begin(), counts.end())) fail("most regions of a map");
  std::set<int> kept[2];
  for (int i = 0; i < plan.count; ++i)
    for (int axis = 0; axis < 2; ++axis) {
      if (plan.boxes[i][axis] != want[i].edge[axis] || plan.boxes[i][axis + 2] != want[i].edge[axis + 2])
        fail("merged box");
      for (int at = want[i].edge[axis]; at < want[i].edge[axis + 2]; ++at) kept[axis].insert(at);
    }
  if (plan.width != int(kept[0].size()) || plan.height != int(kept[1].size())) fail("canvas");
  for (int i = 0; i < plan.count; ++i)
    for (int side = 0; side < 4; ++side) {
      const auto& covered = kept[side % 2];
      const int before = int(std::distance(covered.begin(), covered.lower_bound(want[i].edge[side])));
      if (plan.positions[i][side] != before) fail("position");
    }
  for (int axis = 0; axis < 2; ++axis) {
    std::set<int> runs;
    const auto* kept_runs = axis == 0 ? plan.kept_columns : plan.kept_rows;
    for (int i = 0; i < (axis == 0 ? plan.columns : plan.rows); ++i) {
      if (i > 0 && kept_runs[i - 1][1] >= kept_runs[i][0]) fail("runs that touch");
      for (int at = kept_runs[i][0]; at < kept_runs[i][1]; ++at) runs.insert(at);
    }
    if (runs != kept[axis]) fail("runs");
  }

  const int source_channels = 3 + upto(random, 1), channels = 3 + upto(random, 1), blend = upto(random, 1);
  std::vector<u8> pixels(size_t(height) * width * source_channels);
  for (u8& value : pixels) value = u8(random());
  // Channels first or last.
  const bool planar = upto(random, 1);
  const i64 row = planar ? width : width * source_channels, column = planar ? 1 : source_channels;
  const i64 channel = planar ? height * width : 1;
  std::vector<u8> canvas(size_t(plan.height) * plan.width * channels, 1), serial = canvas;
  const auto go = [&](auto& block, u8* target) {
    collage_rows(block, pixels.data(), plan.boxes[0], plan.positions[0], target, plan.count, row, column, channel,
                 source_channels, plan.height, plan.width, channels, 10, 200, 30, blend);
  };
  const size_t shared = sizeof(Span) * (1 + plan.count);
  launch(2, threads, shared, [&](ThreadedBlock& block) { go(block, canvas.data()); });
  std::vector<u64> list(shared / 8 + 1);
  SerialBlock one{0, 1, reinterpret_cast<char*>(list.data())};
  go(one, serial.data());
  const std::vector<int> rows(kept[1].begin(), kept[1].end()), columns(kept[0].begin(), kept[0].end());
  for (int y = 0; y < plan.height; ++y)
    for (int x = 0; x < plan.width; ++x) {
      bool shown = false;
      for (const Box& box : want)
        shown |= box.edge[0] <= columns[x] && columns[x] < box.edge[2] && box.edge[1] <= rows[y] && rows[y] < box.edge[3];
      const u8* source = &pixels[rows[y] * row + columns[x] * column];
      const int alpha = source_channels == 4 ? source[3 * channel] : 255;
      const int fill[3] = {10, 200, 30};
      for (int c = 0; c < channels; ++c) {
        int value = channels == 4 ? 0 : fill[c];
        if (shown) value = c == 3 ? alpha : source[c * channel];
        if (shown && channels == 3 && blend)
          value = int((source[c * channel] * alpha + fill[c] * (255 - alpha)) / 255.0 + 0.5);
        const size_t at = (size_t(y) * plan.width + x) * channels + c;
        if (canvas[at] != value || serial[at] != value) fail("pixel");
      }
    }
}

// One pass over a picture of any layout, plain and into patches, on many threads and on one.
void check_patches(Random& random, int threads) {
  const int patch = 1 + upto(random, 4), merge = 1 + upto(random, 2), frames = 1 + upto(random, 2);
  const int rows = patch * merge * (1 + upto(random, 4)), columns = patch * merge * (1 + upto(random, 4));
  const Axis axis = upto(random, 1) ? kColumns : kRows;
  const int source = 1 + upto(random, 50), targets = axis == kColumns ? columns : rows, most = 1 + upto(random, 6);
  const int height = axis == kColumns ? rows : source, width = axis == kColumns ? source : columns;
  const int channels = 3 + upto(random, 1);
  std::vector<int> table(size_t(2 + most) * targets);
  for (int i = 0; i < targets; ++i) {
    table[i] = upto(random, source - 1);
    table[targets + i] = 1 + upto(random, std::min(most, source - table[i]) - 1);
    for (int tap = 0; tap < most; ++tap) table[(2 + tap) * targets + i] = upto(random, 2 << 20) - (1 << 20);
  }
  std::vector<u8> pixels(size_t(height) * width * channels);
  for (u8& value : pixels) value = u8(random());
  const bool planar = upto(random, 1);
  const i64 row = planar ? width : width * channels, column = planar ? 1 : channels;
  const i64 channel = planar ? height * width : 1;
  std::vector<unsigned> values(3 * 256);
  for (unsigned& value : values) value = unsigned(random());

  std::vector<u8> naive(size_t(rows) * columns * 3);
  for (int y = 0; y < rows; ++y)
    for (int x = 0; x < columns; ++x)
      for (int c = 0; c < 3; ++c) {
        const int of = axis == kColumns ? x : y;
        double sum = 0;
        for (int tap = 0; tap < table[targets + of]; ++tap) {
          const int at = table[of] + tap;
          const u8* pixel = &pixels[(axis == kColumns ? y : at) * row + (axis == kColumns ? at : x) * column];
          const int alpha = channels == 4 ? pixel[3 * channel] : 255;
          const int white = int((pixel[c * channel] * alpha + 255 * (255 - alpha)) / 255.0 + 0.5);
          sum += double(white) * table[(2 + tap) * targets + of];
        }
        // Sums of whole numbers are exact.
        naive[(size_t(y) * columns + x) * 3 + c] = u8(std::min(255.0, std::max(0.0, std::floor(sum / (1 << 22) + 0.5))));
      }

  std::vector<u8> resized(naive.size(), 7);
  std::vector<unsigned> cut(naive.size() * frames, 7);
  std::vector<u64> memory((3 * (size_t(kStrip) * width + patch * columns)) / 8 + 1);
  const auto go = [&](auto& block, bool patches) {
    if (patches) {
      resize_to_patches(block, pixels.data(), table.data(), values.data(), cut.data(), row, column, channel, channels,
                        width, rows, columns, axis, patch, merge, frames);
    } else {
      resize(block, pixels.data(), table.data(), resized.data(), row, column, channel, channels, width, rows, columns,
             axis);
    }
  };
  // One thread reads rows of dense RGB only.
  const bool serial = upto(random, 1) && (axis == kColumns || (channels == 3 && !planar));
  for (bool patches : {false, true}) {
    SerialBlock one{0, 1, reinterpret_cast<char*>(memory.data())};
    if (serial) go(one, patches);
    if (!serial) launch(1 + upto(random, 3), threads, 0, [&](ThreadedBlock& block) { go(block, patches); });
  }
  if (resized != naive) fail("resized pixel");
  size_t at = 0;
  const int cell = patch * merge;
  for (int top = 0; top < rows; top += cell)
    for (int left = 0; left < columns; left += cell)
      for (int in_block = 0; in_block < merge * merge; ++in_block)
        for (int c = 0; c < 3; ++c)
          for (int in_patch = 0; in_patch < frames * patch * patch; ++in_patch) {
            const int y = top + in_block / merge * patch + in_patch / patch % patch;
            const int x = left + in_block % merge * patch + in_patch % patch;
            if (cut[at++] != values[256 * c + naive[(size_t(y) * columns + x) * 3 + c]]) fail("value in a patch");
          }
}

void check_too_many(Random& random, int threads) {
  std::vector<int> boxes;
  const int count = kCapacity + upto(random, 1);
  for (int i = 0; i < count; ++i)
    for (int edge : {2 * i, 0, 2 * i + 1, 1}) boxes.push_back(edge);
  std::vector<Plan> plan(1);
  launch(1, threads, sizeof(LayoutMemory), [&](ThreadedBlock& block) {
    layout_boxes<ThreadedBlock, int>(block, boxes.data(), nullptr, plan.data(), 1, count, 0, 0, 1, 4 * kCapacity);
  });
  if (plan[0].status != (count > kCapacity ? kTooMany : kDone)) fail("capacity");
  if (count == kCapacity && (plan[0].count != kCapacity || plan[0].width != kCapacity)) fail("a full plan");
  boxes[5] = -1;
  launch(1, threads, sizeof(LayoutMemory), [&](ThreadedBlock& block) {
    layout_boxes<ThreadedBlock, int>(block, boxes.data(), nullptr, plan.data(), 1, 9, 0, 0, 1, 4 * kCapacity);
  });
  if (plan[0].status != kInvalid) fail("a box outside");
}

}  // namespace

int main(int, char** arguments) {
  const auto stop = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::stod(arguments[1]));
  Random random(1);
  int rounds = 0;
  for (; std::chrono::steady_clock::now() < stop; ++rounds) {
    for (int i = 0; i < 8; ++i) {
      const int threads = 1 + upto(random, 6);
      check_regions(random, threads);
      check_collage(random, threads);
      check_patches(random, threads);
    }
    if (rounds % 16 == 0) check_too_many(random, 4);
  }
  std::printf("%d rounds of 8 batches, 8 collages and 8 resizes\n", rounds);
  return rounds == 0;
}
