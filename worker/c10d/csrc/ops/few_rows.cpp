#include "few_rows.h"

#include <array>
#include <atomic>

namespace af {
namespace {

// Sums longer than a head or a page are the micro-kernel's.
constexpr int64_t kLongest = 256;

template <class T>
struct Product {
  int64_t m, n, k, lda, ldb, ldc;
  bool add;
  const T* a;
  const T* b;
  float* c;
  const T* ahead;
};
template <class T>
using Kernel = void (*)(const Product<T>&);

template <class T>
void by_micro_kernel(const Product<T>& p) {
  gemm(p.m, p.n, p.k, p.lda, p.ldb, p.ldc, p.add, p.a, p.b, p.c);
}

// Numbers from -1 to 1 to try a kernel with, the same each time.
struct Trial {
  uint32_t state = 12345;
  float operator()() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1.0f;
  }
};

#if defined(__x86_64__)
#define AF_AVX512 __attribute__((target("avx512f")))
#define AF_AVX512_BF16 __attribute__((target("avx512f,avx512bf16")))

// R rows, widened to f32 beforehand, and C times 16 columns a step.

// Asks for what is read next, at the place at which B was just read: as many bytes a step as the step itself reads, so
// that memory is busy while sums are made. Only for the first rows: the others find B in the cache.
template <class T>
AF_INLINE void ask_ahead(const Product<T>& p, int64_t row, const void* from) {
  const auto at = static_cast<const char*>(from) - reinterpret_cast<const char*>(p.b);
  if (p.ahead && row == 0) _mm_prefetch(reinterpret_cast<const char*>(p.ahead) + at, _MM_HINT_T1);
}

// Stores sums that began at zero, added to what there is.
template <class T, int R, int C>
AF_AVX512 AF_INLINE void add_at_the_end(const Product<T>& p, const __m512 (&c)[R][C], int64_t row, int64_t column) {
  float* to = p.c + row * p.ldc + column;
  for (int r = 0; r < R; r++)
    for (int j = 0; j < C; j++) {
      float* at = to + r * p.ldc + 16 * j;
      _mm512_storeu_ps(at, p.add ? _mm512_add_ps(_mm512_loadu_ps(at), c[r][j]) : c[r][j]);
    }
}

// AMX: of 32 values the even and the odd ones are summed apart from zero, then added to what there is.
template <int R, int C>
AF_AVX512 void tile_order(const Product<bf16>& p, const float* a, int64_t row, int64_t column) {
  __m512 c[R][C];
  float* to = p.c + row * p.ldc + column;
  for (int r = 0; r < R; r++)
    for (int j = 0; j < C; j++)
      c[r][j] = p.add ? _mm512_loadu_ps(to + r * p.ldc + 16 * j) : _mm512_setzero_ps();
  const auto* b = reinterpret_cast<const uint32_t*>(p.b) + column;
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t first = 0; first < p.k; first += 32) {
    __m512 even[R][C], odd[R][C];
    for (int r = 0; r < R; r++)
      for (int j = 0; j < C; j++) even[r][j] = odd[r][j] = _mm512_setzero_ps();
    for (int64_t i = first; i < std::min(p.k, first + 32); i += 2) {
      __m512 b_even[C], b_odd[C];
      for (int j = 0; j < C; j++) {
        const __m512i pair = _mm512_loadu_si512(b + i / 2 * p.ldb + 16 * j);
        ask_ahead(p, row, b + i / 2 * p.ldb + 16 * j);
        b_even[j] = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
        b_odd[j] = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
      }
      for (int r = 0; r < R; r++) {
        const __m512 a_even = _mm512_set1_ps(a[r * p.k + i]), a_odd = _mm512_set1_ps(a[r * p.k + i + 1]);
        for (int j = 0; j < C; j++) {
          even[r][j] = _mm512_fmadd_ps(a_even, b_even[j], even[r][j]);
          odd[r][j] = _mm512_fmadd_ps(a_odd, b_odd[j], odd[r][j]);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int j = 0; j < C; j++) c[r][j] = _mm512_add_ps(c[r][j], _mm512_add_ps(even[r][j], odd[r][j]));
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < C; j++) _mm512_storeu_ps(to + r * p.ldc + 16 * j, c[r][j]);
}

// AVX-512 bf16: pair after pair, added to what there is at the end.
template <int R, int C>
AF_AVX512_BF16 void pair_order(const Product<bf16>& p, const float*, int64_t row, int64_t column) {
  __m512 c[R][C];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < C; j++) c[r][j] = _mm512_setzero_ps();
  const auto* b = reinterpret_cast<const uint32_t*>(p.b) + column;
  const auto* a = reinterpret_cast<const uint16_t*>(p.a);
  for (int64_t i = 0; i < p.k; i += 2) {
    __m512i pair[C];
    for (int j = 0; j < C; j++) {
      pair[j] = _mm512_loadu_si512(b + i / 2 * p.ldb + 16 * j);
      ask_ahead(p, row, b + i / 2 * p.ldb + 16 * j);
    }
    for (int r = 0; r < R; r++) {
      int32_t ab;
      std::memcpy(&ab, a + (row + r) * p.lda + i, sizeof(ab));
      const auto both = (__m512bh)_mm512_set1_epi32(ab);
      for (int j = 0; j < C; j++) c[r][j] = _mm512_dpbf16_ps(c[r][j], both, (__m512bh)pair[j]);
    }
  }
  add_at_the_end(p, c, row, column);
}

// bf16 multiplied in f32: value after value, added to what there is at the end.
template <int R, int C>
AF_AVX512 void widened_rows(const Product<bf16>& p, const float* a, int64_t stride, int64_t row, int64_t column) {
  __m512 c[R][C];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < C; j++) c[r][j] = _mm512_setzero_ps();
  const auto* b = reinterpret_cast<const uint32_t*>(p.b) + column;
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t i = 0; i < p.k; i += 2) {
    __m512 even[C], odd[C];
    for (int j = 0; j < C; j++) {
      const __m512i pair = _mm512_loadu_si512(b + i / 2 * p.ldb + 16 * j);
      ask_ahead(p, row, b + i / 2 * p.ldb + 16 * j);
      even[j] = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
      odd[j] = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
    }
    for (int r = 0; r < R; r++) {
      const __m512 a_even = _mm512_set1_ps(a[r * stride + i]), a_odd = _mm512_set1_ps(a[r * stride + i + 1]);
      for (int j = 0; j < C; j++)
        c[r][j] = _mm512_fmadd_ps(a_odd, odd[j], _mm512_fmadd_ps(a_even, even[j], c[r][j]));
    }
  }
  add_at_the_end(p, c, row, column);
}

