// Attention of new queries over one site's coded cache.
//
//   symbol       shape or unit               meaning
//   B H G T      -                           rows of the batch, kv heads, query heads per kv head, new tokens
//   R            G * T                       query rows of one kv head (in a unit: of its tokens); row r = g * T + t
//   D DV         multiples of 8              head_dim of keys, of values; DP and VP: rounded up to whole cache lines
//   P page       -, tokens                   pages of a (row, kv head), tokens of a page
//   N span       -, tokens                   anchor rows of a (row, kv head), tokens that share one
//   M            -                           tiers of pages of kept tokens; 0 where pages hold whole runs of tokens
//   q            [R, DP]                     queries times the softmax scale
//   turned_q     [R, DP]                     q' = H(s q), in the frame of the key codes
//   logits       [R, pitch]                  of one segment: at most `pitch` tokens of one page, or of the exact slots
//   bias         [rows, pitch]               0 or the additive mask where a query may look, -inf elsewhere
//   plain        [R, VP]                     running sum of p v over exact values
//   turned       [R, VP]                     running sum of p r c over coded values, turned back once at the end
//   products     [N, R]                      q'.a' of the anchors, each found when a page first needs it
//
// A unit of work is one (row, kv head, block of new tokens, run of pages): its queries against those pages. It leaves
// (top, total, plain, turned), and the units that share queries are combined at the end. Up to 4 query rows read codes
// straight into registers; more rows share float rows, BLOCK tokens at a time, in first-level cache. All is float32.

namespace {

// Packed by binding.py in this order; every field has 8 bytes.
struct Attend {
  const uint8_t* arena;
  const int32_t* table;
  const uint8_t* tiers;
  const int32_t *positions, *held;  // pages of kept tokens hold their positions; `held` says how many are in use
  const int8_t* anchors;
  const uint16_t* span_scales;
  const uint8_t *exact_k, *exact_v;
  const float* pair_scale;
  const int64_t* rows;
  const uint8_t *q, *k, *v, *mask;
  uint8_t* out;
  int64_t B, H, G, T, D, DV, P, N, M, q_type, k_type, v_type, mask_type;
  int64_t q_stride[3], k_stride[3], v_stride[3], mask_stride[4], mask_columns;
  int64_t first, base, columns, causal, threads;
  int64_t cache_k_type, cache_v_type, sink, window, span, page;
  const int64_t* menu;  // [tiers, 2]: bits of K, of V
  const float *rot_k, *rot_v, *levels;
  double scale, hidden;  // an additive mask hides at `hidden` and below
};

struct Unit {
  const Attend& a;
  int b, h, first_t, T, R, DP, VP, pitch;  // T, R: query tokens and rows of this unit, from query token first_t
  int64_t start, length, spans, origin;  // of row b; origin: position where its first span begins
  std::vector<float> floats;
  std::vector<uint8_t> codes, known;  // known: of which anchors the products are there
  std::vector<const float*> bias_of;
  float *q, *turned_q, *logits, *bias, *rows_k, *rows_v, *radius, *weight, *anchor, *products;
  float *top, *total, *plain, *turned;  // the result

  explicit Unit(const Attend& a) : a(a), DP(line_up(a.D)), VP(line_up(a.DV)) {
    const int R = a.G * query_block(a);
    pitch = line_up(std::max<int64_t>(a.page, 64));
    floats.assign(R * (2 * (DP + pitch) + a.N) + BLOCK * (DP + VP) + 2 * pitch + DP + 5 * SLACK, 0.f);
    codes.resize(2 * (std::max(DP, VP) + 2 * SLACK));
    bias_of.resize(R);
    float* at = line_up(floats);
    auto take = [&](int n) { return std::exchange(at, at + line_up(n)); };
    q = take(R * DP), turned_q = take(R * DP), logits = take(R * pitch), bias = take(R * pitch);
    rows_k = take(BLOCK * DP + SLACK), rows_v = take(BLOCK * VP + SLACK), anchor = take(DP);
    radius = take(pitch), weight = take(pitch), products = take(R * a.N);
  }

  // Query tokens of a unit: so many that a decoded page serves up to ROWS query rows, and alike for all units.
  static int query_block(const Attend& a) {
    const int64_t most = std::max<int64_t>(1, ROWS / a.G), blocks = (a.T + most - 1) / most;
    return (a.T + blocks - 1) / blocks;
  }
  static int64_t result_floats(const Attend& a) {
    const int R = a.G * query_block(a);
    return 2 * line_up(R) + 2 * R * line_up(a.DV);
  }

