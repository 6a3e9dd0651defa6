// Paged attention, prefill and decode in one call, with a running softmax (Dao et al. 2022; Milakov
// and Gimelshein 2018). A task is one piece of the plan's work list times one kv head: the queries
// first..last of a row against its keys first..last. Rows whose keys are split leave partial
// results that `merge_row` joins.

constexpr int kKeys = 64;  // keys of a block of logits
constexpr int kPanelKeys = 2 * W;  // of which so many are multiplied at once
constexpr int kQueryRows = 96;
constexpr float kLog2E = 1.44269504f;
constexpr int kFewRows = 6;  // below, turning the keys costs more than it saves
constexpr int kTile = W == 16 ? 8 : W == 8 ? 6 : 4;

struct Piece {
  int32_t row, query_first, query_last, key_first, key_last;
};

// Keys of a block widened and turned, so that lanes are keys: (kKeys / kPanelKeys, dim, kPanelKeys).
template <int F>
static void turn_keys(const uint8_t* const* keys, int count, int dim, float* turned) {
  for (int j = 0; j < count; j += W) {
    float* panel = turned + j / kPanelKeys * kPanelKeys * dim + j % kPanelKeys;
    alignas(64) float scales[W];
    for (int i = 0; i < W; ++i)
      scales[i] = j + i < count ? kv_scale<F>(keys[j + i], dim) : 0.0f;
    const nf scale = load(scales);
    int d = 0;
    for (; d + W <= dim; d += W) {
      nf block[W];
      for (int i = 0; i < W; ++i) block[i] = load_kv<F>(keys[j + i < count ? j + i : j], d);
      transpose(block);
      for (int i = 0; i < W; ++i) store(panel + (d + i) * kPanelKeys, block[i] * scale);
    }
    for (; d < dim; ++d)
      for (int i = 0; i < W; ++i)
        panel[d * kPanelKeys + i] = j + i < count ? kv_at<F>(keys[j + i], d) * scales[i] : 0.0f;
  }
}

// Values of a block as float, (count, dim).
template <int F>
static void widen_values(const uint8_t* const* values, int count, int dim, float* wide) {
  for (int j = 0; j < count; ++j, wide += dim) {
    const float scale = kv_scale<F>(values[j], dim);
    int d = 0;
    for (; d + W <= dim; d += W) store(wide + d, load_kv<F>(values[j], d) * scale);
    for (; d < dim; ++d) wide[d] = kv_at<F>(values[j], d) * scale;
  }
}

// logits (M, kKeys) of the keys first..last, whole panels, from turned keys.
template <int M>
SIXFOLD_INLINE void logits_turned(const float* const* q, const float* turned, int first, int last,
                                  int dim, float* out) {
  for (int at = first / kPanelKeys * kPanelKeys; at < last; at += kPanelKeys) {
    const float* panel = turned + at * dim;
    nf sum[M][2] = {};
    for (int d = 0; d < dim; ++d, panel += kPanelKeys) {
      const nf a = load(panel), b = load(panel + W);
      for (int m = 0; m < M; ++m) {
        const nf x = splat(q[m][d]);
        sum[m][0] += x * a, sum[m][1] += x * b;
      }
    }
    for (int m = 0; m < M; ++m) {
      store(out + m * kKeys + at, sum[m][0]);
      store(out + m * kKeys + at + W, sum[m][1]);
    }
  }
}

