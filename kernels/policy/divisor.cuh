// Division by a number that stays the same for many dividends: one multiplication, one addition,
// one shift. (Granlund and Montgomery, "Division by invariant integers using multiplication",
// 1994.)
#ifndef HYBRIDKV_POLICY_DIVISOR_CUH_
#define HYBRIDKV_POLICY_DIVISOR_CUH_

#include <stdint.h>

// Divides numbers below 2^31 by `value`, which is 1 to 2^31 - 1.
struct Divisor {
  uint32_t value;
  uint32_t multiplier;
  uint32_t shift;

  static __device__ inline Divisor of(uint32_t value) {
    const uint32_t shift = 32 - __clz(value - 1);
    const uint64_t above = ((1ull << shift) - value) << 32;
    return Divisor{value, static_cast<uint32_t>(above / value + 1), shift};
  }

  __device__ inline uint32_t quotient(uint32_t dividend) const {
    return (__umulhi(dividend, multiplier) + dividend) >> shift;
  }
};

#endif  // HYBRIDKV_POLICY_DIVISOR_CUH_