  void begin(int64_t head, int64_t block, float* result) {
    b = head / a.H, h = head % a.H, first_t = block * query_block(a);
    T = std::min<int64_t>(query_block(a), a.T - first_t), R = a.G * T;
    const int64_t* counters = a.rows + b * COLUMNS;
    start = counters[START], length = std::min(counters[LENGTH], a.first), spans = counters[SPANS];
    origin = start + a.sink;
    top = result, total = top + line_up(R), plain = total + line_up(R), turned = plain + R * VP;
    std::fill(top, total, -INF);
    std::fill(total, turned + R * VP, 0.f);
    const float *s = a.pair_scale + (b * a.H + h) * a.D, unit = 1 / std::sqrt(float(a.D));
    for (int r = 0; r < R; r++) {
      float *x = q + r * DP, *y = turned_q + r * DP;
      int64_t at = b * a.q_stride[0] + (h * a.G + r / T) * a.q_stride[1] + (first_t + r % T) * a.q_stride[2];
      to_float(a.q + at * size_of(a.q_type), a.q_type, a.D, x);
      for (int d = 0; d < a.D; d++) {
        x[d] *= float(a.scale);
        y[d] = x[d] * s[d] * (a.rot_k[d] < 0 ? -unit : unit);
      }
      hadamard(y, a.D, a.rot_k, false, anchor);
    }
    std::fill(anchor, anchor + DP, 0.f);
    known.assign(a.N, 0);
  }

  // Which tokens each query sees, as a bias; false when none is seen. Tokens at or after `limit` are not there.
  bool look(const int32_t* position, int n, int64_t limit) {
    const int32_t low = std::max<int64_t>(a.base, 0), high = std::min(limit, a.base + a.columns);
    const int by_head = a.mask_type != NONE && a.mask_stride[1] ? a.G : 1;
    const int by_token = a.causal || (a.mask_type != NONE && a.mask_stride[2]) ? T : 1;
    int gaps = 0, outside = 0;
    for (int i = 0; i < n; i++) {
      gaps |= position[i] - position[0] - i;
      outside |= position[i] < low || position[i] >= high;
    }
    for (int j = 0; j < by_head * by_token; j++) {
      float* to = bias + j * pitch;
      const int t = first_t + j % by_token;
      const int32_t stop = a.causal ? std::min<int64_t>(high, a.base + t + 1) : high;
      for (int i = 0; i < n; i++) to[i] = position[i] >= low && position[i] < stop ? 0.f : -INF;
      for (int i = n; i < round_up(n, W); i++) to[i] = -INF;
      if (a.mask_type != NONE) {
        int64_t at = b * a.mask_stride[0] + (h * a.G + j / by_token) * a.mask_stride[1] + t * a.mask_stride[2];
        add_mask(to, position, n, at, !gaps && !outside && a.mask_stride[3] == 1);
      }
    }
    for (int r = 0; r < R; r++)
      bias_of[r] = bias + ((by_head > 1 ? r / T : 0) * by_token + (by_token > 1 ? r % T : 0)) * pitch;
    float best = -INF;
    for (int j = 0; j < by_head * by_token; j++)
      for (int i = 0; i < n; i++) best = std::max(best, bias[j * pitch + i]);
    return best > -INF;
  }

