// The CUDA plan and its thresholds. None of them has been measured on a GPU yet; beside each is the
// estimate it rests on. Estimates are for an H200: 132 SMs, 228 KiB of shared memory each, 60 MB of
// L2, 4.2 TB/s reached of 4.8, 700 to 800 ns from a load to its data.
//
// Resident is right wherever it fits: 2E forward and 3E backward against 3E and 5E. The choice left
// is how many blocks share a group of channels. Small teams exchange less; large ones hold more and
// fill the GPU when channels are few. With two blocks per SM one loads while the other stores.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "cut.h"

namespace bnext {
namespace {

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

// Streaming: two blocks of half the threads an SM, or one of all, with a tail of less than this
// share of them.
constexpr int64_t kStreamBlocksPerSm = 2;
constexpr double kStreamBalance = 0.85;
// The L2 has two halves, and a line that both sides read may be in both: we count on half of it.
constexpr int64_t kL2Share = 2;
// Each range of groups that the L2 keeps takes two launches, about 4 us, in which memory moves
// 128 KiB per SM. Where the L2 keeps less than that, all groups share one pair of launches.
constexpr int64_t kRangeBytesPerSm = 128 * 1024;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

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
  for (const Size& size : {Size{half, kMaxCudaThreads / 2, 1, kPortableClusterBlocks},
                           Size{full, kMaxCudaThreads, 1, kPortableClusterBlocks},
                           Size{full, kMaxCudaThreads / 2, 1, kPortableClusterBlocks},
                           Size{full, kMaxCudaThreads, kLargeClusterBlocks, most}}) {
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

// Teams of as many blocks as share out all SMs, one block each: a cooperative launch fails rather
// than let some of its blocks wait. `least_bytes`: of a block.
Found resident_in_grid(const Problem& p, const Layout& layout, const CudaInfo& cuda, int64_t sms,
                       int64_t least_bytes, int threads) {
  for (const int64_t group : layout.groups) {
    const auto plan_for = [&](int64_t blocks) {
      return cut(p, layout, group, blocks, threads, true);
    };
    const auto fits = [&](int64_t blocks) {
      return plan_for(blocks).shared_bytes <= cuda.shared_bytes_per_block;
    };
    const int64_t bytes = channel_bytes(p) * group, groups = ceil_div(p.c, group);
    int64_t least = ceil_div(bytes, cuda.shared_bytes_per_block);
    while (least <= sms && !fits(least)) ++least;
    if (least > sms) continue;
    const int64_t turns = ceil_div(groups, sms / least), teams = ceil_div(groups, turns);
    int64_t blocks = std::clamp(bytes / least_bytes, least, sms / teams);
    while (blocks > least && !fits(blocks)) --blocks;
    CudaPlan plan = plan_for(blocks);
    plan.team_blocks = ceil_div(plan.rows, plan.rows_per_block);  // none without rows
    if (exchange_bytes(plan) > kMaxExchangeBytes && group != layout.groups.back()) continue;
    plan.family = Family::kResident;
    plan.team = Team::kGrid;
    plan.teams = teams;
    plan.workspace_bytes = teams * plan.group * (plan.team_blocks * kPartialBytes + kResultBytes);
    return plan;
  }
  return std::nullopt;
}

Found resident(const Problem& p, const Layout& layout, const CudaInfo& cuda,
               const CudaChoice& choice) {
  const int64_t most = cuda.max_cluster_blocks;
  const std::optional<Team> team = choice.team;
  const int64_t sms = std::max<int64_t>(1, cuda.sms - choice.spare_sms);  // of a grid
  if (team == Team::kBlock) return resident_in_clusters(p, layout, cuda, 1, 1);
  if (team == Team::kCluster) return resident_in_clusters(p, layout, cuda, 2, most);
  const auto grid_of = [&](int64_t least_bytes) {
    const Found grid = resident_in_grid(p, layout, cuda, sms, least_bytes, kMaxCudaThreads);
    if (grid || !layout.interleaved) return grid;
    // Its sums take up to 128 bytes of each thread.
    return resident_in_grid(p, layout, cuda, sms, least_bytes, kMaxCudaThreads / 2);
  };
  if (team == Team::kGrid) return grid_of(1);
  const Found clusters = resident_in_clusters(p, layout, cuda, 1, most);
  if (clusters) {
    const int64_t block_bytes = channel_bytes(p) * clusters->group / clusters->team_blocks;
    const bool busy = balance(clusters->groups * clusters->team_blocks, cuda.sms) >= kPoorBalance;
    if (busy || block_bytes < kGridMinBlockBytes) return clusters;
  }
  const Found grid = grid_of(kMinBlockBytes);
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
  // Sums, the gradients of the parameters, then dx.
  const bool in_three = reduces && !is_training(p.stage) && p.applies() && layout.is_sliced();
  const int64_t kept = cuda.l2_bytes / kL2Share;
  const bool in_ranges = rereads && p.bytes_read() > kept && kept >= kRangeBytesPerSm * cuda.sms;
  const auto plan_for = [&](int64_t group, int64_t slots) {
    const int64_t bytes = channel_bytes(p) * group, groups = ceil_div(p.c, group);
    const int64_t most = in_ranges ? std::clamp<int64_t>(kept / bytes, 1, groups) : groups;
    const int64_t ranges = ceil_div(groups, most), launched = ceil_div(groups, ranges);
    const int64_t splits =
        choose_splits(launched, slots, std::max<int64_t>(1, bytes / kMinBlockBytes));
    const int half = kMaxCudaThreads / 2;
    CudaPlan plan = cut(p, layout, group, splits, slots > cuda.sms ? half : kMaxCudaThreads, false);
    if (plan.shared_bytes > cuda.shared_bytes_per_block)
      plan = cut(p, layout, group, splits, half, false);
    plan.team_blocks = ceil_div(plan.rows, plan.rows_per_block);  // none without rows
    plan.groups_per_launch = plan.teams = launched;
    // Without a second read there are two: the sums, then the gradients of the parameters.
    plan.launches = !reduces ? 1 : in_three ? 3 : rereads ? 2 * ranges : 2;
    return plan;
  };
  const auto choose = [&] {  // the widest slabs that fill the GPU and exchange little
    for (const int64_t slots : {kStreamBlocksPerSm * cuda.sms, int64_t{cuda.sms}})
      for (const int64_t group : layout.groups) {
        const CudaPlan plan = plan_for(group, slots);
        const bool busy = balance(plan.teams * plan.team_blocks, slots) >= kPoorBalance;
        const bool fits = plan.shared_bytes <= cuda.shared_bytes_per_block;
        if (fits && busy && !(reduces && exchange_bytes(plan) > kMaxExchangeBytes)) return plan;
      }
    return plan_for(layout.groups.back(), cuda.sms);
  };
  CudaPlan plan = choose();
  plan.team = Team::kStream;
  plan.family = reduces ? Family::kStreaming : Family::kElementwise;
  const int64_t partial =
      p.stage == Stage::kDoubleBackward ? kDoubleBackwardPartialBytes : kPartialBytes;
  if (reduces) plan.workspace_bytes = plan.teams * plan.team_blocks * plan.group * partial;
  if (rereads) plan.bytes_moved = std::max<int64_t>(0, p.bytes_read() - plan.launches / 2 * kept);
  if (in_three) plan.bytes_moved = std::max<int64_t>(0, p.bytes_read() - kept);
  return plan;
}

}  // namespace

CudaPlan plan_cuda(const Problem& p, const CudaInfo& cuda, const CudaChoice& choice) {
  const Layout layout = choose_layout(p, cuda);
  // The backward that activations share has no registers left for slices in one kernel.
  const bool shares_kernels = !has_gate_of_its_own(p) || layout.vector == 1;
  const bool has_kernel = !(layout.is_sliced() && is_backward(p.stage) && shares_kernels);
  const bool can_be_resident =
      is_training(p.stage) && p.stage != Stage::kDoubleBackward && p.applies() && has_kernel;
  const bool must_be_resident = choice.family == Family::kResident || choice.team;
  if (choice.family == Family::kStreaming && choice.team)
    throw std::invalid_argument(
        "bnext: BNEXT_CUDA_TEAM is of the resident family, but BNEXT_CUDA_FAMILY=streaming");
  Found plan;
  if (can_be_resident && choice.family != Family::kStreaming) {
    plan = resident(p, layout, cuda, choice);
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
  plan->keeps_output = plan->bytes_floor - p.bytes_read() <= cuda.l2_bytes / kL2Share;
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
  if (const char* spare = std::getenv("BNEXT_CUDA_SPARE_SMS"); spare && *spare) {
    char* end;
    const long sms = std::strtol(spare, &end, 10);
    if (*end || sms < 0 || sms > 10000)
      throw std::invalid_argument("bnext: BNEXT_CUDA_SPARE_SMS: expected a number of SMs, got \"" +
                                  std::string(spare) + "\"");
    choice.spare_sms = static_cast<int>(sms);
  }
  return choice;
}

}  // namespace bnext
