// Keys and values as they lie in a layer's pages: (page, kv head, key or value, token, row). What a
// task reads of one page is one piece of memory.

template <int F>
SIXFOLD_INLINE nf load_kv(const uint8_t* row, int d) {
  if constexpr (F == kQ8) return load_bytes(row + d);
  else return load_weight<F>(row, d);
}

// One number; vectors would read past the end of a row.
template <int F>
SIXFOLD_INLINE float kv_at(const uint8_t* row, int d) {
  if constexpr (F == kF32) return reinterpret_cast<const float*>(row)[d];
  if constexpr (F == kQ8) return reinterpret_cast<const int8_t*>(row)[d];
  alignas(64) uint16_t one[W] = {reinterpret_cast<const uint16_t*>(row)[d]};
  return load_weight<F>(one, 0)[0];
}

template <int F>
SIXFOLD_INLINE float kv_scale(const uint8_t* row, int dim) {
  float scale = 1.0f;
  if constexpr (F == kQ8) __builtin_memcpy(&scale, row + dim, 4);
  return scale;
}

template <int F>
static void store_kv(const float* x, int dim, uint8_t* row) {
  float inverse = 1.0f;
  if constexpr (F == kQ8) {
    float most = 0;
    for (int d = 0; d < dim; ++d) {
      const float size = __builtin_fabsf(x[d]);
      most = size > most ? size : most;
    }
    inverse = most > 0 ? 127.0f / most : 0.0f;
    const float scale = most / 127.0f;
    __builtin_memcpy(row + dim, &scale, 4);
  }
  for (int d = 0; d < dim; d += W) {
    const int count = dim - d < W ? dim - d : W;
    alignas(64) float padded[W] = {};
    __builtin_memcpy(padded, x + d, count * 4);
    const nf v = load(padded);
    alignas(64) uint8_t bytes[4 * W];
    constexpr int kSize = F == kF32 ? 4 : F == kQ8 ? 1 : 2;
    if constexpr (F == kF32) store(reinterpret_cast<float*>(bytes), v);
    else if constexpr (F == kBF16) store_bf16(reinterpret_cast<uint16_t*>(bytes), v);
    else if constexpr (F == kF16) store_f16(reinterpret_cast<uint16_t*>(bytes), v);
    else store_bytes(bytes, to_steps(v, inverse));
    __builtin_memcpy(row + d * kSize, bytes, count * kSize);
  }
}

SIXFOLD_INLINE int64_t page_bytes(const AttentionSpec& s, int page_size) {
  return 2LL * s.kv_heads * page_size * s.row_bytes;
}

static void write_row(const Instruction& c, int64_t t) {
  const AttentionSpec& s = *pointer<const AttentionSpec>(c.a[5]);
  const AttentionPlan& plan = *pointer<const AttentionPlan>(c.a[6]);
  const int64_t page = plan.slots[t] / plan.page_size, at = plan.slots[t] % plan.page_size;
  const int64_t part = static_cast<int64_t>(plan.page_size) * s.row_bytes;
  uint8_t* row = pointer<uint8_t>(c.a[4]) + page * page_bytes(s, plan.page_size) + at * s.row_bytes;
  const float* both[2] = {pointer<const float>(c.a[0]) + t * c.a[1],
                          pointer<const float>(c.a[2]) + t * c.a[3]};
  for (int head = 0; head < s.kv_heads; ++head)
    for (const float* from : both) {
      const float* x = from + head * s.dim;
      switch (s.format) {
        case kF32: store_kv<kF32>(x, s.dim, row); break;
        case kBF16: store_kv<kBF16>(x, s.dim, row); break;
        case kF16: store_kv<kF16>(x, s.dim, row); break;
        default: store_kv<kQ8>(x, s.dim, row);
      }
      row += part;
    }
}

// Addresses of a row's keys, found page by page: a division a key would cost as much as the key.
struct KeyRows {
  const uint8_t* pool;  // of the layer, at the kv head
  const int32_t* table;
  int64_t page_bytes, value_bytes;  // value_bytes: from a key to its value
  int page_size, row_bytes;

  void find(int first, int count, const uint8_t** keys) const {
    int page = first / page_size, at = first % page_size;
    for (int j = 0; j < count; ++page, at = 0) {
      const uint8_t* row = pool + table[page] * page_bytes + static_cast<int64_t>(at) * row_bytes;
      for (; at < page_size && j < count; ++at, ++j, row += row_bytes) keys[j] = row;
    }
  }
};