  void add_mask(float* to, const int32_t* position, int n, int64_t at, bool run) {
    const int size = size_of(a.mask_type);
    if (run) {
      const uint8_t* m = a.mask + (at + position[0] - a.base) * size;
      if (a.mask_type == BOOL) for (int i = 0; i < n; i++) to[i] = m[i] ? to[i] : -INF;
      else to_float(m, a.mask_type, n, radius);  // free at this time
      for (int i = 0; i < n && a.mask_type != BOOL; i++) to[i] += radius[i];
      return;
    }
    for (int i = 0; i < n; i++) {
      if (to[i] == -INF) continue;
      const uint8_t* m = a.mask + (at + (position[i] - a.base) * a.mask_stride[3]) * size;
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
      for (int i = 0; i < count && values.bits == EXACT; i++)
        if (weight[at + i] == 0) std::fill(rows_v + i * VP, rows_v + (i + 1) * VP, 0.f);
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
    const int64_t ring = a.window + a.span, slots = a.sink + ring, from = origin + spans * a.span;
    const int64_t ks = a.D * size_of(a.cache_k_type), vs = a.DV * size_of(a.cache_v_type);
    auto run = [&](int64_t at, int64_t upto, int64_t slot) {
      const int64_t place = (b * a.H + h) * slots + slot;
      exact({a.exact_k + place * ks, EXACT, a.cache_k_type, ks}, {a.exact_v + place * vs, EXACT, a.cache_v_type, vs},
            at, upto, a.first);
    };
    run(start, std::min(origin, length), 0);
    for (int64_t at = from, upto; at < length; at = upto) {
      upto = std::min(length, at + ring - at % ring);
      run(at, upto, a.sink + at % ring);
    }
  }

  void new_tokens() {
    const int kb = size_of(a.k_type), vb = size_of(a.v_type);
    exact({a.k + (b * a.k_stride[0] + h * a.k_stride[1]) * kb, EXACT, a.k_type, a.k_stride[2] * kb},
          {a.v + (b * a.v_stride[0] + h * a.v_stride[1]) * vb, EXACT, a.v_type, a.v_stride[2] * vb}, a.first,
          a.first + a.T, a.first + a.T);
  }

  void page(int64_t p) {
    const int64_t place = (b * a.H + h) * a.P + p, *bits = a.menu + 2 * a.tiers[place];
    if (a.table[place] < 0) return;
    const uint8_t* at = a.arena + int64_t(a.table[place]) * 64;
    auto field = [&](int64_t width) { return std::exchange(at, at + a.page * width); };
    const int64_t kb = bits[0] == EXACT ? a.D * size_of(a.cache_k_type) : a.D * bits[0] / 8;
    const int64_t vb = bits[1] == EXACT ? a.DV * size_of(a.cache_v_type) : a.DV * bits[1] / 8;
    const uint8_t *keys = field(kb), *values = field(vb), *radii = field(bits[0] == EXACT ? 0 : bits[0] == 8 ? 2 : 1);
    const uint8_t* scales = field(bits[1] == EXACT ? 0 : 2);
    const int32_t* position = a.M ? reinterpret_cast<const int32_t*>(at) : a.positions + place * a.page;
    int n = a.page;
    while (n && position[n - 1] < 0) n--;  // a head's last page of a tier is filled in part
    if (!look(position, n, a.first)) return;
    key_dots({keys, bits[0], a.cache_k_type, kb}, n);
    if (bits[0] != EXACT) add_anchors(position, n, radii, bits[0] == 8);
    for (int i = 0; i < n; i++) weight[i] = bits[1] == EXACT ? 1 : f16(load<uint16_t>(scales + 2 * i));
    for (int i = 0; i < n; i++)
      weight[i] = position[i] < 0 ? 0 : weight[i];  // an empty slot may hold another tier's bytes, and 0 * NaN is NaN
    fold({values, bits[1], a.cache_v_type, vb}, n);
  }

  // q'.c becomes q'.a' + r (q'.c), for each run of tokens that share a span.
  void add_anchors(const int32_t* position, int n, const uint8_t* radii, bool wide) {
    for (int i = 0, end; i < n; i = end) {
      const int64_t index = std::max<int64_t>(0, position[i] - origin) / a.span, low = origin + index * a.span;
      for (end = i; end < n && (index == 0 || position[end] >= low) && position[end] < low + a.span; end++) {}
      const int64_t slot = index % a.N, row = (b * a.H + h) * a.N + slot;
      const float unit = bf16(a.span_scales[2 * row + 1]) / (wide ? 1 : 255), *bias = anchor_products(slot);
      for (int j = i; j < end; j++) radius[j] = (wide ? f16(load<uint16_t>(radii + 2 * j)) : radii[j]) * unit;
      for (int r = 0; r < R; r++) {
        float* s = logits + r * pitch;
        for (int j = i; j < end; j++) s[j] = s[j] * radius[j] + bias[r];
      }
    }
  }

  // q'.a' of each query. Pages of one span share them, and any page of kept tokens may need any.
  const float* anchor_products(int64_t index) {
    float* out = products + index * R;
    if (std::exchange(known[index], 1)) return out;
    const int64_t row = (b * a.H + h) * a.N + index;
    const float scale = bf16(a.span_scales[2 * row]);
    for (int d = 0; d < a.D; d++) anchor[d] = a.anchors[row * a.D + d] * scale;
    for (int r = 0; r < R; r++) {
      vec sum = {};
      for (int d = 0; d < DP; d += W) sum += load<vec>(turned_q + r * DP + d) * load<vec>(anchor + d);
      out[r] = 0;
      for (int j = 0; j < W; j++) out[r] += sum[j];
    }
    return out;
  }
};

// The softmax over all splits of the unit's queries, and values back in the model's frame.
void combine(const Unit& u, const float* results, int splits) {
  const Attend& a = u.a;
  const int64_t pitch = Unit::result_floats(a), lines = line_up(u.R);
  std::vector<float> plain(u.VP), turned(u.VP), scratch(u.VP);
  const float unit = 1 / std::sqrt(float(a.DV));
  for (int r = 0; r < u.R; r++) {
    float top = -INF, total = 0;
    for (int s = 0; s < splits; s++) top = std::max(top, results[s * pitch + r]);
    std::fill(plain.begin(), plain.end(), 0.f);
    std::fill(turned.begin(), turned.end(), 0.f);
    for (int s = 0; s < splits; s++) {
      const float *part = results + s * pitch, factor = top == -INF ? 0 : std::exp(part[r] - top);
      const float *x = part + 2 * lines + r * u.VP, *y = x + u.R * u.VP;
      total += part[lines + r] * factor;
      for (int d = 0; d < u.VP; d++) plain[d] += x[d] * factor, turned[d] += y[d] * factor;
    }
    hadamard(turned.data(), a.DV, a.rot_v, true, scratch.data());
    const float share = total > 0 ? 1 / total : 0;  // a query that sees nothing gets zeros
    for (int d = 0; d < a.DV; d++) plain[d] = (plain[d] + turned[d] * (a.rot_v[d] < 0 ? -unit : unit)) * share;
    const int64_t row = ((u.b * a.H + u.h) * a.G + r / u.T) * a.T + u.first_t + r % u.T;
    from_float(plain.data(), a.q_type, a.DV, a.out + row * a.DV * size_of(a.q_type));
  }
}

// Pages of a head that may hold tokens, from its first on.
int64_t pages_of(const Attend& a, int64_t head) {
  const int32_t* held = a.held + head * a.M;
  const int64_t runs = a.rows[head / a.H * COLUMNS + SPANS] * (a.span / a.page);
  return std::min(a.M ? std::accumulate(held, held + a.M, int64_t(0)) : runs, a.P);
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
        for (int64_t c = end; c < a.mask_columns; c++) {
          const uint8_t* at = m + c * step[3] * size_of(a.mask_type);
          float x = *at ? 0 : -INF;
          if (a.mask_type != BOOL) to_float(at, a.mask_type, 1, &x);
          if (x > a.hidden) return true;
        }
      }
  return false;
}

}  // namespace

