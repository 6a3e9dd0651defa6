// Linear layers: panels of 16 outputs, vector lanes are outputs, so that no sum crosses lanes and
// every weight byte is read once for all rows of a tile.

constexpr int kPanel = 16;
constexpr int kParts = kPanel / W;  // vectors per panel
constexpr int kGroup = 32;          // k that share an activation scale and a weight scale

SIXFOLD_INLINE int64_t groups_of(int64_t k) { return (k + kGroup - 1) / kGroup; }
// A quantised row, per group: 32 bytes, the same as 32 16-bit numbers (only written where a level
// reads them), a float scale and two int32 sums (of 16 each); each kind for all groups together.
SIXFOLD_INLINE int64_t quantised_row_bytes(int64_t k) { return groups_of(k) * (3 * kGroup + 12); }

template <int F>
SIXFOLD_INLINE nf load_weight(const void* base, int64_t at) {
  if constexpr (F == kF32) return load(static_cast<const float*>(base) + at);
  else if constexpr (F == kBF16) return load_bf16(static_cast<const uint16_t*>(base) + at);
  else return load_f16(static_cast<const uint16_t*>(base) + at);
}

SIXFOLD_INLINE void put(float* out, nf value, int count) {
  if (count >= W) return store(out, value);
  for (int i = 0; i < count; ++i) out[i] = value[i];
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
    const int count = w.n - at;
    for (int m = 0; m < M; ++m) {
      nf value = sum[m][p];
      if (w.bias)
        for (int i = 0; i < (count < W ? count : W); ++i) value[i] += w.bias[at + i];
      put(out + m * ldo + at, value, count);
    }
  }
}

template <int F, int M, bool kMin>
static void quantised_tile(const Weight& w, int panel, const int8_t* x, float* out, int64_t ldo) {
  const int64_t groups = groups_of(w.k), row = quantised_row_bytes(w.k);
  constexpr int kGroupBytes = F == kQ4 ? kGroup * kPanel / 2 : kGroup * kPanel;
  Activations a[M];
  const float* scale[M];
  const int32_t* total[M];
  for (int m = 0; m < M; ++m) {
    a[m].a8 = x + m * row;
    a[m].a16 = reinterpret_cast<const int16_t*>(a[m].a8 + groups * kGroup);
    scale[m] = reinterpret_cast<const float*>(a[m].a16 + groups * kGroup);
    total[m] = reinterpret_cast<const int32_t*>(scale[m] + groups);
  }
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + panel * groups * kGroupBytes;
  for (int p = 0; p < kParts; ++p) {
    const int at = panel * kPanel + p * W;
    if (at >= w.n) return;
    nf sum[M] = {};
    if constexpr (F == kQ8Half) {
      for (int64_t g = 0; g < 2 * groups; ++g) {
        ni products[M];
        products_of_bytes<M, kGroup / 2>(data + g * kGroupBytes / 2 + p * W * 4, a,
                                         g * kGroup / 2, products);
        const nf d = load_f16(w.scales + (panel * 2 * groups + g) * kPanel + p * W);
        for (int m = 0; m < M; ++m)
          sum[m] += to_float(products[m] - kOffset * total[m][g]) * (d * scale[m][g / 2]);
      }
    } else for (int64_t g = 0; g < groups; ++g) {
      const int64_t where = (panel * groups + g) * kPanel + p * W;
      ni products[M];
      const uint8_t* here = data + g * kGroupBytes + p * W * 4;
      if constexpr (F == kQ4) products_of_nibbles<M, kGroup>(here, a, g * kGroup, products);
      else products_of_bytes<M, kGroup>(here, a, g * kGroup, products);
      const nf d = load_f16(w.scales + where);
      nf low{};
      if constexpr (kMin) low = load_f16(w.mins + where);
      constexpr int middle = F == kQ8 ? kOffset : (kMin ? 0 : 8);
      for (int m = 0; m < M; ++m) {
        const int32_t all = total[m][2 * g] + total[m][2 * g + 1];
        sum[m] += to_float(products[m] - middle * all) * (d * scale[m][g]);
        if constexpr (kMin) sum[m] -= low * (scale[m][g] * static_cast<float>(all));
      }
    }
    const int count = w.n - at;
    for (int m = 0; m < M; ++m) {
      nf value = sum[m];
      if (w.bias)
        for (int i = 0; i < (count < W ? count : W); ++i) value[i] += w.bias[at + i];
      put(out + m * ldo + at, value, count);
    }
  }
}

constexpr int kTileRows = W == 16 ? 8 : W == 8 ? 6 : 4;
constexpr int kFloatRows = W == 16 ? 12 : (W == 8 ? 6 : 4);

template <int F, int M>
SIXFOLD_INLINE void tile(const Weight& w, int panel, const Instruction& c, int64_t row) {
  float* out = reinterpret_cast<float*>(c.a[3]) + row * c.a[4];
  if constexpr (F >= kQ8) {
    const int8_t* x = reinterpret_cast<const int8_t*>(c.a[5]) + row * quantised_row_bytes(w.k);
    if (w.has_min) quantised_tile<F, M, true>(w, panel, x, out, c.a[4]);
    else quantised_tile<F, M, false>(w, panel, x, out, c.a[4]);
  } else {
    float_tile<F, M>(w, panel, reinterpret_cast<const float*>(c.a[0]) + row * c.a[1], c.a[1], out,
                     c.a[4]);
  }
}

template <int F>
static void linear_block(const Weight& w, const Instruction& c, int panel_first, int panel_last,
                         int64_t row_first, int64_t row_last) {
  constexpr int kRows = F >= kQ8 ? kTileRows : kFloatRows;
  for (int64_t row = row_first; row < row_last;) {
    const int64_t left = row_last - row;
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

// Rounds to nearest, ties to even. Infinities and NaN in the row give a row of no meaning.
static void quantise_row(const float* x, int64_t width, int8_t* out) {
  const int64_t groups = groups_of(width);
  int16_t* wide = reinterpret_cast<int16_t*>(out + groups * kGroup);
  float* scales = reinterpret_cast<float*>(wide + groups * kGroup);
  int32_t* totals = reinterpret_cast<int32_t*>(scales + groups);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = g * kGroup;
    float padded[kGroup] = {};
    const float* from = x + at;
    if (width - at < kGroup) {
      for (int i = 0; i < width - at; ++i) padded[i] = from[i];
      from = padded;
    }
    nf largest{};
    for (int i = 0; i < kGroup; i += W) {
      const nf v = load(from + i);
      largest = max_of(max_of(v, -v), largest);
    }
    const float most = max_lane(largest);
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    ni sum[2] = {};
    for (int i = 0; i < kGroup; i += W) {
      const ni q = to_steps(load(from + i), inverse);
      const bytes_w narrow = __builtin_convertvector(q, bytes_w);
      __builtin_memcpy(out + at + i, &narrow, W);
      if constexpr (kWide) {
        const shorts_w half = __builtin_convertvector(q, shorts_w);
        __builtin_memcpy(wide + at + i, &half, 2 * W);
      }
      sum[i / (kGroup / 2)] += q;
    }
    scales[g] = most / 127.0f;
    totals[2 * g] = sum_of_ints(sum[0]), totals[2 * g + 1] = sum_of_ints(sum[1]);
  }
}
