// The online softmax: logits, the running state of a row, and how states are closed.
//
// A score x is a raw product q . k, or its tanh under a soft cap; one factor makes it a logit in
// log2 units: exp(logit) = 2^(x * factor). The state of a row over the keys seen so far is
//   max     a bound on the logits in log2 units: at most kSlackLog2 below the largest (-inf: no key
//   yet) sum     sum of 2^(x * factor - max), over the unrounded weights output  sum of 2^(x *
//   factor - max) * v, kept by the caller
// The maximum is only moved when a logit exceeds it by more than the slack, so that most tiles need
// no rescaling; weights stay below 2^kSlackLog2 and the final division makes the result exact.
#ifndef HYBRIDKV_POLICY_SOFTMAX_STATE_CUH_
#define HYBRIDKV_POLICY_SOFTMAX_STATE_CUH_

#include "../ptx/math.cuh"

namespace hkv {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kSlackLog2 = 8.0f;

class LogitScale {
 public:
  LogitScale() = default;
  __device__ LogitScale(float sm_scale, float soft_cap) {
    capped_ = soft_cap > 0.0f;
    inner_ = capped_ ? 2.0f * kLog2e * sm_scale / soft_cap : 0.0f;
    factor_ = (capped_ ? soft_cap : sm_scale) * kLog2e;
  }

  __device__ bool capped() const { return capped_; }
  // The score of a product under the soft cap: tanh(product * sm_scale / cap), to fp32 rounding.
  __device__ float cap(float product) const {
    return 1.0f - 2.0f * rcp(1.0f + ex2(inner_ * product));
  }
  // The logit of a score in log2 units.
  __device__ float logit(float score) const { return score * factor_; }
  // 2^(logit - max) for a score, 0 for a masked one (-inf), also when nothing has been seen.
  __device__ float weight(float score, float max) const {
    return ex2(fmaf(score, factor_, max == -INFINITY ? 0.0f : -max));
  }

 private:
  bool capped_;
  float inner_;   // log2 units of 2 * product / cap
  float factor_;  // log2 units of a logit per unit of score
};

// Whether a logit is too far above the maximum of a state for its weight.
__device__ __forceinline__ bool exceeds(float logit, float max) { return logit > max + kSlackLog2; }

// What a state is to be multiplied with when its maximum moves up from `old_max`.
__device__ __forceinline__ float rescale(float old_max, float new_max) {
  return new_max == -INFINITY ? 0.0f : ex2(old_max - new_max);
}

// A closed row: what its output sum is to be multiplied with, and its natural-log LSE.
struct ClosedRow {
  float scale;
  float lse;

  // Closes a state of maximum `max` and sum `sum`. A learned sink adds
  // exp(sink) to the denominator; sink = -inf adds nothing.
  __device__ ClosedRow(float max, float sum, float sink) {
    const float top = fmaxf(max, sink * kLog2e);
    if (top == -INFINITY) {
      scale = 0.0f;
      lse = -INFINITY;
      return;
    }
    const float keep = ex2(max - top);
    const float total = fmaf(sum, keep, ex2(sink * kLog2e - top));
    scale = keep / total;
    lse = kLn2 * top + logf(total);
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_SOFTMAX_STATE_CUH_
