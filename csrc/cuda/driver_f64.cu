// The GPU driver for float64.
#define RNNFAST_DEVICE
#define RNNFAST_ISA cuda
#include "driver.h"

namespace rnnfast {
void fill_cuda_drivers(Driver<double, double>* drivers) {
  fill_device_drivers<double, double>(drivers);
}
}  // namespace rnnfast
