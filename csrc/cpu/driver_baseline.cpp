// The CPU driver for every processor the compiler's default flags serve: 16-byte vectors (SSE2, NEON, …).
#define RNNFAST_ISA baseline
namespace rnnfast {
inline namespace RNNFAST_ISA {
#if defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
#include "table.h"

namespace rnnfast {
const DriverTable& baseline_drivers() {
  static const DriverTable table = make_table("baseline");
  return table;
}
}  // namespace rnnfast
