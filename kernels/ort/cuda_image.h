/* Which of the cubins and PTX files beside the library a device runs; the same choice as kernels/cuda/load.py. */
#ifndef PAREDOWN_ORT_CUDA_IMAGE_H
#define PAREDOWN_ORT_CUDA_IMAGE_H

#include "cuda_launch.h"

namespace paredown::ort::cuda {

/* The code of a unit for a device of this compute capability (87), with a driver of CUDA `driver` (12060), ready for
 * cuModuleLoadData. Failure says what there is instead, and how to build it. */
std::string find_image(const Unit &unit, int capability, int driver);

}  // namespace paredown::ort::cuda

#endif
