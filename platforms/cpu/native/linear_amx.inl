// Tiles of up to 16 rows on AMX. A packed group is a B tile as it lies: 8 tile rows of 16 outputs
// times four k; activations are the A tile with the row's length as stride. (Intel's Software
// Developer's Manual, volume 2, TDPBSSD: signed times signed, so no offset is undone.)

constexpr int kAmxLeast = 8;  // rows; the dot product below serves fewer
constexpr int kAmxRows = 16;

struct alignas(64) AmxShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Compilers do not see which memory a tile instruction reads.
SIXFOLD_INLINE void memory_is_written() { asm volatile("" ::: "memory"); }

// Tile 0 sums (rows, 16 outputs), 1 activations (rows, k), 2 weights (k / 4, 16 outputs * 4).
SIXFOLD_INLINE void amx_configure(int rows, int k) {
  AmxShape shape;
  shape.row_bytes[0] = 64, shape.row_bytes[1] = static_cast<uint16_t>(k), shape.row_bytes[2] = 64;
  shape.rows[0] = shape.rows[1] = static_cast<uint8_t>(rows);
  shape.rows[2] = static_cast<uint8_t>(k / 4);
  memory_is_written();
  _tile_loadconfig(&shape);
}

SIXFOLD_INLINE void widen_nibbles(const uint8_t* packed, uint8_t* bytes) {
  for (int step = 0; step < kGroup / 8; ++step) {
    const ni both = (ni)*reinterpret_cast<const vi*>(packed + step * kStride);
    const ni low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
    __builtin_memcpy(bytes + 2 * step * kStride, &low, sizeof low);
    __builtin_memcpy(bytes + (2 * step + 1) * kStride, &high, sizeof high);
  }
}

template <int F, bool kMin>
static void amx_tile(const Weight& w, int panel, const int8_t* x, int rows, float* out,
                     int64_t ldo) {
  constexpr int kHalves = F == kQ8Half ? 2 : 1;
  constexpr int kStepK = kGroup / kHalves;
  constexpr int kStepBytes = kStepK * kPanel / (F == kQ4 ? 2 : 1);
  const int64_t groups = groups_of(w.k), steps = groups * kHalves, row = quantised_row_bytes(w.k);
  const QuantisedRow first(const_cast<int8_t*>(x), groups);
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + panel * steps * kStepBytes;
  alignas(64) uint8_t bytes[kGroup * kPanel];
  alignas(64) int32_t products[kAmxRows][kPanel];
  nf sum[kAmxRows] = {};
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t g = s / kHalves, where = (panel * steps + s) * kPanel;
    const uint8_t* here = data + s * kStepBytes;
    if constexpr (F == kQ4) {
      widen_nibbles(here, bytes);
      memory_is_written();
      here = bytes;
    }
    _tile_zero(0);
    _tile_loadd(1, x + s * kStepK, row);
    _tile_loadd(2, here, kStride);
    _tile_dpbssd(0, 1, 2);
    _tile_stored(0, products, sizeof products[0]);
    const nf d = load_f16(w.scales + where);
    nf low{};
    if constexpr (kMin) low = load_f16(w.mins + where);
    for (int m = 0; m < rows; ++m) {
      ni product = (ni)*reinterpret_cast<const vi*>(products[m]);
      if constexpr (F == kQ4 && !kMin) product += of_row(first.eighths, m * row)[s];
      sum[m] += to_float(product) * (d * of_row(first.scale, m * row)[g]);
      if constexpr (kMin) sum[m] -= low * of_row(first.sum, m * row)[g];
    }
  }
  for (int m = 0; m < rows; ++m) put_with_bias(w, panel * kPanel, sum[m], out + m * ldo);
}

// Rows from `row` on that tiles of AMX have served; 0 where they are too few.
template <int F>
static int64_t amx_rows(const Weight& w, const Instruction& c, int panel_first, int panel_last,
                        int64_t row, int64_t left) {
  if constexpr (F < kQ8) return 0;
  else {
    if (left < kAmxLeast) return 0;
    const int rows = static_cast<int>(left < kAmxRows ? left : kAmxRows);
    const int8_t* x = reinterpret_cast<const int8_t*>(c.a[5]) + row * quantised_row_bytes(w.k);
    float* out = reinterpret_cast<float*>(c.a[3]) + row * c.a[4];
    amx_configure(rows, F == kQ8Half ? kGroup / 2 : kGroup);
    for (int panel = panel_first; panel < panel_last; ++panel) {
      if (F != kQ8Half && w.has_min) amx_tile<F, F != kQ8Half>(w, panel, x, rows, out, c.a[4]);
      else amx_tile<F, false>(w, panel, x, rows, out, c.a[4]);
    }
    _tile_release();  // a thread without tiles is cheaper to switch
    return rows;
  }
}
