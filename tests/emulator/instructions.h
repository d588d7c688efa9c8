// The instructions of kernels/ptx, emulated. The guards of those headers are set here, so that
// kernels that include them get these.
#ifndef HYBRIDKV_EMULATOR_INSTRUCTIONS_H_
#define HYBRIDKV_EMULATOR_INSTRUCTIONS_H_

#define HYBRIDKV_POLICY_DYNAMIC_SHARED_CUH_
#define HYBRIDKV_PTX_ATOMIC_CUH_
#define HYBRIDKV_PTX_CONVERT_CUH_
#define HYBRIDKV_PTX_CP_ASYNC_CUH_
#define HYBRIDKV_PTX_GRID_DEPENDENCY_CUH_
#define HYBRIDKV_PTX_MATH_CUH_
#define HYBRIDKV_PTX_MATRIX_CUH_
#define HYBRIDKV_PTX_MMA_CUH_

namespace hkv {

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::dynamic_shared);
}

inline int32_t atomic_arrive(int32_t* counter) { return (*counter)++; }

inline uint32_t e4m3x2_to_f16x2(uint16_t pair) {
  const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
  return halves.x | static_cast<uint32_t>(halves.y) << 16;
}
inline uint16_t f32x2_to_e4m3x2(float low, float high) {
  const auto one = [](float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); };
  return static_cast<uint16_t>(one(low) | one(high) << 8);
}

inline void cp_async_16(uint32_t dst_shared, const void* src, bool valid) {
  if (dst_shared % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(src) % 16 != 0)) {
    emulator::fail("a copy of 16 bytes is not aligned");
  }
  emulator::copy_later(dst_shared, src, 16, valid);
}
inline uint64_t evict_first_policy() { return 0; }
inline void cp_async_16(uint32_t dst_shared, const void* src, bool valid, uint64_t) {
  cp_async_16(dst_shared, src, valid);
}
inline void cp_async_4(uint32_t dst_shared, const void* src, bool valid) {
  emulator::copy_later(dst_shared, src, 4, valid);
}
inline void prefetch_l1(const void*) {}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  emulator::await_copies(kPending);
}

inline void grid_dependency_launch() {}
inline void grid_dependency_wait() {}

inline float ex2(float x) { return std::exp2(x); }
inline float rcp(float x) { return 1.0f / x; }

// Element (row, column) of matrix i, whose rows the lanes' addresses name.
template <bool kTransposed>
void load_matrices(uint32_t (&m)[4], uint32_t row_shared) {
  if (row_shared % 16 != 0) emulator::fail("a row of ldmatrix is not aligned");
  struct Matrices {
    uint32_t m[4];
  };
  const Matrices loaded = emulator::together(row_shared, [](auto of) {
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    Matrices result;
    for (int i = 0; i < 4; ++i) {
      const auto element = [&](int row, int column) {
        uint16_t bits;
        memcpy(&bits, emulator::shared_pointer(of(8 * i + row)) + 2 * column, 2);
        return static_cast<uint32_t>(bits);
      };
      result.m[i] = kTransposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
    }
    return result;
  });
  for (int i = 0; i < 4; ++i) m[i] = loaded.m[i];
}
inline void ldmatrix_x4(uint32_t (&m)[4], uint32_t row_shared) {
  load_matrices<false>(m, row_shared);
}
inline void ldmatrix_x4_trans(uint32_t (&m)[4], uint32_t row_shared) {
  load_matrices<true>(m, row_shared);
}
inline uint32_t movmatrix_trans(uint32_t m) {
  return emulator::together(m, [](auto of) {
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    const auto element = [&](int row, int column) {
      return of(row * 4 + column / 2) >> 16 * (column % 2) & 0xffffu;
    };
    return element(2 * t, g) | element(2 * t + 1, g) << 16;
  });
}

// Exact products, summed up in f64 and rounded once.
template <typename F>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F value) {
  struct Operands {
    float a[8], b[4];
  } mine;
  for (int i = 0; i < 8; ++i) mine.a[i] = value(a[i / 2] >> 16 * (i % 2) & 0xffffu);
  for (int i = 0; i < 4; ++i) mine.b[i] = value((i < 2 ? b0 : b1) >> 16 * (i % 2) & 0xffffu);
  struct Sums {
    float c[4];
  };
  const Sums sums = emulator::together(mine, [&](auto of) {
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    Sums result;
    for (int i = 0; i < 4; ++i) {
      const int column = 2 * t + i % 2;
      double sum = c[i];
      for (int k = 0; k < 16; ++k) {
        const float x = of(g * 4 + k % 8 / 2).a[(i / 2 + k / 8 * 2) * 2 + k % 2];
        sum += static_cast<double>(x) * of(column * 4 + k % 8 / 2).b[k / 8 * 2 + k % 2];
      }
      result.c[i] = static_cast<float>(sum);
    }
    return result;
  });
  for (int i = 0; i < 4; ++i) c[i] = sums.c[i];
}
inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_m16n8k16(c, a, b0, b1, [](uint32_t bits) { return __uint_as_float(bits << 16); });
}
inline void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_m16n8k16(c, a, b0, b1, [](uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  });
}

}  // namespace hkv

#endif  // HYBRIDKV_EMULATOR_INSTRUCTIONS_H_