SIXFOLD_INLINE void fetch(const uint8_t* row, int bytes) {
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// The same from keys as they are: lanes are dimensions.
template <int F, int M>
SIXFOLD_INLINE void logits_direct(const float* const* q, const uint8_t* const* keys, int count,
                                  int dim, float* out) {
  for (int j = 0; j < count; j += W) {
    nf sums[M][W];
    for (int i = 0; i < W; i += 2) {
      const uint8_t* first = keys[j + i < count ? j + i : j];
      const uint8_t* second = keys[j + i + 1 < count ? j + i + 1 : j];
      nf a[M], b[M];
      for (int m = 0; m < M; ++m) a[m] = b[m] = nf{};
      int d = 0;
      for (; d + W <= dim; d += W) {
        const nf x = load_kv<F>(first, d), y = load_kv<F>(second, d);
        for (int m = 0; m < M; ++m) {
          const nf query = load(q[m] + d);
          a[m] += query * x, b[m] += query * y;
        }
      }
      for (; d < dim; ++d)
        for (int m = 0; m < M; ++m) {
          a[m][0] += q[m][d] * kv_at<F>(first, d);
          b[m][0] += q[m][d] * kv_at<F>(second, d);
        }
      for (int m = 0; m < M; ++m) sums[m][i] = a[m], sums[m][i + 1] = b[m];
    }
    nf scale;
    if constexpr (F == kQ8) {
      alignas(64) float scales[W];
      for (int i = 0; i < W; ++i) scales[i] = kv_scale<F>(keys[j + i < count ? j + i : j], dim);
      scale = load(scales);
    }
    for (int m = 0; m < M; ++m) {
      nf total = sums_of(sums[m]);
      if constexpr (F == kQ8) total *= scale;
      store(out + m * kKeys + j, total);
    }
  }
}

// out (M, dim) = out * keep + weights (M, kKeys) times the values first..last.
template <int F, int M, int V>
SIXFOLD_INLINE int values_part(const float* weights, const uint8_t* const* values, int first,
                               int last, int dim, const float* keep, float* out, int d) {
  for (; d + V * W <= dim; d += V * W) {
    nf sum[M][V];
    for (int m = 0; m < M; ++m)
      for (int p = 0; p < V; ++p) sum[m][p] = load(out + m * dim + d + p * W) * keep[m];
    for (int j = first; j < last; ++j) {
      // The fewer of weights and values stay in registers: with all of both, sums would spill.
      if constexpr (M > V) {
        nf value[V];
        for (int p = 0; p < V; ++p) value[p] = load_kv<F>(values[j], d + p * W);
        for (int m = 0; m < M; ++m) {
          const nf x = splat(weights[m * kKeys + j]);
          for (int p = 0; p < V; ++p) sum[m][p] += x * value[p];
        }
      } else {
        nf x[M];
        for (int m = 0; m < M; ++m) x[m] = splat(weights[m * kKeys + j]);
        for (int p = 0; p < V; ++p) {
          const nf value = load_kv<F>(values[j], d + p * W);
          for (int m = 0; m < M; ++m) sum[m][p] += x[m] * value;
        }
      }
    }
    for (int m = 0; m < M; ++m)
      for (int p = 0; p < V; ++p) store(out + m * dim + d + p * W, sum[m][p]);
  }
  return d;
}

template <int F, int M>
SIXFOLD_INLINE void values_tile(const float* weights, const uint8_t* const* values, int first,
                                int last, int dim, const float* keep, float* out) {
  int d = values_part<F, M, (M <= 3 ? 4 : 2)>(weights, values, first, last, dim, keep, out, 0);
  d = values_part<F, M, 1>(weights, values, first, last, dim, keep, out, d);
  for (; d < dim; ++d)
    for (int m = 0; m < M; ++m) {
      float sum = out[m * dim + d] * keep[m];
      for (int j = first; j < last; ++j)
        sum += weights[m * kKeys + j] * kv_at<F>(values[j], d);
      out[m * dim + d] = sum;
    }
}

// Some of a block's keys, counted from its first.
struct Span {
  int first, last;
  bool empty() const { return first >= last; }
};

// Raw products to softmax weights in place, in the panels of `tile`; updates the row's running
// maximum and sum. Products outside `seen` may be anything; there the weights are 0.
static float weigh(float* logits, Span seen, Span tile, const AttentionSpec& s, float* best,
                   float* total) {
  const int from = tile.first / kPanelKeys * kPanelKeys;
  const int to = (tile.last + kPanelKeys - 1) / kPanelKeys * kPanelKeys;
  if (seen.empty()) {
    for (int j = from; j < to; j += W) store(logits + j, nf{});
    return 1.0f;
  }
  float scale = s.scale;
  if (s.soft_cap > 0) {
    for (int j = from; j < to; ++j) logits[j] = s.soft_cap * __builtin_tanhf(logits[j] * scale / s.soft_cap);
    scale = 1.0f;
  }
  const nf lowest = splat(-__builtin_inff());
  if (seen.first > from || seen.last < to) {
    ni lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    for (int j = from; j < to; j += W) {
      const ni position = lane + j;
      const ni visible = (position >= seen.first) & (position < seen.last);
      store(logits + j, choose(visible, load(logits + j), lowest));
    }
  }
  nf top = lowest;
  for (int j = from; j < to; j += W) top = max_of(top, load(logits + j));
  const float previous = *best, highest = max_lane(top) * scale;
  const float peak = highest > previous ? highest : previous;
  const float keep = peak == previous ? 1.0f : exp2_of(splat((previous - peak) * kLog2E))[0];
  const float factor = scale * kLog2E, offset = peak * kLog2E;
  nf sums{};
  for (int j = from; j < to; j += W) {
    const nf weight = exp2_of(load(logits + j) * factor - offset);
    sums += weight;
    store(logits + j, weight);
  }
  *total = *total * keep + sum_of(sums);
  *best = peak;
  return keep;
}

// Where a task's intermediate results lie in its thread's scratch, for `rows` query heads.
struct AttentionScratch {
  float *turned, *wide, *logits, *out, *best, *total;
  const float** q;

  AttentionScratch(float* from, int rows, int dim) {
    turned = from;                // (kKeys / kPanelKeys, dim, kPanelKeys)
    wide = turned + dim * kKeys;  // (kKeys, dim)
    logits = wide + dim * kKeys;  // (tile, kKeys)
    out = logits + 8 * kKeys;     // (rows, dim)
    best = out + (rows + 8) * dim;
    total = best + rows + 8;
    q = reinterpret_cast<const float**>(
        (reinterpret_cast<uintptr_t>(total + rows + 8) + 63) & ~uintptr_t{63});
  }
};

// A block of a row's keys, and what each of a task's query heads sees of it.
struct KeyBlock {
  const uint8_t* keys[kKeys];
  const uint8_t* values[kKeys];
  float scales[kKeys];  // of the values, where they are bytes that nobody widened
  int start, count;     // position of the first key
  int query, group, window;  // position of the first query; query heads of a query

  Span seen(int row) const {
    const int position = query + row / group;
    const int last = position + 1 - start, first = window ? position - window + 1 - start : 0;
    return {first > 0 ? first : 0, last < count ? last : count};
  }
};

// The query heads i..i+M against a block: logits, weights, values, while they are in the cache.
template <int F, int M, bool Few>
SIXFOLD_INLINE void attend_tile(const AttentionSpec& s, const AttentionScratch& at,
                                const KeyBlock& block, int i) {
  const Span tile = {block.seen(i).first, block.seen(i + M - 1).last};
  if (tile.empty()) return;
  if constexpr (Few) logits_direct<F, M>(at.q + i, block.keys, block.count, s.dim, at.logits);
  else logits_turned<M>(at.q + i, at.turned, tile.first, tile.last, s.dim, at.logits);
  float keep[M];
  for (int m = 0; m < M; ++m)
    keep[m] = weigh(at.logits + m * kKeys, block.seen(i + m), tile, s, at.best + i + m,
                    at.total + i + m);
  if constexpr (Few && F == kQ8)
    for (int m = 0; m < M; ++m)
      for (int j = tile.first; j < tile.last; ++j) at.logits[m * kKeys + j] *= block.scales[j];
  values_tile<Few ? F : kF32, M>(at.logits, block.values, tile.first, tile.last, s.dim, keep,
                                 at.out + i * s.dim);
}

// One block of keys against `rows` query heads, in tiles that share what is loaded.
template <int F>
static void attend_block(const AttentionSpec& s, const AttentionScratch& at, int rows,
                         KeyBlock& block, int64_t value_bytes) {
  const int count = block.count;
  for (int j = 0; j < count; ++j) block.values[j] = block.keys[j] + value_bytes;
  int i = 0;
  if (rows < kFewRows) {
    for (int j = 0; F == kQ8 && j < count; ++j) block.scales[j] = kv_scale<F>(block.values[j], s.dim);
    for (; i + 4 <= rows; i += 4) attend_tile<F, 4, true>(s, at, block, i);
    for (; i + 3 <= rows; i += 3) attend_tile<F, 3, true>(s, at, block, i);
    for (; i < rows; ++i) attend_tile<F, 1, true>(s, at, block, i);
    return;
  }
  turn_keys<F>(block.keys, count, s.dim, at.turned);
  if constexpr (F != kF32) {
    widen_values<F>(block.values, count, s.dim, at.wide);
    for (int j = 0; j < count; ++j)
      block.values[j] = reinterpret_cast<const uint8_t*>(at.wide + j * s.dim);
  }
  for (; i + kTile <= rows; i += kTile) attend_tile<F, kTile, false>(s, at, block, i);
  for (; i + 2 <= rows; i += 2) attend_tile<F, 2, false>(s, at, block, i);
  for (; i < rows; ++i) attend_tile<F, 1, false>(s, at, block, i);
}

// A sink is a key that takes no value: the running softmax begins with it, once per query and head.
SIXFOLD_INLINE void start_softmax(int64_t sinks, int head, float* best, float* total) {
  *best = sinks ? pointer<const float>(sinks)[head] : -__builtin_inff();
  *total = sinks ? 1.0f : 0.0f;
}

template <int F>
static void attend_piece(const Instruction& c, const AttentionSpec& s, const AttentionPlan& plan,
                         const Piece& piece, int split, int kv_head, float* scratch) {
  const int group = s.heads / s.kv_heads, dim = s.dim;
  const int64_t part = static_cast<int64_t>(plan.page_size) * s.row_bytes;
  const KeyRows pages = {pointer<const uint8_t>(c.a[2]) + 2 * kv_head * part,
                         plan.table + static_cast<int64_t>(piece.row) * plan.table_width,
                         page_bytes(s, plan.page_size), part, plan.page_size, s.row_bytes};
  const int first_token = plan.query_start[piece.row];
  const int context = plan.context[piece.row];
  const int per = kQueryRows / group < 1 ? 1 : kQueryRows / group;
  for (int query = piece.query_first; query < piece.query_last; query += per) {
    const int queries = piece.query_last - query < per ? piece.query_last - query : per;
    const int rows = queries * group;
    const AttentionScratch at(scratch, rows, dim);
    for (int i = 0; i < rows; ++i) {
      at.q[i] = pointer<const float>(c.a[0]) + (first_token + query + i / group) * c.a[1] +
                (kv_head * group + i % group) * dim;
      start_softmax(split < 0 ? c.a[6] : 0, kv_head * group + i % group, at.best + i, at.total + i);
    }
    for (int i = 0; i < rows * dim; ++i) at.out[i] = 0;
    const int highest = context + query + queries;  // one past the last key that anyone sees
    const int stop = piece.key_last < highest ? piece.key_last : highest;
    int start = piece.key_first;
    if (s.window && context + query - s.window + 1 > start) start = context + query - s.window + 1;
    KeyBlock block;
    block.query = context + query, block.group = group, block.window = s.window;
    const uint8_t* next[kKeys];
    block.count = stop - start < kKeys ? stop - start : kKeys;
    pages.find(start, block.count, block.keys);
    for (block.start = start; block.start < stop; block.start += kKeys) {
      const int after = block.start + block.count;
      const int following = stop - after < kKeys ? stop - after : kKeys;
      pages.find(after, following, next);
      for (int j = 0; j < following; ++j)
        fetch(next[j], s.row_bytes), fetch(next[j] + part, s.row_bytes);
      attend_block<F>(s, at, rows, block, part);
      __builtin_memcpy(block.keys, next, sizeof next);
      block.count = following;
    }
    for (int i = 0; i < rows; ++i) {
      const int head = kv_head * group + i % group;
      if (split >= 0) {  // one query, part of its keys
        float* partial = plan.partials + (static_cast<int64_t>(split) * s.heads + head) * (dim + 2);
        for (int d = 0; d < dim; ++d) partial[d] = at.out[i * dim + d];
        partial[dim] = at.best[i], partial[dim + 1] = at.total[i];
        continue;
      }
      const int64_t token = first_token + query + i / group;
      float* to = pointer<float>(c.a[3]) + (token * s.heads + head) * dim;
      const float inverse = 1.0f / at.total[i];
      for (int d = 0; d < dim; ++d) to[d] = at.out[i * dim + d] * inverse;
    }
  }
}

static int attention_tasks(const Instruction& c, const Step&) {
  return pointer<const AttentionPlan>(c.a[5])->pieces * pointer<const AttentionSpec>(c.a[4])->kv_heads;
}

static void attention_run(const Instruction& c, int task, float* scratch) {
  const AttentionPlan& plan = *pointer<const AttentionPlan>(c.a[5]);
  const AttentionSpec& s = *pointer<const AttentionSpec>(c.a[4]);
  const int number = task / s.kv_heads, head = task % s.kv_heads;
  const Piece& piece = reinterpret_cast<const Piece*>(plan.work)[number];
  // Split pieces come first in the work list, so that a piece's number is its partial's.
  const int split = number < plan.splits ? number : -1;
  switch (s.format) {
    case kF32: return attend_piece<kF32>(c, s, plan, piece, split, head, scratch);
    case kBF16: return attend_piece<kBF16>(c, s, plan, piece, split, head, scratch);
    case kF16: return attend_piece<kF16>(c, s, plan, piece, split, head, scratch);
    default: return attend_piece<kQ8>(c, s, plan, piece, split, head, scratch);
  }
}

static int merge_tasks(const Instruction& c, const Step&) {
  return pointer<const AttentionPlan>(c.a[2])->merge_count;
}

static void merge_run(const Instruction& c, int task) {
  const AttentionSpec& s = *pointer<const AttentionSpec>(c.a[1]);
  const AttentionPlan& plan = *pointer<const AttentionPlan>(c.a[2]);
  const int32_t* merge = plan.merges + task * 3;
  for (int head = 0; head < s.heads; ++head) {
    float* out = pointer<float>(c.a[0]) + (static_cast<int64_t>(merge[0]) * s.heads + head) * s.dim;
    float best, total;
    start_softmax(c.a[3], head, &best, &total);
    const float sink = best;
    for (int i = merge[1]; i < merge[2]; ++i) {
      const float top = plan.partials[(static_cast<int64_t>(i) * s.heads + head) * (s.dim + 2) + s.dim];
      best = top > best ? top : best;
    }
    if (c.a[3]) total = exp2_of(splat((sink - best) * kLog2E))[0];
    for (int d = 0; d < s.dim; ++d) out[d] = 0;
    for (int i = merge[1]; i < merge[2]; ++i) {
      const float* partial =
          plan.partials + (static_cast<int64_t>(i) * s.heads + head) * (s.dim + 2);
      const float factor = exp2_of(splat((partial[s.dim] - best) * kLog2E))[0];
      total += factor * partial[s.dim + 1];
      for (int d = 0; d < s.dim; ++d) out[d] += factor * partial[d];
    }
    for (int d = 0; d < s.dim; ++d) out[d] /= total;
  }
}
