// The CUDA plan and its thresholds. None of them has been measured on a GPU yet; beside each is the
// estimate it rests on. Estimates are for an H200: 132 SMs, 228 KiB of shared memory each, 60 MB of
// L2, 4.2 TB/s reached of 4.8, 700 to 800 ns from a load to its data.
//
// Resident is right wherever it fits: 2E forward and 3E backward against 3E and 5E. The choice left
// is how many blocks share a group of channels. Small teams exchange less; large ones hold more and
// fill the GPU when channels are few. With two blocks per SM one loads while the other stores.
#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "plan.h"

namespace bnext {
namespace {

// A miss fills half a line of 128 bytes (2.75 TB/s in pieces of 64 bytes on an H100, 1.59 in pieces
// of 32, 2.89 contiguous; measured by the quack project): no group is narrower in memory.
constexpr int64_t kMinSlabBytes = 64;
// A row shorter than a line is taken as columns, even if a vector divides it: by rows a warp would
// touch a line per thread.
constexpr int64_t kMinRowBytes = 128;
// Rows are cut into segments of whole lines and whole mask bytes, and far from the limits of int.
constexpr int64_t kSegmentUnit = 64;
constexpr int64_t kMaxSegmentWidth = 1 << 16;
// With fewer items than this, four loads in flight, a thread is better spent on another channel.
constexpr int64_t kMinItemsPerThread = 4;

// The driver takes this much of an SM's shared memory for each block.
constexpr int64_t kReservedSharedBytes = 1024;
// A block that holds less spends its time on starting and exchanging (1 to 2 us, in which an SM
// moves 32 to 64 KiB), so no team grows until its blocks hold less.
constexpr int64_t kMinBlockBytes = 16 * 1024;
constexpr int64_t kPortableClusterBlocks = 8;
// A larger cluster needs 16 free SMs in one GPC, which strands SMs (apex saw fewer resident
// blocks): only where a channel fits no other way.
constexpr int64_t kLargeClusterBlocks = 16;
// Which share of the SMs must be busy: beside idle ones, a memory-bound SM draws twice its share.
constexpr double kEnoughBalance = 0.75, kPoorBalance = 0.5;
// A grid's barrier costs about 2 us, in which an SM moves 64 KiB: where clusters leave more than
// half of the SMs idle (kPoorBalance) and blocks hold more than that, a grid is better.
constexpr int64_t kGridMinBlockBytes = 64 * 1024;
// The most that a block may read of its team's partial results: what it has in flight anyway, about
// 1 us. Only for groups wider than the narrowest; the narrowest may exceed it.
constexpr int64_t kMaxExchangeBytes = 32 * 1024;

// Streaming: two blocks per SM, and enough of them to keep this share of the slots busy.
constexpr int64_t kStreamBlocksPerSm = 2;
constexpr double kStreamBalance = 0.85;
// The L2 has two halves, and a line that both sides read may be in both: we count on half of it.
constexpr int64_t kL2Share = 2;
// Each range of groups that the L2 keeps takes two launches, about 4 us, in which memory moves
// 128 KiB per SM. Where the L2 keeps less than that, all groups share one pair of launches.
constexpr int64_t kRangeBytesPerSm = 128 * 1024;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

struct Layout {
  IndexMap map;
  int vector;
  int64_t bins_per_channel;
  std::vector<int64_t> groups;  // channels of a group, to choose from: widest first
};

// The kernels' launch bounds fill an SM's register file: one such block or two of half the size are
// sure to run at once, whatever the compiler needs.
int full_block(const Layout& layout) {
  return max_cuda_threads(layout.map, layout.vector);
}

// Bytes of one channel's input (backward: and gradient) that a resident team holds.
int64_t channel_bytes(const Problem& p) {
  return p.count() * element_size(p.dtype) * operands(p.stage);
}

std::vector<int> vectors(const Problem& p) {
  std::vector<int> fit;
  for (const int v : {8, 4, 1}) {
    const int64_t bytes = v * element_size(p.dtype);
    if (bytes <= 16 && bytes <= std::max<int64_t>(p.alignment, element_size(p.dtype)) &&
        (v == 1 || p.dtype != DType::kFloat64))
      fit.push_back(v);
  }
  return fit;
}

// Channels of the narrowest group of columns: at least kMinSlabBytes wide and in whole mask bytes
// and items, or all channels.
int64_t least_columns_group(const Problem& p, int64_t bins_per_channel) {
  const int64_t unit = kMaskBits / std::gcd<int64_t>(bins_per_channel, kMaskBits);
  const int64_t bytes = unit * bins_per_channel * element_size(p.dtype);
  return std::min(p.c, unit * ceil_div(kMinSlabBytes, bytes));
}

// Multiples of the narrowest group that leave the last group nearly whole.
std::vector<int64_t> column_groups(const Problem& p, int64_t bins_per_channel, int vector) {
  const int64_t least = least_columns_group(p, bins_per_channel);
  const int64_t most = std::min<int64_t>(kMaxGroupBins, int64_t{kMaxCudaThreads} * vector);
  std::vector<int64_t> groups;
  for (int64_t factor = 16; factor > 1; factor /= 2) {
    const int64_t group = std::min(p.c, factor * least);
    const bool fits = group * bins_per_channel <= most && group > factor / 2 * least;
    if (fits && round_up(p.c, group) * 8 <= p.c * 9) groups.push_back(group);
  }
  groups.push_back(least);
  return groups;
}

// Channels of few items share a block, as long as the blocks still fill the GPU.
int64_t row_group(const Problem& p, const CudaInfo& cuda, int vector) {
  const int64_t items = p.n * ceil_div(p.hw, kMaskBits) * (kMaskBits / vector);
  constexpr int kThreads = kMaxCudaThreads / 2;
  int64_t group = kThreads / kWarpThreads;
  while (group > 1 &&
         (group * items > kThreads * kMinItemsPerThread || ceil_div(p.c, group) < cuda.sms))
    group /= 2;
  return group;
}

// The widest vector that divides rows of memory, and with it the index map: rows of odd length
// (7x7) are wide when several channels are taken as columns.
Layout choose_layout(const Problem& p, const CudaInfo& cuda) {
  for (const int v : vectors(p)) {
    if (p.channels_last) {
      if (p.c % v == 0) return {IndexMap::kColumns, v, 1, column_groups(p, 1, v)};
      continue;
    }
    const bool rows = p.hw % v == 0, is_short = p.hw * element_size(p.dtype) < kMinRowBytes;
    const bool columns = !p.has_mask && p.c * p.hw % v == 0 && p.hw <= kMaxGroupBins &&
                         least_columns_group(p, p.hw) * p.hw <= kMaxGroupBins;
    if (columns && (is_short || !rows))
      return {IndexMap::kColumns, v, p.hw, column_groups(p, p.hw, v)};
    if (rows) return {IndexMap::kRows, v, 1, {row_group(p, cuda, v)}};
  }
  throw std::invalid_argument("bnext: no vector divides the rows");  // 1 does
}

// The width at which a team's blocks own about the same, with no more segments than that takes.
int64_t choose_segment_width(const Problem& p, int64_t team_blocks) {
  int64_t best = 0, least = 0;
  for (int64_t segments = ceil_div(p.hw, kMaxSegmentWidth);; segments *= 2) {
    const int64_t width = segments == 1 ? p.hw : round_up(ceil_div(p.hw, segments), kSegmentUnit);
    const int64_t rows = p.n * ceil_div(p.hw, width);
    const int64_t elements = ceil_div(rows, team_blocks) * team_blocks * round_up(width, kMaskBits);
    if (!best || elements < least) best = width, least = elements;
    if (elements * 16 <= p.count() * 17 || width <= kSegmentUnit) return best;
  }
}

int64_t shared_bytes(const CudaPlan& plan, const Problem& p) {
  const int64_t element = element_size(p.dtype), compute = p.dtype == DType::kFloat64 ? 8 : 4;
  return round_up(operands(p.stage) * plan.items_per_thread * plan.threads * plan.vector * element,
                  16) +
         round_up(kJoinBins * kPartialBytes, 16) + round_up(plan.group_bins() * kPartialBytes, 16) +
         round_up(plan.group * kCoefficients * compute, 16);
}

// Items a thread owns, where a block owns `rows` of `row_items` items for each channel or column.
int64_t items_of_thread(const CudaPlan& plan, int64_t row_items, int64_t threads) {
  return plan.map == IndexMap::kRows
             ? ceil_div(plan.rows_per_block * row_items, threads / plan.group)
             : ceil_div(plan.rows_per_block, threads / plan.columns);
}

// Uses fewer threads, down to three quarters, where that leaves fewer slots of the slab empty.
void fit_threads(CudaPlan& plan, int64_t row_items) {
  const int most = plan.threads;
  int64_t least_slots = 0;
  for (int threads = most; threads * 4 >= most * 3; threads -= kWarpThreads) {
    if (threads % (kWarpThreads * plan.group) != 0 && plan.map == IndexMap::kRows) continue;
    if (threads < plan.columns) break;
    const int64_t items = items_of_thread(plan, row_items, threads);
    if (least_slots && items * threads >= least_slots) continue;
    least_slots = items * threads;
    plan.threads = threads;
    plan.items_per_thread = items;
  }
}

// Cuts the work into groups of `group` channels for teams of `team_blocks`. The caller sets the
// family, the kind of team and what goes with them.
CudaPlan cut(const Problem& p, const Layout& layout, int64_t group, int64_t team_blocks,
             int threads, bool resident) {
  CudaPlan plan{};
  plan.map = layout.map;
  plan.vector = layout.vector;
  plan.threads = threads;
  plan.bins_per_channel = layout.bins_per_channel;
  plan.group = group;
  plan.groups = ceil_div(p.c, group);
  plan.team_blocks = team_blocks;
  plan.segments = 1;
  if (layout.map == IndexMap::kRows) {
    plan.segment_width = group > 1 ? p.hw : choose_segment_width(p, team_blocks);
    plan.segments = ceil_div(p.hw, plan.segment_width);
    plan.rows = p.n * plan.segments;
  } else {
    plan.rows = p.channels_last ? p.count() : p.n;
    plan.columns = round_up(plan.group_bins(), kMaskBits) / plan.vector;
    if (plan.columns > threads) plan.threads = full_block(layout);
  }
  plan.rows_per_block = ceil_div(plan.rows, team_blocks);
  if (resident)
    fit_threads(plan, ceil_div(plan.segment_width, kMaskBits) * (kMaskBits / plan.vector));
  plan.shared_bytes = shared_bytes(plan, p);
  plan.launches = 1;
  plan.groups_per_launch = plan.groups;
  return plan;
}

// The share of the slots that are busy when all blocks run in whole waves.
double balance(int64_t blocks, int64_t slots) {
  return static_cast<double>(blocks) / static_cast<double>(round_up(blocks, slots));
}

int64_t exchange_bytes(const CudaPlan& plan) {
  return plan.team_blocks > 1 ? plan.team_blocks * plan.group * kPartialBytes : 0;
}

using Found = std::optional<CudaPlan>;

// Teams of one block or a cluster, of [least, most] blocks: the smallest that leave room for two
// blocks per SM and keep enough SMs busy, else the busiest.
Found resident_in_clusters(const Problem& p, const Layout& layout, const CudaInfo& cuda,
                           int64_t least, int64_t most) {
  struct Size {
    int64_t shared_bytes;
    int threads;
    int64_t least, most;
  };
  const int64_t full = cuda.shared_bytes_per_block;
  const int64_t half = std::min(full, cuda.shared_bytes_per_sm / 2 - kReservedSharedBytes);
  for (const Size& size : {Size{half, full_block(layout) / 2, 1, kPortableClusterBlocks},
                           Size{full, full_block(layout), 1, kPortableClusterBlocks},
                           Size{full, full_block(layout), kLargeClusterBlocks, most}}) {
    Found best;
    double best_balance = 0;
    for (int64_t blocks = std::max(least, size.least); blocks <= std::min(most, size.most);
         blocks *= 2) {
      for (const int64_t group : layout.groups) {
        const int64_t block_bytes = channel_bytes(p) * group / blocks;
        if (block_bytes > size.shared_bytes || (best && block_bytes < kMinBlockBytes)) continue;
        CudaPlan plan = cut(p, layout, group, blocks, size.threads, true);
        const bool exchanges_much =
            exchange_bytes(plan) > kMaxExchangeBytes && group != layout.groups.back();
        if (plan.shared_bytes > size.shared_bytes || exchanges_much) continue;
        plan.family = Family::kResident;
        plan.team = blocks == 1 ? Team::kBlock : Team::kCluster;
        plan.teams = std::min(plan.groups, kMaxBlocks / blocks);
        const double busy = balance(plan.groups * blocks, cuda.sms);
        if (busy >= kEnoughBalance) return plan;
        if (!best || busy > best_balance) best = plan, best_balance = busy;
      }
    }
    if (best) return best;
  }
  return std::nullopt;
}

// Teams of as many blocks as there are SMs to share, one block each, because a cooperative launch
// fails rather than let some of its blocks wait. A block holds at least `least_bytes`.
Found resident_in_grid(const Problem& p, const Layout& layout, const CudaInfo& cuda,
                       int64_t least_bytes) {
  for (const int64_t group : layout.groups) {
    const auto plan_for = [&](int64_t blocks) {
      return cut(p, layout, group, blocks, full_block(layout), true);
    };
    const auto fits = [&](int64_t blocks) {
      return plan_for(blocks).shared_bytes <= cuda.shared_bytes_per_block;
    };
    const int64_t bytes = channel_bytes(p) * group, groups = ceil_div(p.c, group);
    int64_t least = ceil_div(bytes, cuda.shared_bytes_per_block);
    while (least <= cuda.sms && !fits(least)) ++least;
    if (least > cuda.sms) continue;
    const int64_t turns = ceil_div(groups, cuda.sms / least), teams = ceil_div(groups, turns);
    int64_t blocks = std::clamp(bytes / least_bytes, least, cuda.sms / teams);
    while (blocks > least && !fits(blocks)) --blocks;
    CudaPlan plan = plan_for(blocks);
    plan.team_blocks = ceil_div(plan.rows, plan.rows_per_block);  // none without rows
    if (exchange_bytes(plan) > kMaxExchangeBytes && group != layout.groups.back()) continue;
    plan.family = Family::kResident;
    plan.team = Team::kGrid;
    plan.teams = teams;
    plan.workspace_bytes = 2 * teams * plan.team_blocks * plan.group * kPartialBytes;
    return plan;
  }
  return std::nullopt;
}

Found resident(const Problem& p, const Layout& layout, const CudaInfo& cuda,
               std::optional<Team> team) {
  const int64_t most = cuda.max_cluster_blocks;
  if (team == Team::kBlock) return resident_in_clusters(p, layout, cuda, 1, 1);
  if (team == Team::kCluster) return resident_in_clusters(p, layout, cuda, 2, most);
  if (team == Team::kGrid) return resident_in_grid(p, layout, cuda, 1);
  const Found clusters = resident_in_clusters(p, layout, cuda, 1, most);
  if (clusters) {
    const int64_t block_bytes = channel_bytes(p) * clusters->group / clusters->team_blocks;
    const bool busy = balance(clusters->groups * clusters->team_blocks, cuda.sms) >= kPoorBalance;
    if (busy || block_bytes < kGridMinBlockBytes) return clusters;
  }
  const Found grid = resident_in_grid(p, layout, cuda, kMinBlockBytes);
  return grid ? grid : clusters;
}

// How many blocks each of `groups` groups gets, to fill the slots.
int64_t choose_splits(int64_t groups, int64_t slots, int64_t most) {
  const int64_t least = std::clamp<int64_t>(slots / groups, 1, most);
  int64_t best = least;
  for (int64_t splits = least; splits <= std::min(most, 4 * least); ++splits) {
    if (balance(groups * splits, slots) > balance(groups * best, slots)) best = splits;
    if (balance(groups * best, slots) >= kStreamBalance) break;
  }
  return best;
}

// Streaming, and elementwise where nothing is reduced.
CudaPlan streaming(const Problem& p, const Layout& layout, const CudaInfo& cuda) {
  const bool reduces = is_training(p.stage) || (is_backward(p.stage) && p.need_params);
  const bool rereads = is_training(p.stage) && p.applies();
  const int64_t kept = cuda.l2_bytes / kL2Share;
  const bool in_ranges = rereads && p.bytes_read() > kept && kept >= kRangeBytesPerSm * cuda.sms;
  const auto plan_for = [&](int64_t group, int64_t slots) {
    const int64_t bytes = channel_bytes(p) * group, groups = ceil_div(p.c, group);
    const int64_t most = in_ranges ? std::clamp<int64_t>(kept / bytes, 1, groups) : groups;
    const int64_t ranges = ceil_div(groups, most), launched = ceil_div(groups, ranges);
    const int64_t splits =
        choose_splits(launched, slots, std::max<int64_t>(1, bytes / kMinBlockBytes));
    CudaPlan plan = cut(p, layout, group, splits, full_block(layout), false);
    plan.team_blocks = ceil_div(plan.rows, plan.rows_per_block);  // none without rows
    plan.groups_per_launch = plan.teams = launched;
    // Without a second read there are two: the sums, then the gradients of the parameters.
    plan.launches = !reduces ? 1 : rereads ? 2 * ranges : 2;
    return plan;
  };
  const auto choose = [&] {  // the widest slabs that fill the GPU and exchange little
    for (const int64_t slots : {kStreamBlocksPerSm * cuda.sms, int64_t{cuda.sms}})
      for (const int64_t group : layout.groups) {
        const CudaPlan plan = plan_for(group, slots);
        const bool busy = balance(plan.teams * plan.team_blocks, slots) >= kPoorBalance;
        if (busy && !(reduces && exchange_bytes(plan) > kMaxExchangeBytes)) return plan;
      }
    return plan_for(layout.groups.back(), cuda.sms);
  };
  CudaPlan plan = choose();
  plan.team = Team::kStream;
  plan.family = reduces ? Family::kStreaming : Family::kElementwise;
  if (reduces) plan.workspace_bytes = plan.teams * plan.team_blocks * plan.group * kPartialBytes;
  if (rereads) plan.bytes_moved = std::max<int64_t>(0, p.bytes_read() - plan.launches / 2 * kept);
  return plan;
}

}  // namespace

CudaPlan plan_cuda(const Problem& p, const CudaInfo& cuda, const CudaChoice& choice) {
  const Layout layout = choose_layout(p, cuda);
  const bool can_be_resident = is_training(p.stage) && p.applies();
  const bool must_be_resident = choice.family == Family::kResident || choice.team;
  if (choice.family == Family::kStreaming && choice.team)
    throw std::invalid_argument(
        "bnext: BNEXT_CUDA_TEAM is of the resident family, but BNEXT_CUDA_FAMILY=streaming");
  Found plan;
  if (can_be_resident && choice.family != Family::kStreaming) {
    plan = resident(p, layout, cuda, choice.team);
    if (!plan && must_be_resident)
      throw std::invalid_argument(
          (choice.team ? "bnext: BNEXT_CUDA_TEAM=" + to_string(*choice.team)
                       : std::string("bnext: BNEXT_CUDA_FAMILY=resident")) +
          ": [" + std::to_string(p.n) + ", " + std::to_string(p.c) + ", " + std::to_string(p.hw) +
          "], " + to_string(p.dtype) + ", " + to_string(p.stage) + ", does not fit a GPU of " +
          std::to_string(cuda.sms) + " SMs with " + std::to_string(cuda.shared_bytes_per_block) +
          " bytes of shared memory a block, in clusters of at most " +
          std::to_string(cuda.max_cluster_blocks));
  }
  if (!plan) plan = streaming(p, layout, cuda);
  plan->bytes_floor = p.bytes_floor();
  plan->bytes_moved += plan->bytes_floor;
  return *plan;
}

CudaChoice cuda_choice_of_environment() {
  CudaChoice choice;
  const auto ask = [](const char* name, auto& chosen, auto first, auto last) {
    const char* asked = std::getenv(name);
    if (asked && *asked) chosen = parse(name, asked, first, last);
  };
  ask("BNEXT_CUDA_FAMILY", choice.family, Family::kResident, Family::kStreaming);
  ask("BNEXT_CUDA_TEAM", choice.team, Team::kBlock, Team::kGrid);
  return choice;
}

}  // namespace bnext
