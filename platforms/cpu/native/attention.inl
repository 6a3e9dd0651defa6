// Paged attention, prefill and decode in one call, with a running softmax (Dao et al. 2022; Milakov
// and Gimelshein 2018). A task is one piece of the plan's work list times one kv head: the queries
// first..last of a row against its keys first..last. Rows whose keys are split leave partial
// results that `merge_row` joins.

constexpr int kKeys = 64;  // keys of a block of logits
constexpr int kQueryRows = 96;
constexpr int kFewRows = 6;  // below, turning the keys costs more than it saves

struct Piece {
  int32_t row, query_first, query_last, key_first, key_last;
};

// logits (rows, kKeys) of `count` keys, gathered from pages and turned so that lanes are keys.
template <int M>
SIXFOLD_INLINE void logits_tile(const float* const* q, const float* turned, int dim, float* out) {
  for (int block = 0; block < kKeys; block += 2 * W) {
    nf sum[M][2] = {};
    for (int d = 0; d < dim; ++d) {
      const nf a = load(turned + d * kKeys + block), b = load(turned + d * kKeys + block + W);
      for (int m = 0; m < M; ++m) {
        const nf x = splat(q[m][d]);
        sum[m][0] += x * a, sum[m][1] += x * b;
      }
    }
    for (int m = 0; m < M; ++m) {
      store(out + m * kKeys + block, sum[m][0]);
      store(out + m * kKeys + block + W, sum[m][1]);
    }
  }
}

// out (M, dim) = out * keep + weights (M, count) times values.
template <int M>
SIXFOLD_INLINE void values_tile(const float* weights, const float* const* values, int count,
                                int dim, const float* keep, float* out) {
  int d = 0;
  for (; d + 2 * W <= dim; d += 2 * W) {
    nf sum[M][2];
    for (int m = 0; m < M; ++m) {
      sum[m][0] = load(out + m * dim + d) * keep[m];
      sum[m][1] = load(out + m * dim + d + W) * keep[m];
    }
    for (int j = 0; j < count; ++j) {
      const nf a = load(values[j] + d), b = load(values[j] + d + W);
      for (int m = 0; m < M; ++m) {
        const nf x = splat(weights[m * kKeys + j]);
        sum[m][0] += x * a, sum[m][1] += x * b;
      }
    }
    for (int m = 0; m < M; ++m) {
      store(out + m * dim + d, sum[m][0]);
      store(out + m * dim + d + W, sum[m][1]);
    }
  }
  for (; d < dim; ++d)
    for (int m = 0; m < M; ++m) {
      float sum = out[m * dim + d] * keep[m];
      for (int j = 0; j < count; ++j) sum += weights[m * kKeys + j] * values[j][d];
      out[m * dim + d] = sum;
    }
}

// With few query rows turning the keys would cost more than the products: lanes are dimensions.
template <int M>
SIXFOLD_INLINE void logits_direct(const float* const* q, const float* const* keys, int count,
                                  int dim, float* out) {
  for (int j = 0; j < count; j += W) {
    nf sums[M][W] = {};
    float rest[M][W] = {};
    for (int i = 0; i < W && j + i < count; i += 2) {
      const float* first = keys[j + i];
      const float* second = keys[j + i + 1 < count ? j + i + 1 : j + i];
      nf a[M] = {}, b[M] = {};
      int d = 0;
      for (; d + W <= dim; d += W) {
        const nf x = load(first + d), y = load(second + d);
        for (int m = 0; m < M; ++m) {
          const nf query = load(q[m] + d);
          a[m] += query * x, b[m] += query * y;
        }
      }
      for (int m = 0; m < M; ++m) {
        sums[m][i] = a[m], sums[m][i + 1] = b[m];
        for (int e = d; e < dim; ++e)
          rest[m][i] += q[m][e] * first[e], rest[m][i + 1] += q[m][e] * second[e];
      }
    }
    for (int m = 0; m < M; ++m) store(out + m * kKeys + j, sums_of(sums[m]) + load(rest[m]));
  }
}

