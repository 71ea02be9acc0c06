// Attention of a few new queries over one site's coded cache; and the append of tokens that only enter its window.
//
//   symbol       shape or unit               meaning
//   B H G T      -                           rows of the batch, kv heads, query heads per kv head, new tokens
//   R            G * T                       query rows of one kv head; row r = g * T + t
//   D DV         multiples of 8              head_dim of keys, of values; DP and VP: rounded up to whole cache lines
//   P page       -, tokens                   pages of a (row, kv head), tokens of a page
//   N span       -, tokens                   anchor rows of a (row, kv head), tokens that share one
//   q            [R, DP]                     queries times the softmax scale
//   turned_q     [R, DP]                     q' = H(s q), in the frame of the key codes
//   logits       [R, pitch]                  of one segment: at most `pitch` tokens of one page, or of the exact slots
//   bias         [rows, pitch]               0 or the additive mask where a query may look, -inf elsewhere
//   plain        [R, VP]                     running sum of p v over exact values
//   turned       [R, VP]                     running sum of p r c over coded values, turned back once at the end
//   levels       [3, 16], [256]              values of the codes of 2, 3 and 4 bits, repeated to 16 each; and of 8
//
// A unit of work is one (row, kv head, run of pages); units leave (top, total, plain, turned) and are combined at the
// end. Codes become float rows, BLOCK tokens at a time, in first-level cache; the arithmetic is float32 throughout.
// Codes, masks and the new tokens are read past their end by up to 31 bytes nowhere but inside a page.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

enum Type : int64_t { F32, BF16, F16, BOOL, NONE };
enum Column { START, LENGTH, SPANS, BASE, FROZEN, COLUMNS };  // of `rows`: runtime/state.py

// Both structures are packed by kernels/cpu/binding.py, in this order; every field has 8 bytes.
struct Attend {
  const uint8_t* arena;
  const int32_t* table;
  const uint8_t* tiers;
  const int32_t* positions;
  const int8_t* anchors;
  const uint16_t* span_scales;
  const uint8_t *exact_k, *exact_v;
  const float* pair_scale;
  const int64_t* rows;
  const uint8_t *q, *k, *v, *mask;
  uint8_t* out;
  int64_t B, H, G, T, D, DV, P, N, q_type, k_type, v_type, mask_type;
  int64_t q_stride[3], k_stride[3], v_stride[3], mask_stride[4], mask_columns;
  int64_t first, base, columns, causal, threads;
  int64_t cache_k_type, cache_v_type, sink, window, span, page;
  const int64_t* menu;  // [tiers, 2]: bits of K, of V
  const float *rot_k, *rot_v, *levels;
  double scale;
};

struct Append {
  uint8_t *exact_k, *exact_v;
  double *moments, *energy;
  const float* pair_scale;
  int64_t* rows;
  const uint8_t *q, *k, *v;
  const int64_t* pos;
  int64_t B, H, G, T, D, DV, q_type, k_size, v_size, q_stride[3], k_stride[3], v_stride[3];
  int64_t start, rolling, sink, window, span;
};

constexpr int EXACT = 16;  // bits that mean: kept in the model's dtype
constexpr int BLOCK = 32;  // tokens decoded at once
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
inline int line_up(int64_t n) { return round_up(n, 2 * W); }  // floats, to whole cache lines: no store straddles two
inline float* line_up(std::vector<float>& x) { return x.data() + (-reinterpret_cast<intptr_t>(x.data()) & 63) / 4; }

// ---- numbers ----------------------------------------------------------------------------------------------------

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

// The Hadamard matrix times x, as codecs/rotation.py orders it. rot is the signed, scaled matrix: row 0 shows the signs.
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

// ---- codes to floats --------------------------------------------------------------------------------------------

// W codes, one in the low bits of each lane, to their levels. Tables of 2 and 3 bits repeat, so they need no mask.
struct Levels {
  vec low, high;
  explicit Levels(const float* table) : low(load<vec>(table)), high(load<vec>(table + 16 - W)) {}

