// The online softmax: logits, the running state of a row, and how states are closed.
//
// A score x is a raw product q . k, or its tanh under a soft cap; one factor makes it a logit in
// log2 units: exp(logit) = 2^(x * factor). The state of a row over the keys seen so far is
//   base    kLiftLog2 below the largest logit of some moment, in log2 units (-inf: no key yet)
//   sum     sum of 2^(x * factor - base), over the unrounded weights
//   output  sum of 2^(x * factor - base) * v, kept by the caller
// The base is only moved when a weight would exceed 2^kMostLog2, so that most tiles need no
// rescaling; the final division makes the result exact. The largest weight is at least 2^kLiftLog2:
// what is lost when weights are rounded to f16 (up to 2^-25 each) is less than 10M * 2^-36 of the
// whole.
#ifndef HYBRIDKV_POLICY_SOFTMAX_STATE_CUH_
#define HYBRIDKV_POLICY_SOFTMAX_STATE_CUH_

#include "../ptx/math.cuh"

namespace hkv {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLiftLog2 = 11.0f;
constexpr float kMostLog2 = 15.0f;  // of f16's 16

class LogitScale {
 public:
  LogitScale() = default;
  __device__ LogitScale(float sm_scale, float soft_cap) {
    capped_ = soft_cap > 0.0f;
    inner_ = capped_ ? 2.0f * kLog2e * sm_scale / soft_cap : 0.0f;
    factor_ = (capped_ ? soft_cap : sm_scale) * kLog2e;
  }

  // Takes in a factor of the products.
  __device__ void multiply(float factor) {
    inner_ *= factor;
    if (!capped_) factor_ *= factor;
  }

  __device__ bool capped() const { return capped_; }
  // The score of a product under the soft cap: tanh(product * sm_scale / cap), to fp32 rounding.
  __device__ float cap(float product) const {
    return 1.0f - 2.0f * rcp(1.0f + ex2(inner_ * product));
  }
  // The logit of a score in log2 units.
  __device__ float logit(float score) const { return score * factor_; }
  // 2^(logit - base) for a score, 0 for a masked one (-inf), also when nothing has been seen.
  __device__ float weight(float score, float base) const {
    return ex2(fmaf(score, factor_, base == -INFINITY ? 0.0f : -base));
  }

 private:
  bool capped_;
  float inner_;   // log2 units of 2 * product / cap
  float factor_;  // log2 units of a logit per unit of score
};

// Whether a logit is too far above the base of a state for its weight.
__device__ __forceinline__ bool exceeds(float logit, float base) {
  return logit > base + kMostLog2;
}

// The base for a state whose largest logit is `top`; never below the old one.
__device__ __forceinline__ float raised(float old_base, float top) {
  return fmaxf(old_base, top - kLiftLog2);
}

// What a state is to be multiplied with when its base moves up from `old_base`.
__device__ __forceinline__ float rescale(float old_base, float new_base) {
  return new_base == -INFINITY ? 0.0f : ex2(old_base - new_base);
}

// A closed row: what its output sum is to be multiplied with, and its natural-log LSE.
struct ClosedRow {
  float scale;
  float lse;

  // Closes a state of base `base` and sum `sum`. A learned sink adds
  // exp(sink) to the denominator; sink = -inf adds nothing.
  __device__ ClosedRow(float base, float sum, float sink) {
    const float top = fmaxf(base, sink * kLog2e);
    if (top == -INFINITY) {
      scale = 0.0f;
      lse = -INFINITY;
      return;
    }
    const float keep = ex2(base - top);
    const float total = fmaf(sum, keep, ex2(sink * kLog2e - top));
    scale = keep * rcp(total);
    lse = kLn2 * top + logf(total);
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_SOFTMAX_STATE_CUH_