// Returns 1, and writes nothing, when the mask shows a slot that the cache does not hold.
extern "C" int64_t sphkv_attend(const void* packed) {
  const Attend a = load<Attend>(packed);
  if (shows_dropped(a)) return 1;
  int64_t most = 0;
  for (int64_t head = 0; head < a.B * a.H; head++) most = std::max(most, pages_of(a, head));
  const int64_t blocks = (a.T + Unit::query_block(a) - 1) / Unit::query_block(a), tasks = a.B * a.H * blocks;
  const int64_t threads = (most + blocks) * a.B * a.H < 16 ? 1 : a.threads;
  const int64_t wanted = threads == 1 ? 1 : (4 * threads + tasks - 1) / tasks;
  const int splits = std::max<int64_t>(1, std::min(wanted, most / 4));
  const int64_t size = Unit::result_floats(a);
  static thread_local std::vector<float> memory;
  memory.resize((splits > 1 ? tasks * splits * size : threads * size) + SLACK);
  float* results = line_up(memory);
  std::vector<int> done(tasks);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Unit unit(a);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < tasks * splits; i++) {
      const int64_t task = i / splits, s = i % splits, n = a.M ? pages_of(a, task / blocks) : most;
      float* result = results + (splits > 1 ? i : thread()) * size;
      unit.begin(task / blocks, task % blocks, result);
      for (int64_t p = n * s / splits; p < n * (s + 1) / splits; p++) unit.page(p);
      if (s == 0) unit.sinks_and_window(), unit.new_tokens();
      if (splits == 1) combine(unit, result, 1);
      else if (__atomic_add_fetch(&done[task], 1, __ATOMIC_ACQ_REL) == splits)  // the last one; no barrier to wait at
        combine(unit, results + task * splits * size, splits);
    }
  }
  return 0;
}
