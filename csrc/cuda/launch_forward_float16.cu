#include "launch_forward.cuh"

template cudaError_t bnext::launch_forward_as<bnext::float16>(const bnext::CudaPlan&,
                                                              const bnext::Problem&,
                                                              const bnext::ForwardArgs&, void*,
                                                              void*);
