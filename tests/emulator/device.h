// A GPU on the CPU, for kernels as they are: included before kernels/*.cu, which a host compiler
// then takes for C++. A thread of a CTA is a fiber, a warp-wide or CTA-wide operation a meeting of
// fibers, and the CTAs of a grid run one after another.
//
// What it is for: the logic of kernels, index arithmetic and layouts where there is no GPU. What it
// cannot show: the speed of anything, and races, since fibers change places only where they meet.
// Copies of cp.async do land late, not before the wait that covers them.
#ifndef HYBRIDKV_EMULATOR_DEVICE_H_
#define HYBRIDKV_EMULATOR_DEVICE_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>

#undef __align__
#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __launch_bounds__
#undef __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __device__
#define __forceinline__ inline
#define __global__ __attribute__((visibility("default")))
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local  // of the OS thread, hence of all fibers of a CTA
#define __CUDA_ARCH__ 900

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

extern thread_local Index cta, ctas, threads;
extern thread_local unsigned thread;

constexpr unsigned kWarp = 32;
constexpr size_t kSharedBytes = 227 << 10;
extern thread_local unsigned char* dynamic_shared;

// Meetings of all lanes of the calling fiber's warp, of all threads of its CTA.
void meet_warp();
void meet_cta();
// Where a lane leaves the address of what it brings to a meeting.
const void*& brought(unsigned lane);

inline unsigned lane() { return thread % kWarp; }

// Gives what `f` makes of the arguments of all lanes.
template <typename Argument, typename F>
auto together(const Argument& mine, F f) {
  brought(lane()) = &mine;
  meet_warp();
  auto result =
      f([](unsigned of) -> const Argument& { return *static_cast<const Argument*>(brought(of)); });
  meet_warp();
  return result;
}

// Shared addresses are distances from here, for variables and the dynamic part alike.
inline const unsigned char* shared_base() {
  static thread_local const unsigned char here = 0;
  return reinterpret_cast<const unsigned char*>((reinterpret_cast<uintptr_t>(&here) & ~1023ull) -
                                                (1u << 31));
}
inline unsigned char* shared_pointer(uint32_t address) {
  return const_cast<unsigned char*>(shared_base()) + address;
}

void copy_later(uint32_t shared, const void* from, unsigned bytes, bool valid);
void commit_copies();
void await_copies(unsigned pending);

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulated kernel: %s, thread %u of CTA %u\n", what, thread, cta.x);
  abort();
}

struct ThreadIndex {
  struct X {
    operator unsigned() const { return thread; }
  } x;
};
inline constexpr ThreadIndex thread_index;

}  // namespace emulator

#define blockDim emulator::threads
#define blockIdx emulator::cta
#define gridDim emulator::ctas
#define threadIdx emulator::thread_index

using std::max;
using std::min;
inline unsigned max(unsigned a, int b) { return max(a, static_cast<unsigned>(b)); }
inline unsigned max(int a, unsigned b) { return max(static_cast<unsigned>(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, static_cast<unsigned>(b)); }
inline unsigned min(int a, unsigned b) { return min(static_cast<unsigned>(a), b); }

inline void __syncthreads() { emulator::meet_cta(); }
inline void __syncwarp(unsigned = ~0u) { emulator::meet_warp(); }

template <typename T>
T __shfl_sync(unsigned, T value, int from, int = 32) {
  return emulator::together(value, [&](auto of) { return of(from & 31); });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
  return emulator::together(value, [&](auto of) { return of(emulator::lane() ^ mask); });
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta, int = 32) {
  const unsigned from = emulator::lane() + delta;
  return emulator::together(value, [&](auto of) { return from < 32 ? of(from) : value; });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta, int = 32) {
  const unsigned lane = emulator::lane();
  return emulator::together(value,
                            [&](auto of) { return lane < delta ? value : of(lane - delta); });
}
template <typename T, typename F>
T reduce(T value, F f) {
  return emulator::together(value, [&](auto of) {
    T all = of(0);
    for (unsigned lane = 1; lane < 32; ++lane) all = f(all, of(lane));
    return all;
  });
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  return reduce(vote ? 1u << emulator::lane() : 0u, [](unsigned a, unsigned b) { return a | b; });
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == ~0u; }
inline int __syncthreads_and(int vote) {
  static thread_local bool all;
  emulator::meet_cta();
  all = true;
  emulator::meet_cta();
  all = all && vote != 0;
  emulator::meet_cta();
  return all;
}
template <typename T>
T __reduce_max_sync(unsigned, T value) {
  return reduce(value, [](T a, T b) { return std::max(a, b); });
}
template <typename T>
T __reduce_min_sync(unsigned, T value) {
  return reduce(value, [](T a, T b) { return std::min(a, b); });
}
template <typename T>
T __reduce_add_sync(unsigned, T value) {
  return reduce(value, [](T a, T b) { return static_cast<T>(a + b); });
}

template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}
template <typename T>
void __stcg(T* p, T value) {
  *p = value;
}

template <typename T, typename U>
T atomicAdd(T* p, U value) {
  const T old = *p;
  *p = static_cast<T>(old + value);
  return old;
}
template <typename T>
T atomicMax(T* p, T value) {
  const T old = *p;
  *p = std::max(old, value);
  return old;
}
template <typename T>
T atomicOr(T* p, T value) {
  const T old = *p;
  *p = old | value;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_system() {}

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned which = selector >> 4 * i;
    unsigned byte = bytes >> 8 * (which & 7) & 255;
    if ((which & 8) != 0) byte = byte >> 7 != 0 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return std::max(a & 0xffffu, b & 0xffffu) | std::max(a >> 16, b >> 16) << 16;
}
inline unsigned __vminu2(unsigned a, unsigned b) {
  return std::min(a & 0xffffu, b & 0xffffu) | std::min(a >> 16, b >> 16) << 16;
}
template <typename To, typename From>
To bits_as(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline size_t __cvta_generic_to_shared(const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - emulator::shared_base());
}
inline void* __cvta_shared_to_generic(size_t address) {
  return emulator::shared_pointer(static_cast<uint32_t>(address));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
  return __floats2half2_rn(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}

#include "instructions.h"

#endif  // HYBRIDKV_EMULATOR_DEVICE_H_
