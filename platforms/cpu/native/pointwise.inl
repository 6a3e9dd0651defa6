// Embedding, norms, rotary, gates: a task is a block of rows.

constexpr int kRowsPerTask = 8;

template <typename T>
SIXFOLD_INLINE T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

SIXFOLD_INLINE float weight_at(const Weight& w, int64_t row, int64_t k) {
  const int64_t panel = row / kPanel, lane = row % kPanel, groups = groups_of(w.k);
  if (w.format <= kF16) {
    const int64_t at = (panel * w.k + k) * kPanel + lane;
    if (w.format == kF32) return static_cast<const float*>(w.data)[at];
    alignas(64) uint16_t one[W] = {static_cast<const uint16_t*>(w.data)[at]};
    return w.format == kBF16 ? load_bf16(one)[0] : load_f16(one)[0];
  }
  const int64_t g = k / kGroup, in = k % kGroup;
  const uint8_t* data = static_cast<const uint8_t*>(w.data);
  const int64_t scale_at = w.format == kQ8Half ? panel * 2 * groups + k / (kGroup / 2)
                                               : panel * groups + g;
  alignas(64) uint16_t d[W] = {w.scales[scale_at * kPanel + lane]};
  const float scale = load_f16(d)[0];
  alignas(64) uint16_t m[W] = {0};
  if (w.has_min) m[0] = w.mins[(panel * groups + g) * kPanel + lane];
  const float low = load_f16(m)[0];
  if (w.format != kQ4) {
    const uint8_t* group = data + (panel * groups + g) * kGroup * kPanel;
    return scale * static_cast<int8_t>(group[(in / 4 * kPanel + lane) * 4 + in % 4]) - low;
  }
  const uint8_t* group = data + (panel * groups + g) * kGroup * kPanel / 2;
  const uint8_t byte = group[(in / 8 * kPanel + lane) * 4 + in % 4];
  const int q = in % 8 < 4 ? byte & 15 : byte >> 4;
  return w.has_min ? scale * q - low : scale * (q - 8);
}

static void embed_row(const Instruction& c, int64_t t) {
  const int64_t id = pointer<const int64_t>(c.a[0])[t];
  const Weight& w = *pointer<const Weight>(c.a[1]);
  float* out = pointer<float>(c.a[2]) + t * w.k;
  for (int64_t k = 0; k < w.k; ++k) out[k] = weight_at(w, id, k) * c.f[0];
}

// Every lane of the last, partial vector must be readable: so the tail is scalar.
static void norm_row(const Instruction& c, int64_t t) {
  const int64_t width = c.a[6];
  const float* x = pointer<const float>(c.a[0]) + t * c.a[1];
  const float* residual = c.a[2] ? pointer<const float>(c.a[2]) + t * width : nullptr;
  const float* weight = pointer<const float>(c.a[3]);
  float* out = pointer<float>(c.a[4]) + t * width;
  float* total = residual ? pointer<float>(c.a[5]) + t * width : nullptr;
  nf squares{}, more{};
  float rest = 0;
  int64_t i = 0;
  for (; i + 2 * W <= width; i += 2 * W) {
    nf a = load(x + i), b = load(x + i + W);
    if (residual) {
      a += load(residual + i), b += load(residual + i + W);
      store(total + i, a), store(total + i + W, b);
    }
    squares += a * a, more += b * b;
  }
  for (; i < width; ++i) {
    const float a = residual ? x[i] + residual[i] : x[i];
    if (residual) total[i] = a;
    rest += a * a;
  }
  const float scale =
      1.0f / __builtin_sqrtf((sum_of(squares + more) + rest) / static_cast<float>(width) + c.f[0]);
  const float* from = residual ? total : x;
  for (i = 0; i + W <= width; i += W) store(out + i, load(from + i) * scale * load(weight + i));
  for (; i < width; ++i) out[i] = from[i] * scale * weight[i];
}

