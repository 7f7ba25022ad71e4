// Finds the kernel instantiation for a plan. Included by the launch files, one per direction.
#pragma once

#include "elements.cuh"
#include "launch.h"

namespace bnext {

// Kernels are compiled for accesses of 8, 4 and 1 elements, of at most 16 bytes.
template <class T, class F>
inline cudaError_t with_vector(int vector, const F& f) {
  if constexpr (sizeof(T) == 2) {
    if (vector == 8) return f(Constant<8>{});
  }
  if constexpr (sizeof(T) <= 4) {
    if (vector == 4) return f(Constant<4>{});
  }
  return vector == 1 ? f(Constant<1>{}) : cudaErrorInvalidValue;
}

// f(vector, index map, how rows end)
template <class T, class F>
inline cudaError_t with_items(const CudaPlan& plan, const F& f) {
  return with_vector<T>(plan.vector, [&](auto vector) {
    const auto with = [&](auto ends) {
      if (plan.map == IndexMap::kRows) return f(vector, Constant<IndexMap::kRows>{}, ends);
      return f(vector, Constant<IndexMap::kColumns>{}, ends);
    };
    if (plan.ends == Ends::kRagged) return with(Constant<Ends::kRagged>{});
    return with(Constant<Ends::kWhole>{});
  });
}

inline LaunchShape shape_of(const CudaPlan& plan, int64_t groups) {
  return {groups * plan.team_blocks, plan.threads, plan.shared_bytes,
          plan.team == Team::kCluster ? static_cast<int>(plan.team_blocks) : 1,
          plan.team == Team::kGrid};
}

// Of the blocks of streaming teams, the first.
inline LaunchShape one_block_each(LaunchShape shape, int64_t groups) {
  shape.blocks = groups;
  return shape;
}

// f(first group, number of groups) for each range of groups that the L2 keeps, until an error.
template <class F>
inline cudaError_t for_each_range(const CudaPlan& plan, const F& f) {
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < plan.groups && error == cudaSuccess;
       first += plan.groups_per_launch) {
    const int64_t left = plan.groups - first;
    error = f(first, left < plan.groups_per_launch ? left : plan.groups_per_launch);
  }
  return error;
}

template <class T>
cudaError_t launch_as(const CudaPlan& plan, const Problem& problem, const ForwardArgs& args,
                      void* workspace, void* stream);
template <class T>
cudaError_t launch_as(const CudaPlan& plan, const Problem& problem, const BackwardArgs& args,
                      void* workspace, void* stream);
template <class T>
cudaError_t launch_as(const CudaPlan& plan, const Problem& problem, const DoubleBackwardArgs& args,
                      void* workspace, void* stream);

}  // namespace bnext
