// The CPU driver for avx2; the build gives this file that instruction set's flags.
#define RNNFAST_ISA avx2
namespace rnnfast {
inline namespace RNNFAST_ISA {
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
}
}  // namespace rnnfast
#include "table.h"

namespace rnnfast {
const DriverTable& avx2_drivers() {
  static const DriverTable table = make_table("avx2");
  return table;
}
}  // namespace rnnfast
