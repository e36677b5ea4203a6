// The tree map: how an order of tokens is cut into a balanced binary tree. The same map stands in vitkernels/tree.py.
#pragma once

#include <cstdint>

#include "inline.h"

namespace vitkernels {

// Node j of a level covers the places [first(level, j), first(level, j + 1)) of the order.
struct Tree {
  int64_t tokens, levels;

  VITKERNELS_INLINE int64_t first(int64_t level, int64_t node) const { return node * tokens >> level; }
  VITKERNELS_INLINE int64_t leaves() const { return int64_t(1) << levels; }

  // The deepest tree whose leaves have at least leaf_size tokens.
  static VITKERNELS_INLINE Tree of(int64_t tokens, int64_t leaf_size) {
    int64_t levels = 0;
    while (tokens >> (levels + 1) >= leaf_size) levels++;
    return {tokens, levels};
  }
};

}  // namespace vitkernels
