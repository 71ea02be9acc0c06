// Queries times keys, and weights times values, for up to 4 query rows and any reader of codes.cpp.

namespace {

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

}  // namespace