  template <int bits>
  inline vec of(ivec code) const {
#if defined(__AVX512BW__)
    return vec(_mm512_permutexvar_ps(__m512i(code), __m512(low)));
#elif defined(__AVX2__)
    __m256 x = _mm256_permutevar8x32_ps(__m256(low), __m256i(code));
    if (bits < 4) return vec(x);
    __m256 y = _mm256_permutevar8x32_ps(__m256(high), __m256i(code));
    return vec(_mm256_blendv_ps(x, y, _mm256_castsi256_ps(_mm256_slli_epi32(__m256i(code), 28))));
#else
    vec x;
    for (int i = 0; i < W; i++) x[i] = bits == 4 && code[i] & 8 ? high[code[i] & 7] : low[code[i] & 7];
    return x;
#endif
  }
};
inline ivec widen(const uint8_t* p) {
#if defined(__AVX512BW__)
  return ivec(_mm512_cvtepu8_epi32(load<__m128i>(p)));
#elif defined(__AVX2__)
  return ivec(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  ivec x;
  for (int i = 0; i < W; i++) x[i] = p[i];
  return x;
#endif
}

// Readers show tokens as vectors: word w of token t holds `planes` vectors; vector p starts at element p * plane + w.
template <int bits>
struct Codes {
  static constexpr int planes = 8 / bits;
  const uint8_t* data;
  int64_t stride;
  int plane;
  Levels levels;
  ivec word(int t, int w) const { return widen(data + t * stride + w); }
  vec vector(ivec x, int p) const { return levels.of<bits>(x >> (p * bits)); }
};
template <>
struct Codes<3> {  // two high bits as above, then a plane of low bits: plane / 2 bytes
  static constexpr int planes = 4;
  const uint8_t* data;
  int64_t stride;
  int plane;
  Levels levels;
  struct Word {
    ivec high, low;
  };
  Word word(int t, int w) const {
    const uint8_t *token = data + t * stride, *low = token + plane;
    const bool second = 2 * w >= plane;
    return {widen(token + w) << 1, widen(low + w - (second ? plane / 2 : 0)) >> int(second)};
  }
  vec vector(const Word& x, int p) const { return levels.of<3>((x.high >> 2 * p & 6) | (x.low >> 2 * p & 1)); }
};
template <>
struct Codes<8> {
  static constexpr int planes = 1;
  const uint8_t* data;
  int64_t stride;
  int plane;
  const float* table;
  const uint8_t* word(int t, int w) const { return data + t * stride + w; }
  vec vector(const uint8_t* x, int) const {
    const float* l = table;
    vec y = {l[x[0]], l[x[1]], l[x[2]], l[x[3]], l[x[4]], l[x[5]], l[x[6]], l[x[7]]};
    for (int i = 8; i < W; i++) y[i] = l[x[i]];
    return y;
  }
};
struct Floats {
  static constexpr int planes = 2;
  const float* data;
  int64_t stride;
  int plane;
  const float* word(int t, int w) const { return data + t * stride + w; }
  vec vector(const float* x, int p) const { return load<vec>(x + p * plane); }
};

// Where a segment's keys or values lie: token i at data + i * stride, coded or of a dtype.
struct Source {
  const uint8_t* data;
  int64_t bits, type, stride;
};

// Calls f with the reader of a coded source, if its planes are whole vectors.
template <class F>
bool with_codes(const Source& s, int dim, const float* levels, F f) {
  const int plane = s.bits == 3 ? dim / 4 : dim * s.bits / 8;
  if (plane % (s.bits == 3 ? 2 * W : W) || s.bits == EXACT) return false;
  if (s.bits == 3) f(Codes<3>{s.data, s.stride, plane, Levels(levels + 16)});
  if (s.bits == 2) f(Codes<2>{s.data, s.stride, plane, Levels(levels)});
  if (s.bits == 4) f(Codes<4>{s.data, s.stride, plane, Levels(levels + 32)});
  if (s.bits == 8) f(Codes<8>{s.data, s.stride, plane, levels + 48});
  return true;
}

// Any width and dimension: codes to bytes first. Planes ascend, so what a vector writes past one is overwritten.
template <int bits>
inline void unpack(const uint8_t* src, int n, uint8_t* out) {
  for (int p = 0; p < 8 / bits; p++)
    for (int i = 0; i < n; i += 32) {
      bytes shifted = load<bytes>(src + i) >> uint8_t(bits * p);
      store(out + p * n + i, shifted & uint8_t((1 << bits) - 1));
    }
}
void decode_token(const uint8_t* src, int bits, int dim, const float* levels, float* out, uint8_t* codes) {
  if (bits == 4) unpack<4>(src, dim / 2, codes);
  else unpack<2>(src, dim / 4, codes);
  if (bits == 3) {
    uint8_t* low = codes + dim + SLACK;
    unpack<1>(src + dim / 4, dim / 8, low);
    for (int i = 0; i < dim; i += 32) {
      bytes high = load<bytes>(codes + i);
      store(codes + i, (high + high) | load<bytes>(low + i));
    }
  }
  const Levels table(levels + 16 * (bits - 2));
  for (int i = 0; i < dim; i += W)
    store(out + i, bits == 4 ? table.of<4>(widen(codes + i)) : table.of<3>(widen(codes + i)));
}

// n tokens as rows of floats.
void float_rows(const Source& s, int n, int dim, const float* levels, int pitch, float* out, uint8_t* codes) {
  bool done = with_codes(s, dim, levels, [&](auto reader) {
    for (int t = 0; t < n; t++)
      for (int w = 0; w < reader.plane; w += W)
        for (int p = 0; p < reader.planes; p++)
          store(out + t * pitch + p * reader.plane + w, reader.vector(reader.word(t, w), p));
  });
  for (int t = 0; t < n && !done; t++) {
    const uint8_t* token = s.data + t * s.stride;
    if (s.bits == EXACT) to_float(token, s.type, dim, out + t * pitch);
    else if (s.bits == 8) for (int j = 0; j < dim; j++) out[t * pitch + j] = levels[48 + token[j]];
    else decode_token(token, s.bits, dim, levels, out + t * pitch, codes);
  }
}

// ---- the two products -------------------------------------------------------------------------------------------

inline void sum4(const vec* x, float* out) {
#if defined(__AVX2__)
  __m256 y[4];
  for (int i = 0; i < 4; i++) {
    y[i] = load<__m256>(x + i);
    if (W == 16) y[i] = _mm256_add_ps(y[i], load<__m256>(reinterpret_cast<const float*>(x + i) + W - 8));
  }
  __m256 z = _mm256_hadd_ps(_mm256_hadd_ps(y[0], y[1]), _mm256_hadd_ps(y[2], y[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(z), _mm256_extractf128_ps(z, 1)));
#else
  for (int i = 0; i < 4; i++) {
    out[i] = 0;
    for (int j = 0; j < W; j++) out[i] += x[i][j];
  }
#endif
}

// s[r][t] = q[r] . c[t] for n tokens, n rounded up to 4.
template <int R, class Reader>
__attribute__((noinline)) void dots(const Reader& c, int n, const float* q, int dim, float* s, int pitch) {
  for (int t = 0; t < n; t += 4) {
    vec sums[R][4];
    for (int j = 0; j < 4; j++) {
      vec sum[R] = {};
      for (int w = 0; w < c.plane; w += W) {
        const auto word = c.word(t + j, w);
        for (int p = 0; p < c.planes; p++) {
          const vec x = c.vector(word, p);
          for (int r = 0; r < R; r++) sum[r] += x * load<vec>(q + r * dim + p * c.plane + w);
        }
      }
      for (int r = 0; r < R; r++) sums[r][j] = sum[r];
    }
    for (int r = 0; r < R; r++) sum4(sums[r], s + r * pitch + t);
  }
}

// o[r] += sum over n tokens of s[r][t] c[t].
template <int R, class Reader>
__attribute__((noinline)) void weigh(const Reader& c, int n, const float* s, int pitch, float* o, int dim) {
  for (int w = 0; w < c.plane; w += W) {
    vec sum[Reader::planes][R];
    for (int p = 0; p < c.planes; p++)
      for (int r = 0; r < R; r++) sum[p][r] = load<vec>(o + r * dim + p * c.plane + w);
    for (int t = 0; t < n; t++) {
      const auto word = c.word(t, w);
      for (int p = 0; p < c.planes; p++) {
        const vec x = c.vector(word, p);
        for (int r = 0; r < R; r++) sum[p][r] += x * s[r * pitch + t];
      }
    }
    for (int p = 0; p < c.planes; p++)
      for (int r = 0; r < R; r++) store(o + r * dim + p * c.plane + w, sum[p][r]);
  }
}

// Calls f(first row, number of rows) for runs of at most 4 rows, as equal as can be.
template <class F>
void by_rows(int rows, F f) {
  for (int r = 0; r < rows;) {
    const int left = rows - r, runs = (left + 3) / 4, step = (left + runs - 1) / runs;
    if (step == 4) f(r, std::integral_constant<int, 4>{});
    if (step == 3) f(r, std::integral_constant<int, 3>{});
    if (step == 2) f(r, std::integral_constant<int, 2>{});
    if (step == 1) f(r, std::integral_constant<int, 1>{});
    r += step;
  }
}

// ---- one unit ---------------------------------------------------------------------------------------------------

struct Unit {
  const Attend& a;
  int b, h, R, DP, VP, pitch;
  int64_t start, length, spans, begin;  // of row b; begin: where its first span begins
  std::vector<float> floats;
  std::vector<uint8_t> codes;
  std::vector<const float*> bias_of;
  float *q, *turned_q, *logits, *bias, *rows_k, *rows_v, *radius, *weight, *anchor;
  float *top, *total, *plain, *turned;  // the result

  explicit Unit(const Attend& a) : a(a), R(a.G * a.T), DP(line_up(a.D)), VP(line_up(a.DV)) {
    pitch = line_up(std::max<int64_t>(a.page, 64));
    floats.assign(R * 2 * (DP + pitch) + BLOCK * (DP + VP) + 2 * pitch + DP + 4 * SLACK, 0.f);
    codes.resize(2 * (std::max(DP, VP) + 2 * SLACK));
    bias_of.resize(R);
    float* at = line_up(floats);
    auto take = [&](int n) { return std::exchange(at, at + line_up(n)); };
    q = take(R * DP), turned_q = take(R * DP), logits = take(R * pitch), bias = take(R * pitch);
    rows_k = take(BLOCK * DP + SLACK), rows_v = take(BLOCK * VP + SLACK), anchor = take(DP);
    radius = take(pitch), weight = take(pitch);
  }

  static int64_t result_floats(const Attend& a) { return 2 * line_up(a.G * a.T) + 2 * a.G * a.T * line_up(a.DV); }

  void begin_unit(int row, int head, float* result) {
    b = row, h = head;
    const int64_t* counters = a.rows + b * COLUMNS;
    start = counters[START], length = std::min(counters[LENGTH], a.first), spans = counters[SPANS];
    begin = start + a.sink;
    top = result, total = top + line_up(R), plain = total + line_up(R), turned = plain + R * VP;
    std::fill(top, total, -INF);
    std::fill(total, turned + R * VP, 0.f);
    const float *s = a.pair_scale + (b * a.H + h) * a.D, unit = 1 / std::sqrt(float(a.D));
    for (int r = 0; r < R; r++) {
      float *x = q + r * DP, *y = turned_q + r * DP;
      int64_t at = b * a.q_stride[0] + (h * a.G + r / a.T) * a.q_stride[1] + r % a.T * a.q_stride[2];
      to_float(a.q + at * size_of(a.q_type), a.q_type, a.D, x);
      for (int d = 0; d < a.D; d++) {
        x[d] *= float(a.scale);
        y[d] = x[d] * s[d] * (a.rot_k[d] < 0 ? -unit : unit);
      }
      hadamard(y, a.D, a.rot_k, false, anchor);
    }
    std::fill(anchor, anchor + DP, 0.f);
  }

  // Which tokens each query sees, as a bias; false when none is seen. Tokens at or after `limit` are not there.
  bool look(const int32_t* position, int n, int64_t limit) {
    const int32_t low = std::max<int64_t>(a.base, 0), high = std::min(limit, a.base + a.columns);
    const int by_head = a.mask_type != NONE && a.mask_stride[1] ? a.G : 1;
    const int by_token = a.causal || (a.mask_type != NONE && a.mask_stride[2]) ? a.T : 1;
    int gaps = 0, outside = 0;
    for (int i = 0; i < n; i++) {
      gaps |= position[i] - position[0] - i;
      outside |= position[i] < low || position[i] >= high;
    }
    for (int j = 0; j < by_head * by_token; j++) {
      float* to = bias + j * pitch;
      const int t = j % by_token;
      const int32_t stop = a.causal ? std::min<int64_t>(high, a.base + t + 1) : high;
      for (int i = 0; i < n; i++) to[i] = position[i] >= low && position[i] < stop ? 0.f : -INF;
      for (int i = n; i < round_up(n, W); i++) to[i] = -INF;
      if (a.mask_type != NONE) {
        int64_t at = b * a.mask_stride[0] + (h * a.G + j / by_token) * a.mask_stride[1] + t * a.mask_stride[2];
        add_mask(to, position, n, at, !gaps && !outside && a.mask_stride[3] == 1);
      }
    }
    for (int r = 0; r < R; r++) bias_of[r] = bias + ((by_head > 1 ? r / a.T : 0) * by_token + (by_token > 1 ? r % a.T : 0)) * pitch;
    float best = -INF;
    for (int j = 0; j < by_head * by_token; j++)
      for (int i = 0; i < n; i++) best = std::max(best, bias[j * pitch + i]);
    return best > -INF;
  }

  void add_mask(float* to, const int32_t* position, int n, int64_t at, bool run) {
    if (a.mask_type == BOOL && run) {
      const uint8_t* m = a.mask + at + position[0] - a.base;
      for (int i = 0; i < n; i++) to[i] = m[i] ? to[i] : -INF;
      return;
    }
    for (int i = 0; i < n; i++) {
      if (to[i] == -INF) continue;
      const uint8_t* m = a.mask + (at + (position[i] - a.base) * a.mask_stride[3]) * size_of(a.mask_type);
      float x = 0;
      if (a.mask_type == BOOL) x = *m ? 0 : -INF;
      else to_float(m, a.mask_type, 1, &x);
      to[i] += x;
    }
  }

  // Fold a segment into the running softmax. weight: of each value, and p takes it in.
  void fold(const Source& values, int n) {
    const int padded = round_up(n, W);
    const vec hidden = vec{} - INF;
    float* sums = values.bits == EXACT ? plain : turned;
    for (int r = 0; r < R; r++) {
      float* s = logits + r * pitch;
      vec high = hidden, sum = {};
      for (int i = 0; i < padded; i += W) {
        vec may = load<vec>(bias_of[r] + i), x = may == -INF ? hidden : load<vec>(s + i) + may;
        high = high > x ? high : x;
        store(s + i, x);
      }
      float best = top[r];
      for (int j = 0; j < W; j++) best = std::max(best, high[j]);
      if (best > top[r]) {
        const float decay = std::exp(top[r] - best);
        for (int d = 0; d < VP; d++) plain[r * VP + d] *= decay, turned[r * VP + d] *= decay;
        total[r] *= decay, top[r] = best;
      }
      const float shift = best == -INF ? 0 : best;
      for (int i = 0; i < padded; i += W) {
        vec p = exp_negative(load<vec>(s + i) - shift);
        sum += p;
        store(s + i, p * load<vec>(weight + i));
      }
      for (int j = 0; j < W; j++) total[r] += sum[j];
    }
    read(values, n, a.DV, VP, rows_v, [&](const auto& reader, int at, int count) {
      by_rows(R, [&](int r, auto step) {
        weigh<step()>(reader, count, logits + r * pitch + at, pitch, sums + r * VP, VP);
      });
    });
  }

  void key_dots(const Source& keys, int n) {
    const float* queries = keys.bits == EXACT ? q : turned_q;
    read(keys, n, a.D, DP, rows_k, [&](const auto& reader, int at, int count) {
      by_rows(R, [&](int r, auto step) {
        dots<step()>(reader, count, queries + r * DP, DP, logits + r * pitch + at, pitch);
      });
    });
  }

  // Calls f(reader, first token, tokens): on the codes themselves while few rows use them, else on floats in blocks.
  template <class F>
  void read(const Source& s, int n, int dim, int width, float* rows, F f) {
    if (R <= 4 && with_codes(s, dim, a.levels, [&](const auto& reader) { f(reader, 0, n); })) return;
    for (int i = 0; i < n; i += BLOCK) {
      const int m = std::min(BLOCK, n - i);
      float_rows({s.data + i * s.stride, s.bits, s.type, s.stride}, m, dim, a.levels, width, rows, codes.data());
      f(Floats{rows, width, width / 2}, i, m);
    }
  }

  void exact(const Source& k, const Source& v, int64_t from, int64_t upto, int64_t limit) {
    int32_t position[64];
    for (int64_t at = from; at < upto; at += 64) {
      const int n = std::min<int64_t>(64, upto - at);
      for (int i = 0; i < n; i++) position[i] = at + i;
      if (!look(position, n, limit)) continue;
      std::fill(weight, weight + n, 1.f);
      key_dots({k.data + (at - from) * k.stride, EXACT, k.type, k.stride}, n);
      fold({v.data + (at - from) * v.stride, EXACT, v.type, v.stride}, n);
    }
  }

  void sinks_and_window() {
    if (start < 0) return;
    const int64_t ring = a.window + a.span, slots = a.sink + ring, from = begin + spans * a.span;
    const int64_t ks = a.D * size_of(a.cache_k_type), vs = a.DV * size_of(a.cache_v_type);
    auto run = [&](int64_t at, int64_t upto, int64_t slot) {
      const int64_t place = (b * a.H + h) * slots + slot;
      exact({a.exact_k + place * ks, EXACT, a.cache_k_type, ks}, {a.exact_v + place * vs, EXACT, a.cache_v_type, vs}, at,
            upto, a.first);
    };
    run(start, std::min(begin, length), 0);
    for (int64_t at = from, upto; at < length; at = upto) {
      upto = std::min(length, at + ring - at % ring);
      run(at, upto, a.sink + at % ring);
    }
  }

  void new_tokens() {
    const int kb = size_of(a.k_type), vb = size_of(a.v_type);
    exact({a.k + (b * a.k_stride[0] + h * a.k_stride[1]) * kb, EXACT, a.k_type, a.k_stride[2] * kb},
          {a.v + (b * a.v_stride[0] + h * a.v_stride[1]) * vb, EXACT, a.v_type, a.v_stride[2] * vb}, a.first, a.first + a.T,
          a.first + a.T);
  }

  void page(int64_t p) {
    const int64_t place = (b * a.H + h) * a.P + p, n = a.page;
    const int32_t* position = a.positions + place * n;
    if (a.table[place] < 0 || !look(position, n, a.first)) return;
    const int64_t* bits = a.menu + 2 * a.tiers[place];
    const int64_t kb = bits[0] == EXACT ? a.D * size_of(a.cache_k_type) : a.D * bits[0] / 8;
    const int64_t vb = bits[1] == EXACT ? a.DV * size_of(a.cache_v_type) : a.DV * bits[1] / 8;
    const uint8_t *keys = a.arena + int64_t(a.table[place]) * 64, *values = keys + n * kb, *radii = values + n * vb;
    const uint8_t* scales = radii + n * (bits[0] == EXACT ? 0 : bits[0] == 8 ? 2 : 1);
    key_dots({keys, bits[0], a.cache_k_type, kb}, n);
    if (bits[0] != EXACT) add_anchors(position, n, radii, bits[0] == 8);
    for (int i = 0; i < n; i++) weight[i] = bits[1] == EXACT ? 1 : f16(load<uint16_t>(scales + 2 * i));
    fold({values, bits[1], a.cache_v_type, vb}, n);
  }

  // q'.c becomes q'.a' + r (q'.c), for each run of tokens that share a span.
  void add_anchors(const int32_t* position, int n, const uint8_t* radii, bool wide) {
    for (int i = 0, end; i < n; i = end) {
      const int64_t index = std::max<int64_t>(0, position[i] - begin) / a.span, low = begin + index * a.span;
      for (end = i; end < n && (index == 0 || position[end] >= low) && position[end] < low + a.span; end++) {}
      const int64_t row = (b * a.H + h) * a.N + index % a.N;
      const float scale = bf16(a.span_scales[2 * row]), unit = bf16(a.span_scales[2 * row + 1]) / (wide ? 1 : 255);
      for (int d = 0; d < a.D; d++) anchor[d] = a.anchors[row * a.D + d] * scale;
      for (int j = i; j < end; j++) radius[j] = (wide ? f16(load<uint16_t>(radii + 2 * j)) : radii[j]) * unit;
      for (int r = 0; r < R; r++) {
        vec sum = {};
        for (int d = 0; d < DP; d += W) sum += load<vec>(turned_q + r * DP + d) * load<vec>(anchor + d);
        float bias = 0, *s = logits + r * pitch;
        for (int j = 0; j < W; j++) bias += sum[j];
        for (int j = i; j < end; j++) s[j] = s[j] * radius[j] + bias;
      }
    }
  }
};

// The softmax over all units of one (row, kv head), and values back in the model's frame.
void combine(const Attend& a, int b, int h, float* results, int splits) {
  const int R = a.G * a.T, VP = line_up(a.DV);
  const int64_t pitch = Unit::result_floats(a);
  std::vector<float> plain(VP), turned(VP), scratch(VP);
  const float unit = 1 / std::sqrt(float(a.DV));
  for (int r = 0; r < R; r++) {
    float top = -INF, total = 0;
    for (int s = 0; s < splits; s++) top = std::max(top, results[s * pitch + r]);
    std::fill(plain.begin(), plain.end(), 0.f);
    std::fill(turned.begin(), turned.end(), 0.f);
    for (int s = 0; s < splits; s++) {
      const float *part = results + s * pitch, factor = top == -INF ? 0 : std::exp(part[r] - top);
      const float *x = part + 2 * line_up(R) + r * VP, *y = x + R * VP;
      total += part[line_up(R) + r] * factor;
      for (int d = 0; d < VP; d++) plain[d] += x[d] * factor, turned[d] += y[d] * factor;
    }
    hadamard(turned.data(), a.DV, a.rot_v, true, scratch.data());
    const float share = total > 0 ? 1 / total : 0;  // a query that sees nothing gets zeros
    for (int d = 0; d < a.DV; d++) plain[d] = (plain[d] + turned[d] * (a.rot_v[d] < 0 ? -unit : unit)) * share;
    from_float(plain.data(), a.q_type, a.DV, a.out + ((b * a.H + h) * R + r) * a.DV * size_of(a.q_type));
  }
}

// Does the mask show a slot after the newest token? Such a slot was dropped, or never written.
bool shows_dropped(const Attend& a) {
  const int64_t end = a.first - a.base + a.T, *step = a.mask_stride;
  if (a.mask_type == NONE || end >= a.mask_columns) return false;
  for (int64_t b = 0; b < (step[0] ? a.B : 1); b++)
    for (int64_t h = 0; h < (step[1] ? a.H * a.G : 1); h++)
      for (int64_t t = 0; t < (step[2] ? a.T : 1); t++) {
        const uint8_t* m = a.mask + (b * step[0] + h * step[1] + t * step[2]) * size_of(a.mask_type);
        if (a.mask_type == BOOL && step[3] == 1) {
          uint8_t any = 0;
          for (int64_t c = end; c < a.mask_columns; c++) any |= m[c];
          if (any) return true;
          continue;
        }
        const float least = a.mask_type == F16 ? -32752.f : std::numeric_limits<float>::lowest() / 2;
        for (int64_t c = end; c < a.mask_columns; c++) {
          const uint8_t* at = m + c * step[3] * size_of(a.mask_type);
          float x = *at ? 0 : -INF;
          if (a.mask_type != BOOL) to_float(at, a.mask_type, 1, &x);
          if (x > least) return true;
        }
      }
  return false;
}

// The statistics of ops/append.py: the moments of the first `count` queries that teach row b's pair scale, or, once it is
// fixed, the energy of the scaled queries.
void observe(const Append& a, int64_t b, int64_t count, bool frozen) {
  std::vector<float> x(a.D);
  for (int64_t hq = 0; hq < a.H * a.G && count > 0; hq++) {
    const int64_t head = b * a.H + hq / a.G;
    double *sum = a.moments + head * (a.D + 1), *energy = a.energy + 2 * head;
    const float* s = a.pair_scale + head * a.D;
    for (int64_t t = 0; t < count; t++) {
      const int64_t at = b * a.q_stride[0] + hq * a.q_stride[1] + t * a.q_stride[2];
      to_float(a.q + at * size_of(a.q_type), a.q_type, a.D, x.data());
      for (int64_t d = 0; d < a.D; d++)
        if (frozen) energy[0] += double(x[d] * s[d]) * (x[d] * s[d]);
        else sum[d] += double(x[d]) * x[d];
    }
    (frozen ? energy[1] : sum[a.D]) += count;
  }
}

}  // namespace

// Returns 1, and writes nothing, when the mask shows a slot that the cache does not hold.
extern "C" int64_t sphkv_attend(const void* packed) {
  const Attend a = load<Attend>(packed);
  if (shows_dropped(a)) return 1;
  int64_t pages = 0;
  for (int64_t b = 0; b < a.B; b++) pages = std::max(pages, a.rows[b * COLUMNS + SPANS] * (a.span / a.page));
  pages = std::min(pages, a.P);
  const int64_t heads = a.B * a.H, threads = pages * heads < 16 ? 1 : a.threads;
  const int64_t wanted = threads == 1 ? 1 : (4 * threads + heads - 1) / heads;
  const int splits = std::max<int64_t>(1, std::min(wanted, pages / 4));
  static thread_local std::vector<float> kept;
  kept.resize(heads * splits * Unit::result_floats(a) + SLACK);
  float* results = line_up(kept);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Unit unit(a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < heads * splits; i++) {
      const int64_t head = i / splits, s = i % splits;
      unit.begin_unit(head / a.H, head % a.H, results + i * Unit::result_floats(a));
      for (int64_t p = pages * s / splits; p < pages * (s + 1) / splits; p++) unit.page(p);
      if (s) continue;
      unit.sinks_and_window();
      unit.new_tokens();
    }
#pragma omp for
    for (int64_t i = 0; i < heads; i++)
      combine(a, i / a.H, i % a.H, results + i * splits * Unit::result_floats(a), splits);
  }
  return 0;
}

