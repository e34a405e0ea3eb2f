// Scalars and rows of them, written so that the compiler vectorises: no call, no branch in a loop.
//
// What must stay true: a row's result depends on that row alone and on nothing of its neighbours, so that a token
// gets the same numbers whatever else is in the batch.
#pragma once
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// A function is compiled for AVX-512, for AVX2 and for any x86-64, and the machine's is chosen when it is loaded.
#if defined(__x86_64__)
#define AF_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define AF_VECTORISED
#endif
// No other pointer of the function reaches the same numbers.
#define AF_RESTRICT __restrict__
#define AF_INLINE inline __attribute__((always_inline))

namespace af {

// While it lives, this thread rounds numbers below 1e-38 to 0, as the matrix unit does: probabilities of next to
// nothing times small gradients make many of them, and each costs a hundred additions.
class FlushTiny {
#if defined(__x86_64__)
 public:
  FlushTiny() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~FlushTiny() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

using bf16 = c10::BFloat16;

AF_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

AF_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

AF_INLINE float load(const float* p) { return *p; }
AF_INLINE float load(const bf16* p) { return bits_to_float(static_cast<uint32_t>(p->x) << 16); }

AF_INLINE void store(float* p, float value) { *p = value; }
// To the nearest, ties to even. A NaN is given apart: rounding could carry its bits into those of a number.
AF_INLINE void store(bf16* p, float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->x = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest);
}

// The value after a round trip through T.
template <class T>
AF_INLINE float rounded(float value) {
  T t;
  store(&t, value);
  return load(&t);
}

// e^x to about 1e-7 of its value, 0 below -87.3, NaN of NaN. Cephes' reduction and polynomial.
AF_INLINE float exp_f32(float x) {
  const float clamped = x < -87.3f ? -87.3f : (x > 88.3f ? 88.3f : x);
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float scaled = bits_to_float(float_to_bits(p) + ((float_to_bits(shifted) & 0x1ffu) << 23));
  // A NaN's own bits would be taken for an exponent.
  return x < -87.3f ? 0.0f : (x == x ? scaled : x);
}

AF_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

}  // namespace af
