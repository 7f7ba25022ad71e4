#include "launch_forward.cuh"

template cudaError_t bnext::launch_forward_as<double>(const bnext::CudaPlan&, const bnext::Problem&,
                                                      const bnext::ForwardArgs&, void*, void*);
