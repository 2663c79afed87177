#include "binding.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

namespace rnnfast {
namespace {

cudaDataType_t cuda_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return CUDA_R_64F;
    case at::kHalf:
      return CUDA_R_16F;
    case at::kBFloat16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_32F;
  }
}

}  // namespace

Device describe_device(int index, at::ScalarType element) {
  const int count = c10::cuda::device_count();
  TORCH_CHECK_VALUE(index >= 0 && index < count, "device: expected one of ", count, " CUDA devices, got ", index);
  const cudaDeviceProp& properties = *at::cuda::getDeviceProperties(static_cast<c10::DeviceIndex>(index));
  Device device{};
  device.capability = properties.major * 10 + properties.minor;
  device.multiprocessors = properties.multiProcessorCount;
  device.block_memory = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  // What torch's own RNNs ask: torch.backends.cudnn.rnn.fp32_precision, and the settings above it.
  device.tf32 =
      element == at::kFloat && properties.major >= 8 && at::globalContext().allowTF32CuDNN(at::Float32Op::RNN);
  return device;
}

CudaDevice::CudaDevice(at::ScalarType element, Device& device) : element_(element) {
  const c10::DeviceIndex index = c10::cuda::current_device();
  C10_CUDA_CHECK(
      c10::cuda::SetDevice(index, true));  // cuBLAS wants a context, which autograd's thread may not have yet
  const Device described = describe_device(index, element);
  stream_ = c10::cuda::getCurrentCUDAStream().stream();
  tf32_ = described.tf32;

  // The handle comes with torch's setting for matrix products, which is not that for RNNs; sums are never in 16 bits.
  const cublasHandle_t handle = at::cuda::getCurrentCUDABlasHandle();
  cublasMath_t before;
  TORCH_CUDABLAS_CHECK(cublasGetMathMode(handle, &before));
  const int mode = CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
  TORCH_CUDABLAS_CHECK(cublasSetMathMode(handle, static_cast<cublasMath_t>(mode)));
  handle_ = handle;
  math_mode_ = before;

  device.capability = described.capability, device.multiprocessors = described.multiprocessors;
  device.block_memory = described.block_memory, device.tf32 = tf32_;
  device.stream = stream_;
  device.gemm = &CudaDevice::multiply;
  device.gemm_context = this;
}

CudaDevice::~CudaDevice() {
  cublasSetMathMode(static_cast<cublasHandle_t>(handle_), static_cast<cublasMath_t>(math_mode_));
}

void CudaDevice::multiply(void* self, const Product& p) {
  const CudaDevice& device = *static_cast<const CudaDevice*>(self);
  if (p.m == 0 || p.n == 0) return;
  const bool is_double = device.element_ == at::kDouble;
  const cudaDataType_t type = cuda_type(device.element_);
  const at::ScalarType result = !p.wide ? device.element_ : is_double ? at::kDouble : at::kFloat;
  if (p.k == 0) {
    const size_t size = c10::elementSize(result);
    if (!p.accumulate)
      C10_CUDA_CHECK(
          cudaMemset2DAsync(p.c, p.ldc * size, 0, p.n * size, p.m, static_cast<cudaStream_t>(device.stream_)));
    return;
  }
  const cublasComputeType_t compute = is_double      ? CUBLAS_COMPUTE_64F
                                      : device.tf32_ ? CUBLAS_COMPUTE_32F_FAST_TF32
                                                     : CUBLAS_COMPUTE_32F;
  // Of the type of the sum.
  const double one = 1, accumulate = p.accumulate ? 1 : 0;
  const float one_f = 1, accumulate_f = p.accumulate ? 1 : 0;
  const void* alpha = is_double ? static_cast<const void*>(&one) : &one_f;
  const void* beta = is_double ? static_cast<const void*>(&accumulate) : &accumulate_f;
  // cuBLAS counts columns first: there our C is its transpose, B^T A^T.
  const auto operation = [](bool transpose) { return transpose ? CUBLAS_OP_T : CUBLAS_OP_N; };
  TORCH_CUDABLAS_CHECK(cublasGemmEx_64(static_cast<cublasHandle_t>(device.handle_), operation(p.transpose_b),
                                       operation(p.transpose_a), p.n, p.m, p.k, alpha, p.b, type,
                                       std::max<int64_t>(p.ldb, 1), p.a, type, std::max<int64_t>(p.lda, 1), beta, p.c,
                                       cuda_type(result), std::max<int64_t>(p.ldc, 1), compute, CUBLAS_GEMM_DEFAULT));
}

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

}  // namespace rnnfast
