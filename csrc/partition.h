// The index map: how a group of tokens lies in a token map. The same map stands in vitkernels/partition.py.
#pragma once

#include <cstdint>

#include "inline.h"

namespace vitkernels {

// One axis of the map; all in tokens. A line of a group is (region, residue), region-major within the axis.
struct Axis {
  int64_t length, group, interval, shift;

  VITKERNELS_INLINE int64_t regions() const { return (length + group * interval - 1) / (group * interval); }

  // Position of token g of the group; past the end of the axis where the group reaches over it.
  VITKERNELS_INLINE int64_t position(int64_t region, int64_t residue, int64_t g) const {
    int64_t y = (region * group + g) * interval + residue + shift;
    return shift ? y % length : y;
  }

  // Tokens of the group inside the map: its first ones. (A shifted map is a multiple of group * interval: all are
  // inside.)
  VITKERNELS_INLINE int64_t tokens(int64_t region, int64_t residue) const {
    int64_t room = length - region * group * interval - residue;
    int64_t inside = room <= 0 ? 0 : (room + interval - 1) / interval;
    return inside < group ? inside : group;
  }

  // Whether the shift carried the token at y over the border.
  VITKERNELS_INLINE bool wrapped(int64_t y) const { return y < shift; }
};

// Where a group lies: groups are numbered (region_y, region_x, residue_y, residue_x) in raster order.
struct Place {
  int64_t region_y, region_x, residue_y, residue_x;
};

struct Map {
  Axis y, x;

  VITKERNELS_INLINE int64_t groups() const { return y.regions() * x.regions() * y.interval * x.interval; }

  VITKERNELS_INLINE Place place(int64_t id) const {
    int64_t residue_x = id % x.interval, residue_y = id / x.interval % y.interval,
            region = id / (x.interval * y.interval);
    return {region / x.regions(), region % x.regions(), residue_y, residue_x};
  }
};

}  // namespace vitkernels
