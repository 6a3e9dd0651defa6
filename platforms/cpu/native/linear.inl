// Linear layers: panels of 16 outputs, vector lanes are outputs, so that no sum crosses lanes and
// every weight byte is read once for all rows of a tile.

constexpr int kPanel = 16;
constexpr int kParts = kPanel / W;  // vectors per panel
constexpr int kAhead = 1024;        // bytes of a prefetch; 512 to 8192 measure alike
constexpr int kGroup = 32;          // k that share an activation scale and a weight scale

SIXFOLD_INLINE int64_t groups_of(int64_t k) { return (k + kGroup - 1) / kGroup; }
// Where the parts of a quantised row lie; each part for all groups together. The sums over k that
// every product of a group needs are made once, with the row.
struct QuantisedRow {
  int8_t* bytes;      // kGroup a group
  float* scale;       // a number is its byte times this
  float* sum;         // of the group's numbers
  int32_t* start;     // -kOffset times the sum of the bytes
  int32_t* halves;    // the same for each half of the group
  int32_t* eighths;   // -8 times the sum of the bytes

  QuantisedRow(int8_t* row, int64_t groups) {
    bytes = row;
    scale = reinterpret_cast<float*>(bytes + groups * kGroup);
    sum = scale + groups;
    start = reinterpret_cast<int32_t*>(sum + groups);
    halves = start + groups;
    eighths = halves + 2 * groups;
  }
};
SIXFOLD_INLINE int64_t quantised_row_bytes(int64_t k) { return groups_of(k) * (kGroup + 24); }

// The same place in a quantised row that lies `bytes` further on.
template <typename T>
SIXFOLD_INLINE const T* of_row(const T* first, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(first) + bytes);
}

template <int F>
SIXFOLD_INLINE nf load_weight(const void* base, int64_t at) {
  if constexpr (F == kF32) return load(static_cast<const float*>(base) + at);
  else if constexpr (F == kBF16) return load_bf16(static_cast<const uint16_t*>(base) + at);
  else return load_f16(static_cast<const uint16_t*>(base) + at);
}

// W outputs of a row from output `at` on, fewer at the matrix's end.
SIXFOLD_INLINE void put_with_bias(const Weight& w, int at, nf value, float* row) {
  const int left = w.n - at, count = left < W ? left : W;
  if (w.bias)
    for (int i = 0; i < count; ++i) value[i] += w.bias[at + i];
  if (count >= W) return store(row + at, value);
  for (int i = 0; i < count; ++i) row[at + i] = value[i];
}

template <int F, int M>
static void float_tile(const Weight& w, int panel, const float* x, int64_t ldx, float* out,
                       int64_t ldo) {
  const int64_t base = static_cast<int64_t>(panel) * w.k * kPanel;
  nf sum[M][kParts] = {};
  for (int64_t k = 0; k < w.k; ++k) {
    nf b[kParts];
    for (int p = 0; p < kParts; ++p) b[p] = load_weight<F>(w.data, base + k * kPanel + p * W);
    for (int m = 0; m < M; ++m) {
      const nf a = splat(x[m * ldx + k]);
      for (int p = 0; p < kParts; ++p) sum[m][p] += a * b[p];
    }
  }
  for (int p = 0; p < kParts; ++p) {
    const int at = panel * kPanel + p * W;
    if (at >= w.n) return;
    for (int m = 0; m < M; ++m) put_with_bias(w, at, sum[m][p], out + m * ldo);
  }
}