static void angles_row(const Instruction& c, int64_t t) {
  const float position = static_cast<float>(pointer<const int64_t>(c.a[0])[t]);
  const float* inverse = pointer<const float>(c.a[1]);
  for (int64_t i = 0; i < c.a[4]; ++i) {
    const float angle = position * inverse[i];
    pointer<float>(c.a[2])[t * c.a[4] + i] = __builtin_cosf(angle) * c.f[0];
    pointer<float>(c.a[3])[t * c.a[4] + i] = __builtin_sinf(angle) * c.f[0];
  }
}

static void rope_head(const float* x, const float* cos, const float* sin, const float* norm,
                      const RopeShape& s, float eps, float* out) {
  float scale = 1.0f;
  if (norm) {
    float squares = 0;
    nf parts{};
    int i = 0;
    for (; i + W <= s.dim; i += W) parts += load(x + i) * load(x + i);
    for (; i < s.dim; ++i) squares += x[i] * x[i];
    scale = 1.0f / __builtin_sqrtf((sum_of(parts) + squares) / static_cast<float>(s.dim) + eps);
  }
  int i = 0;
  for (; i + W <= s.half; i += W) {
    nf a = load(x + i), b = load(x + i + s.half);
    if (norm) a = a * scale * load(norm + i), b = b * scale * load(norm + i + s.half);
    const nf cosine = load(cos + i), sine = load(sin + i);
    store(out + i, a * cosine - b * sine);
    store(out + i + s.half, b * cosine + a * sine);
  }
  for (; i < s.half; ++i) {
    float a = x[i], b = x[i + s.half];
    if (norm) a *= scale * norm[i], b *= scale * norm[i + s.half];
    out[i] = a * cos[i] - b * sin[i];
    out[i + s.half] = b * cos[i] + a * sin[i];
  }
  for (i = 2 * s.half; i < s.dim; ++i) out[i] = norm ? x[i] * scale * norm[i] : x[i];
}

static void rope_row(const Instruction& c, int64_t t) {
  const RopeShape& s = *pointer<const RopeShape>(c.a[10]);
  const float* cos = pointer<const float>(c.a[4]) + t * s.half;
  const float* sin = pointer<const float>(c.a[5]) + t * s.half;
  for (int h = 0; h < s.heads; ++h)
    rope_head(pointer<const float>(c.a[0]) + t * c.a[1] + h * s.dim, cos, sin,
              pointer<const float>(c.a[8]), s, c.f[0],
              pointer<float>(c.a[6]) + (t * s.heads + h) * s.dim);
  for (int h = 0; h < s.kv_heads; ++h)
    rope_head(pointer<const float>(c.a[2]) + t * c.a[3] + h * s.dim, cos, sin,
              pointer<const float>(c.a[9]), s, c.f[0],
              pointer<float>(c.a[7]) + (t * s.kv_heads + h) * s.dim);
}

SIXFOLD_INLINE nf activate(nf g, int64_t kind) {
  if (kind == 0) return g / (1.0f + exp_of(-g));
  // gelu(g) = g * sigmoid(2 * inner), since (1 + tanh(y)) / 2 = sigmoid(2y).
  const nf inner = 0.7978845608028654f * (g + 0.044715f * g * g * g);
  return g / (1.0f + exp_of(-2.0f * inner));
}

static void gate_row(const Instruction& c, int64_t t) {
  const int64_t width = c.a[5];
  const float* gate = pointer<const float>(c.a[0]) + t * c.a[1];
  const float* up = pointer<const float>(c.a[2]) + t * c.a[3];
  float* out = pointer<float>(c.a[4]) + t * width;
  int64_t i = 0;
  for (; i + W <= width; i += W) store(out + i, activate(load(gate + i), c.a[6]) * load(up + i));
  for (; i < width; ++i) out[i] = activate(splat(gate[i]), c.a[6])[0] * up[i];
}

static void quantise_one(const Instruction& c, int64_t t) {
  for (int64_t row = t * c.a[4]; row < (t + 1) * c.a[4]; ++row)
    quantise_row(pointer<const float>(c.a[0]) + row * c.a[1], c.a[3],
                 pointer<int8_t>(c.a[2]) + row * quantised_row_bytes(c.a[3]));
}