// Raw products to softmax weights in place; updates the row's running maximum and sum.
// `logits` may hold anything outside first..last; there the weights are 0.
static float weigh(float* logits, int first, int last, const AttentionSpec& s, float* best,
                   float* total) {
  if (first >= last) {
    for (int j = 0; j < kKeys; j += W) store(logits + j, nf{});
    return 1.0f;
  }
  ni lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  const nf lowest = splat(-__builtin_inff());
  nf top = lowest;
  for (int j = 0; j < kKeys; j += W) {
    nf x = load(logits + j) * s.scale;
    if (s.soft_cap > 0)
      for (int i = 0; i < W; ++i) x[i] = s.soft_cap * __builtin_tanhf(x[i] / s.soft_cap);
    const ni position = lane + j;
    x = choose((position >= first) & (position < last), x, lowest);
    store(logits + j, x);
    top = max_of(top, x);
  }
  const float previous = *best, highest = max_lane(top);
  const float peak = highest > previous ? highest : previous;
  const float keep = previous == -__builtin_inff() ? 0.0f : exp_of(splat(previous - peak))[0];
  nf sums{};
  for (int j = 0; j < kKeys; j += W) {
    const nf weight = exp_of(load(logits + j) - peak);
    sums += weight;
    store(logits + j, weight);
  }
  *total = *total * keep + sum_of(sums);
  *best = peak;
  return keep;
}

static void attend_piece(const Instruction& c, const AttentionSpec& s, const AttentionPlan& plan,
                         const Piece& piece, int split, int kv_head, float* scratch) {
  const int group = s.heads / s.kv_heads, dim = s.dim;
  const int64_t token_floats = 2LL * s.kv_heads * dim;
  const float* pool = pointer<const float>(c.a[2]);
  const int32_t* table = plan.table + static_cast<int64_t>(piece.row) * plan.table_width;
  const int first_token = plan.query_start[piece.row];
  const int context = plan.context[piece.row];
  const int per = kQueryRows / group < 1 ? 1 : kQueryRows / group;
  float* turned = scratch;                       // (dim, kKeys)
  float* logits = turned + dim * kKeys;          // (rows, kKeys)
  for (int query = piece.query_first; query < piece.query_last; query += per) {
    const int queries = piece.query_last - query < per ? piece.query_last - query : per;
    const int rows = queries * group;
    float* out = logits + (rows + 8) * kKeys;    // (rows, dim)
    float* best = out + (rows + 8) * dim;
    float* total = best + rows + 8;
    float* keep = total + rows + 8;
    const float** q = reinterpret_cast<const float**>(
        (reinterpret_cast<uintptr_t>(keep + rows + 8) + 63) & ~uintptr_t{63});
    for (int i = 0; i < rows; ++i) {
      q[i] = pointer<const float>(c.a[0]) + (first_token + query + i / group) * c.a[1] +
             (kv_head * group + i % group) * dim;
      best[i] = -__builtin_inff(), total[i] = 0;
    }
    for (int i = 0; i < rows * dim; ++i) out[i] = 0;
    const int highest = context + query + queries;  // one past the last key that anyone sees
    const int stop = piece.key_last < highest ? piece.key_last : highest;
    int start = piece.key_first;
    if (s.window && context + query - s.window + 1 > start) start = context + query - s.window + 1;
    for (int key = start; key < stop; key += kKeys) {
      const int count = stop - key < kKeys ? stop - key : kKeys;
      const float *keys[kKeys], *values[kKeys];
      for (int j = 0; j < count; ++j) {
        const int position = key + j;
        const int64_t slot = static_cast<int64_t>(table[position / plan.page_size]) *
                                 plan.page_size + position % plan.page_size;
        keys[j] = pool + slot * token_floats + kv_head * dim;
        values[j] = keys[j] + s.kv_heads * dim;
      }
      if (rows < kFewRows) {
        int i = 0;
        for (; i + 3 <= rows; i += 3) logits_direct<3>(q + i, keys, count, dim, logits + i * kKeys);
        for (; i < rows; ++i) logits_direct<1>(q + i, keys, count, dim, logits + i * kKeys);
      } else {
        for (int j = 0; j < count; ++j)
          for (int d = 0; d < dim; ++d) turned[d * kKeys + j] = keys[j][d];
        int i = 0;
        for (; i + 4 <= rows; i += 4) logits_tile<4>(q + i, turned, dim, logits + i * kKeys);
        for (; i < rows; ++i) logits_tile<1>(q + i, turned, dim, logits + i * kKeys);
      }
      for (int i = 0; i < rows; ++i) {
        const int position = context + query + i / group;
        int last = position + 1 - key;
        last = last < count ? last : count;
        int first = s.window ? position - s.window + 1 - key : 0;
        first = first > 0 ? first : 0;
        keep[i] = weigh(logits + i * kKeys, first, last, s, best + i, total + i);
      }
      int i = 0;
      for (; i + 4 <= rows; i += 4)
        values_tile<4>(logits + i * kKeys, values, count, dim, keep + i, out + i * dim);
      for (; i + 3 <= rows; i += 3)
        values_tile<3>(logits + i * kKeys, values, count, dim, keep + i, out + i * dim);
      for (; i < rows; ++i)
        values_tile<1>(logits + i * kKeys, values, count, dim, keep + i, out + i * dim);
    }
    for (int i = 0; i < rows; ++i) {
      const int head = kv_head * group + i % group;
      if (split >= 0) {  // one query, part of its keys
        float* partial = plan.partials + (static_cast<int64_t>(split) * s.heads + head) * (dim + 2);
        for (int d = 0; d < dim; ++d) partial[d] = out[i * dim + d];
        partial[dim] = best[i], partial[dim + 1] = total[i];
        continue;
      }
      const int64_t token = first_token + query + i / group;
      float* to = pointer<float>(c.a[3]) + (token * s.heads + head) * dim;
      const float inverse = 1.0f / total[i];
      for (int d = 0; d < dim; ++d) to[d] = out[i * dim + d] * inverse;
    }
  }
}

