// Codes of 2, 3, 4 and 8 bits to floats: W at a time in registers, or a token at a time into rows of floats.
//
//   levels       [3, 16], [256]              values of the codes of 2, 3 and 4 bits, repeated to 16 each; and of 8
//   plane        elements                    codes of b bits: byte i holds the elements i, i + plane, i + 2 plane ..

namespace {

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

}  // namespace
