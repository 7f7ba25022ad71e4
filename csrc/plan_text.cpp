// Plans in words, and the words by which the environment chooses one. Includes the standard library
// only.
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "plan.h"

namespace bnext {

std::string to_string(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "default";
}

std::string to_string(Family family) {
  return family == Family::kResident    ? "resident"
         : family == Family::kStreaming ? "streaming"
                                        : "elementwise";
}

std::string to_string(IndexMap map) {
  return map == IndexMap::kRows ? "rows" : "columns";
}

std::string to_string(const CpuPlan& p) {
  std::ostringstream out;
  out << "CpuPlan(family=" << to_string(p.family) << ", index_map=" << to_string(p.map)
      << ", lanes=" << p.lanes << ", slices=" << p.slices << ", chunks=" << p.chunks
      << ", block=" << p.block << ", tasks=" << p.tasks
      << ", nontemporal_stores=" << (p.nontemporal_stores ? "True" : "False")
      << ", bytes_moved=" << p.bytes_moved << ", bytes_floor=" << p.bytes_floor << ")";
  return out.str();
}

CudaChoice cuda_choice_of_environment() {
  const auto ask = [](const char* name, auto values, auto& choice, const char* expected) {
    const char* asked = std::getenv(name);
    if (!asked || !*asked) return;
    for (const auto value : values)
      if (to_string(value) == asked) {
        choice = value;
        return;
      }
    throw std::invalid_argument("bnext: " + std::string(name) + ": expected " + expected +
                                ", got \"" + asked + "\"");
  };
  CudaChoice choice;
  ask("BNEXT_CUDA_FAMILY", std::vector{Family::kResident, Family::kStreaming}, choice.family,
      "resident or streaming");
  ask("BNEXT_CUDA_TEAM", std::vector{Team::kBlock, Team::kCluster, Team::kGrid}, choice.team,
      "block, cluster or grid");
  return choice;
}

std::string to_string(Team team) {
  return team == Team::kBlock     ? "block"
         : team == Team::kCluster ? "cluster"
         : team == Team::kGrid    ? "grid"
                                  : "stream";
}

std::string to_string(const CudaPlan& p) {
  std::ostringstream out;
  out << "CudaPlan(family=" << to_string(p.family) << ", index_map=" << to_string(p.map)
      << ", team=" << to_string(p.team) << ", vector=" << p.vector << ", threads=" << p.threads
      << ", group=" << p.group << ", groups=" << p.groups << ", team_blocks=" << p.team_blocks
      << ", teams=" << p.teams << ", rows=" << p.rows << ", segment_width=" << p.segment_width
      << ", rows_per_block=" << p.rows_per_block << ", items_per_thread=" << p.items_per_thread
      << ", launches=" << p.launches << ", shared_bytes=" << p.shared_bytes
      << ", workspace_bytes=" << p.workspace_bytes << ", bytes_moved=" << p.bytes_moved
      << ", bytes_floor=" << p.bytes_floor << ")";
  return out.str();
}

}  // namespace bnext
