#include "launch_backward.cuh"

template cudaError_t bnext::launch_backward_as<bnext::bfloat16>(const bnext::CudaPlan&,
                                                                const bnext::Problem&,
                                                                const bnext::BackwardArgs&, void*,
                                                                void*);
