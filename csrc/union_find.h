// Disjoint sets as trees in an array: each node names a parent no larger than itself, a root names itself.
//
// Any number of threads may unite at once, so every access to a node that others may change is atomic.
#pragma once

#include "block.h"

namespace hide {

template <class Block>
HIDE_FN int find_root(Block& block, const int* parents, int node) {
  for (int parent; (parent = block.load(parents + node)) != node;) node = parent;
  return node;
}

template <class Block>
HIDE_FN void unite(Block& block, int* parents, int a, int b) {
  while (true) {
    a = find_root(block, parents, a);
    b = find_root(block, parents, b);
    if (a == b) return;
    const int low = a < b ? a : b;
    const int high = a < b ? b : a;
    const int before = block.min(parents + high, low);
    if (before == high) return;
    // Another thread was quicker: `high` is a root no more, and what it was hung under belongs here too.
    a = before;
    b = low;
  }
}

}  // namespace hide
