// The drivers of bfloat16 for processors of avx512 that have products of it; the build gives this file their flags.
#define RNNFAST_ISA avx512_bf16
namespace rnnfast {
inline namespace RNNFAST_ISA {
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
}
}  // namespace rnnfast
#include "driver.h"

namespace rnnfast {
void add_bf16_drivers(DriverTable& table) {
  make_drivers(table.bf16);
}
}  // namespace rnnfast
