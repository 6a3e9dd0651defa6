// Linear layers: panels of 16 outputs, vector lanes are outputs, so that no sum crosses lanes and
// every weight byte is read once for all rows of a tile.

constexpr int kPanel = 16;
constexpr int kParts = kPanel / W;  // vectors per panel
constexpr int kGroup = 32;          // k that share an activation scale and a weight scale

SIXFOLD_INLINE int64_t groups_of(int64_t k) { return (k + kGroup - 1) / kGroup; }
// A quantised row: 32 bytes per group, then one float scale and one int32 sum per group.
SIXFOLD_INLINE int64_t quantised_row_bytes(int64_t k) { return groups_of(k) * (kGroup + 8); }

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

// The integer products of one group for M rows, W outputs.
template <int F, int M>
SIXFOLD_INLINE void group_products(const uint8_t* data, const int8_t* const* a, int64_t at,
                                   ni* sum) {
  for (int m = 0; m < M; ++m) sum[m] = ni{};
  if constexpr (F == kQ8) {
    for (int step = 0; step < kGroup / 4; ++step) {
      const ni w = weight_bytes(data + step * kPanel * 4);
      for (int m = 0; m < M; ++m) {
        int32_t four;
        __builtin_memcpy(&four, a[m] + at + step * 4, 4);
        sum[m] = dot_signed(sum[m], w, four);
      }
    }
  } else {
    for (int step = 0; step < kGroup / 8; ++step) {
      const ni both = (ni)*reinterpret_cast<const vi*>(data + step * kPanel * 4);
      const ni low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
      for (int m = 0; m < M; ++m) {
        int32_t four[2];
        __builtin_memcpy(four, a[m] + at + step * 8, 8);
        sum[m] = dot_nibble(sum[m], low, four[0]);
        sum[m] = dot_nibble(sum[m], high, four[1]);
      }
    }
  }
}

template <int F, int M>
static void quantised_tile(const Weight& w, int panel, const int8_t* x, float* out, int64_t ldo) {
  const int64_t groups = groups_of(w.k), row = quantised_row_bytes(w.k);
  constexpr int kGroupBytes = F == kQ8 ? kGroup * kPanel : kGroup * kPanel / 2;
  const int8_t* a[M];
  const float* scale[M];
  const int32_t* total[M];
  for (int m = 0; m < M; ++m) {
    a[m] = x + m * row;
    scale[m] = reinterpret_cast<const float*>(a[m] + groups * kGroup);
    total[m] = reinterpret_cast<const int32_t*>(scale[m] + groups);
  }
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + panel * groups * kGroupBytes;
  for (int p = 0; p < kParts; ++p) {
    const int at = panel * kPanel + p * W;
    if (at >= w.n) return;
    nf sum[M] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t where = (panel * groups + g) * kPanel + p * W;
      ni products[M];
      group_products<F, M>(data + g * kGroupBytes + p * W * 4, a, g * kGroup, products);
      const nf d = load_f16(w.scales + where);
      nf low{};
      if (w.has_min) low = load_f16(w.mins + where);
      const int middle = F == kQ8 ? kOffset : (w.has_min ? 0 : 8);
      for (int m = 0; m < M; ++m) {
        const nf exact = to_float(products[m] - middle * total[m][g]);
        sum[m] += exact * (d * scale[m][g]);
        if (w.has_min) sum[m] -= low * (scale[m][g] * static_cast<float>(total[m][g]));
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

constexpr int kTileRows = W == 16 ? 8 : 4;
constexpr int kFloatRows = W == 16 ? 12 : (W == 8 ? 6 : 4);

template <int F, int M>
SIXFOLD_INLINE void tile(const Weight& w, int panel, const Instruction& c, int64_t row) {
  float* out = reinterpret_cast<float*>(c.a[3]) + row * c.a[4];
  if constexpr (F == kQ8 || F == kQ4) {
    const int8_t* x = reinterpret_cast<const int8_t*>(c.a[5]) + row * quantised_row_bytes(w.k);
    quantised_tile<F, M>(w, panel, x, out, c.a[4]);
  } else {
    float_tile<F, M>(w, panel, reinterpret_cast<const float*>(c.a[0]) + row * c.a[1], c.a[1], out,
                     c.a[4]);
  }
}

template <int F>
static void linear_block(const Weight& w, const Instruction& c, int panel_first, int panel_last,
                         int64_t row_first, int64_t row_last) {
  constexpr int kRows = (F == kQ8 || F == kQ4) ? kTileRows : kFloatRows;
  for (int64_t row = row_first; row < row_last;) {
    const int64_t left = row_last - row;
    for (int panel = panel_first; panel < panel_last; ++panel) {
      if (left >= kRows) tile<F, kRows>(w, panel, c, row);
      else if (left >= 4) tile<F, 4>(w, panel, c, row);
      else if (left >= 2) tile<F, 2>(w, panel, c, row);
      else tile<F, 1>(w, panel, c, row);
    }
    row += left >= kRows ? kRows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
  }
}

// A task is a block of panels that fits the second-level cache, times a block of rows.
struct LinearSplit {
  int panels, panel_blocks, rows, row_blocks;
};

SIXFOLD_INLINE LinearSplit split_linear(const Weight& w, int64_t rows) {
  const int panels = (w.n + kPanel - 1) / kPanel;
  constexpr int64_t kBytes[] = {64, 32, 32, 17, 10};
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
    default: return linear_block<kQ4>(w, c, first, last, row, stop);
  }
}

static void quantise_row(const float* x, int64_t width, int8_t* out) {
  const int64_t groups = groups_of(width);
  float* scales = reinterpret_cast<float*>(out + groups * kGroup);
  int32_t* totals = reinterpret_cast<int32_t*>(scales + groups);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = g * kGroup;
    const int count = static_cast<int>(width - at < kGroup ? width - at : kGroup);
    float most = 0;
    for (int i = 0; i < count; ++i) {
      const float size = __builtin_fabsf(x[at + i]);
      most = size > most ? size : most;
    }
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    int32_t total = 0;
    for (int i = 0; i < kGroup; ++i) {
      const float scaled = i < count ? x[at + i] * inverse : 0.0f;
      const int32_t value = static_cast<int32_t>(__builtin_rintf(scaled));
      out[at + i] = static_cast<int8_t>(value);
      total += value;
    }
    scales[g] = most / 127.0f;
    totals[g] = total;
  }
}
