// The GPU driver for float16.
#define RNNFAST_DEVICE
#define RNNFAST_ISA cuda
#include "driver.h"

namespace rnnfast {
void fill_cuda_drivers(Driver<float, Half>* drivers) {
  fill_device_drivers<float, Half>(drivers);
}
}  // namespace rnnfast
