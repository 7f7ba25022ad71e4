// What tests ask of the sums and do to them; see Schedule.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace bnext {

struct SumsProbe {
  std::atomic<int64_t> slow_channels{0};  // that were summed again, in double, since the start
  std::vector<double> pilots;             // of the channels, in place of their own; empty: none
};
inline SumsProbe sums_probe;

}  // namespace bnext