// Appends tokens that only enter the sinks or the window. Returns 1, and writes nothing, where ops/append.py must do
// more: a span leaves the window, a row starts, or the write reaches back into what is coded.
extern "C" int64_t sphkv_append(const void* packed) {
  const Append a = load<Append>(packed);
  const int64_t ring = a.window + a.span, slots = a.sink + ring, old_base = a.rows[BASE];
  const int64_t first = a.pos ? old_base + a.pos[0] : a.start >= 0 ? old_base + a.start : a.rows[LENGTH];
  const int64_t end = first + a.T;
  if (a.T > a.span) return 1;
  for (int64_t i = 1; a.pos && i < a.T; i++)
    if (a.pos[i] != a.pos[0] + i) return 1;
  for (int64_t b = 0; b < a.B; b++) {
    const int64_t *row = a.rows + b * COLUMNS, begin = row[START] + a.sink, coded = begin + row[SPANS] * a.span;
    if (row[START] < 0 || first <= row[START] || first < coded || end - coded - a.window >= a.span) return 1;
  }
  for (int64_t b = 0; b < a.B; b++) {
    int64_t *row = a.rows + b * COLUMNS, begin = row[START] + a.sink;
    for (int64_t h = 0; h < a.H; h++) {
      const uint8_t* k = a.k + (b * a.k_stride[0] + h * a.k_stride[1]) * a.k_size;
      const uint8_t* v = a.v + (b * a.v_stride[0] + h * a.v_stride[1]) * a.v_size;
      for (int64_t t = 0, p = first; p < end; t++, p++) {
        const int64_t place = (b * a.H + h) * slots + (p < begin ? p - row[START] : a.sink + p % ring);
        std::memcpy(a.exact_k + place * a.D * a.k_size, k + t * a.k_stride[2] * a.k_size, a.D * a.k_size);
        std::memcpy(a.exact_v + place * a.DV * a.v_size, v + t * a.v_stride[2] * a.v_size, a.DV * a.v_size);
      }
    }
    if (a.q) observe(a, b, row[FROZEN] ? a.T : std::min(a.T, begin + a.window + a.span - first), row[FROZEN]);
    row[LENGTH] = end;
    row[BASE] = old_base + (a.rolling ? 1 : 0);
  }
  return 0;
}