static int attention_tasks(const Instruction& c, const Step&) {
  return pointer<const AttentionPlan>(c.a[5])->pieces * pointer<const AttentionSpec>(c.a[4])->kv_heads;
}

static void attention_run(const Instruction& c, int task, float* scratch) {
  const AttentionPlan& plan = *pointer<const AttentionPlan>(c.a[5]);
  const AttentionSpec& s = *pointer<const AttentionSpec>(c.a[4]);
  const int piece = task / s.kv_heads;
  // Split pieces come first in the work list, so that a piece's number is its partial's.
  attend_piece(c, s, plan, reinterpret_cast<const Piece*>(plan.work)[piece],
               piece < plan.splits ? piece : -1, task % s.kv_heads, scratch);
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
    float best = -__builtin_inff(), total = 0;
    for (int i = merge[1]; i < merge[2]; ++i) {
      const float top = plan.partials[(static_cast<int64_t>(i) * s.heads + head) * (s.dim + 2) + s.dim];
      best = top > best ? top : best;
    }
    for (int d = 0; d < s.dim; ++d) out[d] = 0;
    for (int i = merge[1]; i < merge[2]; ++i) {
      const float* partial =
          plan.partials + (static_cast<int64_t>(i) * s.heads + head) * (s.dim + 2);
      const float factor = exp_of(splat(partial[s.dim] - best))[0];
      total += factor * partial[s.dim + 1];
      for (int d = 0; d < s.dim; ++d) out[d] += factor * partial[d];
    }
    for (int d = 0; d < s.dim; ++d) out[d] /= total;
  }
}