template <int F, int M, bool kMin>
static void quantised_tile(const Weight& w, int panel, const int8_t* x, float* out, int64_t ldo) {
  constexpr int P = kPartsAtOnce;
  constexpr int kHalves = F == kQ8Half ? 2 : 1;  // scales a group
  constexpr int kStepK = kGroup / kHalves;
  constexpr int kStepBytes = kStepK * kPanel / (F == kQ4 ? 2 : 1);
  constexpr bool kStarts = F == kQ4 ? !kMin : kOffset != 0;
  const int64_t groups = groups_of(w.k), steps = groups * kHalves, row = quantised_row_bytes(w.k);
  const QuantisedRow first(const_cast<int8_t*>(x), groups);
  const int32_t* start = F == kQ8Half ? first.halves : F == kQ8 ? first.start : first.eighths;
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + panel * steps * kStepBytes;
  for (int part = 0; part < kParts; part += P) {
    const int at = panel * kPanel + part * W;
    if (at >= w.n) return;
    nf sum[M][P] = {};
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t g = s / kHalves, where = (panel * steps + s) * kPanel + part * W;
      ni products[M][P];
      for (int m = 0; m < M; ++m)
        for (int p = 0; p < P; ++p)
          products[m][p] = kStarts ? splat_int(of_row(start, m * row)[s]) : ni{};
      const uint8_t* here = data + s * kStepBytes + part * W * 4;
      // Few rows read each byte once: past the caches, which hold what the host runs between steps.
      if constexpr (M <= 3)
        for (int i = 0; i < kStepBytes; i += 64) __builtin_prefetch(here + kAhead + i, 0, 0);
      if constexpr (F == kQ4) products_of_nibbles<M, P, kStepK>(here, x + s * kStepK, row, products);
      else products_of_bytes<M, P, kStepK>(here, x + s * kStepK, row, products);
      for (int p = 0; p < P; ++p) {
        const nf d = load_f16(w.scales + where + p * W);
        nf low{};
        if constexpr (kMin) low = load_f16(w.mins + where + p * W);
        for (int m = 0; m < M; ++m) {
          sum[m][p] += to_float(products[m][p]) * (d * of_row(first.scale, m * row)[g]);
          if constexpr (kMin) sum[m][p] -= low * of_row(first.sum, m * row)[g];
        }
      }
    }
    for (int p = 0; p < P; ++p)
      for (int m = 0; m < M; ++m) put_with_bias(w, at + p * W, sum[m][p], out + m * ldo);
  }
}

constexpr int kFloatRows = W == 16 ? 12 : (W == 8 ? 6 : 4);

template <int F, int M>
SIXFOLD_INLINE void tile(const Weight& w, int panel, const Instruction& c, int64_t row) {
  float* out = reinterpret_cast<float*>(c.a[3]) + row * c.a[4];
  if constexpr (F >= kQ8) {
    const int8_t* x = reinterpret_cast<const int8_t*>(c.a[5]) + row * quantised_row_bytes(w.k);
    if (F != kQ8Half && w.has_min) quantised_tile<F, M, F != kQ8Half>(w, panel, x, out, c.a[4]);
    else quantised_tile<F, M, false>(w, panel, x, out, c.a[4]);
  } else {
    float_tile<F, M>(w, panel, reinterpret_cast<const float*>(c.a[0]) + row * c.a[1], c.a[1], out,
                     c.a[4]);
  }
}

#if defined(__AMX_INT8__)
#include "linear_amx.inl"
#else
template <int F>
SIXFOLD_INLINE int64_t amx_rows(const Weight&, const Instruction&, int, int, int64_t, int64_t) {
  return 0;
}
#endif

template <int F>
static void linear_block(const Weight& w, const Instruction& c, int panel_first, int panel_last,
                         int64_t row_first, int64_t row_last) {
  constexpr int kRows = F >= kQ8 ? kTileRows : kFloatRows;
  for (int64_t row = row_first; row < row_last;) {
    const int64_t left = row_last - row;
    if (const int64_t done = amx_rows<F>(w, c, panel_first, panel_last, row, left)) {
      row += done;
      continue;
    }
    // A tile of one or two rows is slow: 7 and 8 rows are cut 4 + 3 and 4 + 4, not 6 + 1 and 6 + 2.
    const bool uneven = kRows == 6 && (left == 7 || left == 8);
    const int64_t size = left >= kRows && !uneven ? kRows : left >= 4 ? 4 : left;
    for (int panel = panel_first; panel < panel_last; ++panel) {
      if (size > 4) tile<F, kRows>(w, panel, c, row);
      else if (size == 4) tile<F, 4>(w, panel, c, row);
      else if (size == 3) tile<F, 3>(w, panel, c, row);
      else if (size == 2) tile<F, 2>(w, panel, c, row);
      else tile<F, 1>(w, panel, c, row);
    }
    row += size;
  }
}