template <int R, int C>
AF_AVX512 void widened_order(const Product<bf16>& p, const float* a, int64_t row, int64_t column) {
  widened_rows<R, C>(p, a, p.k, row, column);
}

template <int R, int C>
void widened_columns(const Product<bf16>& p, const float* a, int64_t stride, int64_t row) {
  int64_t column = 0;
  for (; column + 16 * C <= p.n; column += 16 * C) widened_rows<R, C>(p, a + row * stride, stride, row, column);
  for (; column < p.n; column += 16) widened_rows<R, 1>(p, a + row * stride, stride, row, column);
}

void widened_product(const Product<bf16>& p, const float* a, int64_t stride) {
  // Whole rows of B: memory is read fastest in order.
  int64_t row = 0;
  for (; row + 4 <= p.m; row += 4) widened_columns<4, 4>(p, a, stride, row);
  for (; row < p.m; row++) widened_columns<1, 4>(p, a, stride, row);
}

// Whether that gives the bits of the micro-kernel in f32 for sums of k products.
bool widened_agrees(int64_t k) {
  Trial next;
  std::vector<float> a(kFewWidened * k), wide(k * kBlock), expected(kFewWidened * kBlock), got(kFewWidened * kBlock);
  std::vector<bf16> b(k * kBlock);
  for (auto& x : b) store(&x, next());
  // As they are given: values of bf16.
  for (auto& x : a) {
    bf16 rounded;
    store(&rounded, next());
    x = load(&rounded);
  }
  for (const int64_t n : {32, 64}) {
    widen_pairs(b.data(), k, n, kBlock, wide.data());
    for (const int64_t m : {1, 7, 16}) {
      for (const bool add : {false, true}) {
        for (size_t i = 0; i < got.size(); i++) expected[i] = got[i] = next();
        gemm(m, n, k, k, n, kBlock, add, a.data(), wide.data(), expected.data());
        widened_product({m, n, k, k, kBlock, kBlock, add, nullptr, b.data(), got.data(), nullptr}, a.data(), k);
        for (int64_t r = 0; r < m; r++)
          if (std::memcmp(&expected[r * kBlock], &got[r * kBlock], n * sizeof(float)) != 0) return false;
      }
    }
  }
  return true;
}

// f32: value after value, added to what there is at the end.
template <int R, int C>
AF_AVX512 void value_order(const Product<float>& p, const float* a, int64_t row, int64_t column) {
  __m512 c[R][C];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < C; j++) c[r][j] = _mm512_setzero_ps();
  for (int64_t i = 0; i < p.k; i++) {
    __m512 b[C];
    for (int j = 0; j < C; j++) {
      b[j] = _mm512_loadu_ps(p.b + i * p.ldb + column + 16 * j);
      ask_ahead(p, row, p.b + i * p.ldb + column + 16 * j);
    }
    for (int r = 0; r < R; r++)
      for (int j = 0; j < C; j++) c[r][j] = _mm512_fmadd_ps(_mm512_set1_ps(a[r * p.k + i]), b[j], c[r][j]);
  }
  add_at_the_end(p, c, row, column);
}

