// Vectors of as many floats as the processor has lanes for, and what is computed with them. Included by the sources
// beside it, which compiler.py compiles.

#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float V __attribute__((vector_size(4 * W)));
typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t I __attribute__((vector_size(4 * W)));

inline V load(const float* p) { return *(const Unaligned*)p; }
inline void store(float* p, V v) { *(Unaligned*)p = v; }
inline V all(float x) { return x - V{}; }
inline int64_t up(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

inline float sum(V v) {
  float s[W];
  store(s, v);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) s[i] += s[i + n];
  return s[0];
}

// e^x to 2 units in the last place (Cephes, expf); 0 below the smallest normal number. NaN stays NaN.
inline V exponential(V x) {
  const V shift = all(12582912.f);  // 1.5 * 2^23: what is added to it is rounded to an integer
  const V within = x > all(88.f) ? all(88.f) : x;
  const V shifted = within * 1.44269504f + shift, n = shifted - shift;
  const V r = within - n * 0.693359375f - n * -2.12194440e-4f;
  V p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const V power = (V)((I)p + (((I)shifted - (I)shift) << 23));
  return x != x ? x : x < all(-87.f) ? V{} : power;
}

}  // namespace
