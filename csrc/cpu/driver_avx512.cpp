// The CPU driver for avx512; the build gives this file that instruction set's flags.
#define RNNFAST_ISA avx512
namespace rnnfast {
inline namespace RNNFAST_ISA {
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
}
}  // namespace rnnfast
#include "table.h"

namespace rnnfast {
const DriverTable& avx512_drivers() {
  static const DriverTable table = make_table("avx512");
  return table;
}
}  // namespace rnnfast
