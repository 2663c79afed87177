// The table of the CUDA drivers, beside those of the instruction sets.
#include "../sequence.h"

namespace rnnfast {

void fill_cuda_drivers(Driver<float>*);
void fill_cuda_drivers(Driver<double>*);
void fill_cuda_drivers(Driver<float, Half>*);
void fill_cuda_drivers(Driver<float, BFloat16>*);

const DriverTable& cuda_drivers() {
  static const DriverTable table = [] {
    DriverTable t = drivers();  // the same cells
    t.isa = "cuda";
    fill_cuda_drivers(t.f32);
    fill_cuda_drivers(t.f64);
    fill_cuda_drivers(t.f16);
    fill_cuda_drivers(t.bf16);
    t.softmax_f32 = nullptr, t.softmax_f64 = nullptr;
    return t;
  }();
  return table;
}

}  // namespace rnnfast