template <class T>
void widen(const Product<T>& p, float* wide) {
  for (int64_t r = 0; r < p.m; r++)
    for (int64_t i = 0; i < p.k; i++) wide[r * p.k + i] = load(p.a + r * p.lda + i);
}

// All rows and columns by steps of as many as stay in registers; whole rows of B where they do, for memory is read
// fastest in order.
#define AF_STEP(order, R, C)                                                         \
  for (; column + 16 * C <= p.n; column += 16 * C) order<R, C>(p, from, row, column); \
  for (; column < p.n; column += 16) order<R, 1>(p, from, row, column);
#define AF_BY_ROWS(name, order, T)                         \
  void name(const Product<T>& p) {                         \
    float wide[kFewRows * kLongest];                       \
    widen(p, wide);                                        \
    for (int64_t row = 0; row < p.m; row += 4) {           \
      const float* from = wide + row * p.k;                \
      int64_t column = 0;                                  \
      switch (std::min<int64_t>(4, p.m - row)) {           \
        case 1: AF_STEP(order, 1, 4) break;                   \
        case 2: AF_STEP(order, 2, 4) break;                   \
        case 3: AF_STEP(order, 3, 4) break;                   \
        default: AF_STEP(order, 4, 2) break;                  \
      }                                                    \
    }                                                      \
  }
AF_BY_ROWS(by_tile_order, tile_order, bf16)
AF_BY_ROWS(by_pair_order, pair_order, bf16)
AF_BY_ROWS(by_widened_order, widened_order, bf16)
AF_BY_ROWS(by_value_order, value_order, float)
#undef AF_BY_ROWS
#undef AF_STEP
#endif

// Whether a kernel gives the micro-kernel's bits for sums of k products.
template <class T>
bool agrees(Kernel<T> kernel, int64_t k) {
  Trial next;
  std::vector<T> a(kFewRows * k), b(k * kBlock);
  std::vector<float> expected(kFewRows * kBlock), got(kFewRows * kBlock);
  for (const int64_t n : {16, 32, 64}) {
    for (const int64_t m : {1, 3, 8}) {
      for (const bool add : {false, true}) {
        for (auto& x : a) store(&x, next());
        for (auto& x : b) store(&x, next());
        for (size_t i = 0; i < got.size(); i++) expected[i] = got[i] = next();
        Product<T> product{m, n, k, k, n, kBlock, add, a.data(), b.data(), expected.data(), b.data()};
        by_micro_kernel(product);
        product.c = got.data();
        kernel(product);
        for (int64_t r = 0; r < m; r++)
          if (std::memcmp(&expected[r * kBlock], &got[r * kBlock], n * sizeof(float)) != 0) return false;
      }
    }
  }
  return true;
}

Kernel<bf16> choose(bf16, int64_t k) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && widens() && agrees<bf16>(by_widened_order, k)) return by_widened_order;
  if (__builtin_cpu_supports("avx512bf16") && agrees<bf16>(by_pair_order, k)) return by_pair_order;
  if (__builtin_cpu_supports("avx512f") && agrees<bf16>(by_tile_order, k)) return by_tile_order;
#endif
  return by_micro_kernel<bf16>;
}

Kernel<float> choose(float, int64_t k) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && agrees<float>(by_value_order, k)) return by_value_order;
#endif
  return by_micro_kernel<float>;
}

template <class T>
Kernel<T> chosen(int64_t k) {
  static std::array<std::atomic<Kernel<T>>, kLongest + 1> by_length{};
  if (k > kLongest) return by_micro_kernel<T>;
  Kernel<T> kernel = by_length[k].load(std::memory_order_relaxed);
  if (!kernel) by_length[k].store(kernel = choose(T(), k), std::memory_order_relaxed);
  return kernel;
}

}  // namespace

bool gemm_few_widened(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a,
                      const bf16* b, float* c, const bf16* ahead) {
#if defined(__x86_64__)
  // 1: it agrees, 2: it does not.
  static std::array<std::atomic<int>, kWideDepth + 1> known{};
  if (k > kWideDepth || !__builtin_cpu_supports("avx512f")) return false;
  int agrees = known[k].load(std::memory_order_relaxed);
  if (!agrees) known[k].store(agrees = widened_agrees(k) ? 1 : 2, std::memory_order_relaxed);
  if (agrees == 2) return false;
  widened_product({m, n, k, lda, ldb, ldc, add, nullptr, b, c, ahead}, a, lda);
  return true;
#else
  return false;
#endif
}

void gemm_few_rows(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const bf16* a,
                   const bf16* b, float* c, const bf16* ahead) {
  chosen<bf16>(k)({m, n, k, lda, ldb, ldc, add, a, b, c, ahead});
}

void gemm_few_rows(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a,
                   const float* b, float* c, const float* ahead) {
  chosen<float>(k)({m, n, k, lda, ldb, ldc, add, a, b, c, ahead});
}

}  // namespace af
