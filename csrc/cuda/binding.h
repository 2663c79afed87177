// What a driver of csrc/cuda needs of torch: the current device and stream, and cuBLAS for the products outside our
// kernels. Host C++ that includes torch; the kernels and their launchers do not.
#pragma once

#include <ATen/ATen.h>

#include "../sequence.h"

namespace rnnfast {

// What a call of tensors of dtype `element` has of a device, without its stream and gemm.
Device describe_device(int index, at::ScalarType element);

// Fills all of a Device but active, first_row and lengths, for a call of tensors of dtype `element`. Lives as long as
// the driver runs on the host: its gemm points back to it.
class CudaDevice {
 public:
  CudaDevice(at::ScalarType element, Device& device);
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

 private:
  static void multiply(void* self, const Product& product);

  const at::ScalarType element_;
  void* stream_;   // cudaStream_t
  void* handle_;   // cublasHandle_t
  int math_mode_;  // of the handle before us
  bool tf32_;
};

// Whether work on the current stream is only noted down, to be run later again and again.
bool is_capturing();

}  // namespace rnnfast
