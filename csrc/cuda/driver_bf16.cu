// The GPU driver for bfloat16.
#define RNNFAST_DEVICE
#define RNNFAST_ISA cuda
#include "driver.h"

namespace rnnfast {
void fill_cuda_drivers(Driver<float, BFloat16>* drivers) {
  fill_device_drivers<float, BFloat16>(drivers);
}
}  // namespace rnnfast
