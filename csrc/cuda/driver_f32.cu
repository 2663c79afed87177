// The GPU driver for float32.
#define RNNFAST_DEVICE
#define RNNFAST_ISA cuda
#include "driver.h"

namespace rnnfast {
void fill_cuda_drivers(Driver<float, float>* drivers) {
  fill_device_drivers<float, float>(drivers);
}
}  // namespace rnnfast
