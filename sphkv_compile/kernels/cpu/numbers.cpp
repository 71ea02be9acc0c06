// Vectors, the dtypes of a model as float32, the exponential, and the Hadamard rotation.
//
// The library is numbers, codes, products, decode and append, joined in this order (binding.py) into one source.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("tree-loop-vectorize")  // Inductor turns it off for its own kernels; Clang has it on
#endif
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

enum Type : int64_t { F32, BF16, F16, BOOL, NONE };
enum Column { START, LENGTH, SPANS, BASE, FROZEN, READ, COLUMNS };  // of `rows`: storage/state.py

constexpr int EXACT = 16;  // bits that mean: kept in the model's dtype
constexpr int BLOCK = 32;  // tokens decoded at once
constexpr int ROWS = 32;   // query rows of one unit
constexpr int SLACK = 64;  // elements that vector code may write past a buffer's end
constexpr float INF = std::numeric_limits<float>::infinity();

#if defined(__AVX512BW__)
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
typedef float vec __attribute__((vector_size(W * 4)));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef uint8_t bytes __attribute__((vector_size(32)));

template <class V>
inline V load(const void* p) {
  V x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class V>
inline void store(void* p, V x) {
  std::memcpy(p, &x, sizeof x);
}
inline int round_up(int64_t n, int to) { return (n + to - 1) / to * to; }
inline int thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}
inline int line_up(int64_t n) { return round_up(n, 2 * W); }  // floats, to whole cache lines: no store straddles two
inline float* line_up(std::vector<float>& x) { return x.data() + (-reinterpret_cast<intptr_t>(x.data()) & 63) / 4; }

inline float from_bits(uint32_t x) { return load<float>(&x); }
inline float bf16(uint16_t x) { return from_bits(uint32_t(x) << 16); }
inline float f16(uint16_t x) {
  float magnitude = from_bits((x & 0x7fffu) << 13) * 0x1p112f;  // exact, subnormal numbers too
  uint32_t bits = load<uint32_t>(&magnitude) | ((x & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u);
  return from_bits(bits | (x & 0x8000u) << 16);
}
inline uint16_t to_bf16(float x) {
  uint32_t u = load<uint32_t>(&x);
  return std::isnan(x) ? 0x7fc0 : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
inline uint16_t to_f16(float x) {
  uint32_t u = load<uint32_t>(&x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
  if (a >= 0x7f800000u) return sign | 0x7c00u | (a > 0x7f800000u ? 0x200u : 0u);
  if (a >= 0x477ff000u) return sign | 0x7c00u;
  if (a < 0x38800000u) {  // subnormal in f16: adding 1/2 rounds at the right bit
    float shifted = from_bits(a) + 0.5f;
    return sign | (load<uint32_t>(&shifted) - 0x3f000000u);
  }
  return sign | (a + 0xfffu + (a >> 13 & 1) - 0x38000000u) >> 13;
}
inline int size_of(int64_t type) { return type == F32 ? 4 : type == BOOL ? 1 : 2; }

void to_float(const uint8_t* src, int64_t type, int n, float* __restrict out) {
  const uint16_t* half = reinterpret_cast<const uint16_t*>(src);
  if (type == F32) std::memcpy(out, src, n * 4);
  else if (type == BF16) for (int i = 0; i < n; i++) out[i] = bf16(half[i]);
  else for (int i = 0; i < n; i++) out[i] = f16(half[i]);
}
void from_float(const float* src, int64_t type, int n, uint8_t* out) {
  uint16_t* half = reinterpret_cast<uint16_t*>(out);
  if (type == F32) std::memcpy(out, src, n * 4);
  else if (type == BF16) for (int i = 0; i < n; i++) half[i] = to_bf16(src[i]);
  else for (int i = 0; i < n; i++) half[i] = to_f16(src[i]);
}

inline vec exp_negative(vec x) {  // x <= 0; 1 unit in the last place (Cephes)
  const vec zero = {};
  vec y = x < -87.f ? zero - 87.f : x;
  ivec n = __builtin_convertvector(y * 1.44269504f - 0.5f, ivec);
  vec f = __builtin_convertvector(n, vec), r = y - f * 0.693359375f + f * 2.12194440e-4f;
  vec p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
           1.6666665459e-1f) * r + 5.0000001201e-1f;
  ivec power = (n + 127) << 23;
  return x < -87.f ? zero : (p * r * r + r + 1.f) * load<vec>(&power);
}

// The Hadamard matrix times x, in the order of codecs/rotation.py. rot: the signed, scaled matrix; row 0 has the signs.
void hadamard(float* x, int n, const float* rot, bool transpose, float* scratch) {
  int base = n;
  while (base % 2 == 0) base /= 2;
  base = base == 1 ? 1 : 4 * base;
  for (int half = n / 2; half >= base; half /= 2)
    for (int at = 0; at < n; at += 2 * half)
      for (int i = at; i < at + half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
  if (base == 1) return;
  for (int at = 0; at < n; at += base) {
    for (int i = 0; i < base; i++) {
      scratch[i] = 0;
      for (int j = 0; j < base; j++) {
        int row = transpose ? j : i, column = transpose ? i : j;
        scratch[i] += (rot[row * n + column] < 0) == (rot[column] < 0) ? x[at + j] : -x[at + j];
      }
    }
    std::copy(scratch, scratch + base, x + at);
  }
}

}  // namespace