// A task is a block of panels that fits the second-level cache, times a block of rows.
struct LinearSplit {
  int panels, panel_blocks, rows, row_blocks;
};

SIXFOLD_INLINE LinearSplit split_linear(const Weight& w, int64_t rows) {
  const int panels = (w.n + kPanel - 1) / kPanel;
  constexpr int64_t kBytes[] = {64, 32, 32, 17, 10, 18};
  const int64_t panel_bytes = w.k * kBytes[w.format];
  int64_t block = (rows <= 16 ? 96 << 10 : 192 << 10) / panel_bytes;
  block = block < 1 ? 1 : block;
  // Enough tasks for uneven cores, also when the matrix is small.
  const int64_t most = (panels + 7) / 8;
  if (block > most) block = most;
  const int row_block = 96;
  return {static_cast<int>(block), static_cast<int>((panels + block - 1) / block), row_block,
          static_cast<int>((rows + row_block - 1) / row_block)};
}

static int linear_tasks(const Instruction& c, const Step& step) {
  const int64_t rows = c.rows < 0 ? step.tokens : c.rows;
  const LinearSplit s = split_linear(*reinterpret_cast<const Weight*>(c.a[2]), rows);
  return s.panel_blocks * s.row_blocks;
}

static void linear_run(const Instruction& c, const Step& step, int task) {
  const Weight& w = *reinterpret_cast<const Weight*>(c.a[2]);
  const int64_t rows = c.rows < 0 ? step.tokens : c.rows;
  const LinearSplit s = split_linear(w, rows);
  const int panels = (w.n + kPanel - 1) / kPanel;
  const int first = task / s.row_blocks * s.panels;
  const int last = first + s.panels < panels ? first + s.panels : panels;
  const int64_t row = static_cast<int64_t>(task % s.row_blocks) * s.rows;
  const int64_t stop = row + s.rows < rows ? row + s.rows : rows;
  switch (w.format) {
    case kF32: return linear_block<kF32>(w, c, first, last, row, stop);
    case kBF16: return linear_block<kBF16>(w, c, first, last, row, stop);
    case kF16: return linear_block<kF16>(w, c, first, last, row, stop);
    case kQ8: return linear_block<kQ8>(w, c, first, last, row, stop);
    case kQ8Half: return linear_block<kQ8Half>(w, c, first, last, row, stop);
    default: return linear_block<kQ4>(w, c, first, last, row, stop);
  }
}

// Rounds to nearest, ties to even. A group with an infinity or NaN has the scale NaN, so that every
// output of its row is NaN.
static void quantise_row(const float* x, int64_t width, int8_t* out) {
  const int64_t groups = groups_of(width);
  const QuantisedRow row(out, groups);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = g * kGroup;
    float padded[kGroup] = {};
    const float* from = x + at;
    if (width - at < kGroup) {
      for (int i = 0; i < width - at; ++i) padded[i] = from[i];
      from = padded;
    }
    nf largest{}, nothing{};
    for (int i = 0; i < kGroup; i += W) {
      const nf v = load(from + i);
      largest = max_of(max_of(v, -v), largest);
      nothing = nothing + v * 0.0f;
    }
    const float most = max_lane(largest), poison = sum_of(nothing);
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    ni sum[2] = {};
    for (int i = 0; i < kGroup; i += W) {
      const ni q = to_steps(load(from + i), inverse);
      store_bytes(row.bytes + at + i, q);
      sum[i / (kGroup / 2)] += q;
    }
    const int32_t first = sum_of_ints(sum[0]), second = sum_of_ints(sum[1]);
    row.scale[g] = most / 127.0f + poison;
    row.sum[g] = row.scale[g] * static_cast<float>(first + second);
    row.start[g] = -kOffset * (first + second);
    row.halves[2 * g] = -kOffset * first, row.halves[2 * g + 1] = -kOffset * second;
    row.eighths[g] = -8 * (first + second);
  }
}
