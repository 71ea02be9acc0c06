// The append of tokens that only enter the sinks or the window: what nearly every step of a decode does.

namespace {

// Packed by binding.py in this order; every field has 8 bytes.
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

// The statistics of ops/append.py: the moments of the first `count` queries, which teach row b's pair scale, or, once
// that is frozen, the energy of the scaled queries.
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

// Appends tokens that only enter the sinks or the window. Returns 1, and writes nothing, where ops/append.py must do
// more: a span leaves the window, a row starts, or the write reaches back into what is coded.
extern "C" int64_t sphkv_append(const void* packed) {
  const Append a = load<Append>(packed);
  const int64_t ring = a.window + a.span, slots = a.sink + ring, old_base = a.rows[BASE];
  const int64_t first = a.pos ? old_base + a.pos[0] : a.start >= 0 ? old_base + a.start : a.rows[LENGTH];
  const int64_t end = first + a.T;
  if (a.T > a.span || first < old_base || first > a.rows[LENGTH]) return 1;
  for (int64_t i = 1; a.pos && i < a.T; i++)
    if (a.pos[i] != a.pos[0] + i) return 1;
  for (int64_t b = 0; b < a.B; b++) {
    const int64_t *row = a.rows + b * COLUMNS, begin = row[START] + a.sink, coded = begin + row[SPANS] * a.span;
    if (row[START] < 0 || first <= row[START] || (row[SPANS] && first < coded)) return 1;
    if (end - coded - a.window >= a.span) return 1;
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
