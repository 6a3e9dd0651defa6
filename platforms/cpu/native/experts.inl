// Mixtures of experts. An entry is one row's use of one expert; entries lie expert by expert, so that
// an active expert's weights are read once for all its rows. How many rows an expert has is known
// only when the step runs, and the number of tasks before: there is a task for every block of panels
// of as many experts as could be active, and those beyond the active ones end at once.

constexpr int kExpertRows = 24;  // rows gathered at a time: their bytes fit the second-level cache

// What `sort_run` finds: (1 + experts + experts + 1) int32.
struct Entries {
  int32_t* active_count;
  int32_t* active;  // experts with rows, ascending
  int32_t* start;   // expert -> its first entry; (experts + 1)

  Entries(int64_t address, int64_t experts) {
    active_count = pointer<int32_t>(address);
    active = active_count + 1;
    start = active + experts;
  }
};

// The top k of a softmax over all experts; of equal logits the lowest id first.
static void route_row(const Instruction& c, int64_t t) {
  const float* logits = pointer<const float>(c.a[0]) + t * c.a[1];
  const int64_t experts = c.a[4], top_k = c.a[5];
  int32_t* ids = pointer<int32_t>(c.a[2]) + t * top_k;
  float* factors = pointer<float>(c.a[3]) + t * top_k;
  float peak = logits[0], total = 0, chosen = 0;
  for (int64_t e = 1; e < experts; ++e) peak = logits[e] > peak ? logits[e] : peak;
  for (int64_t e = 0; e < experts; ++e) total += exp_of(splat(logits[e] - peak))[0];
  for (int64_t i = 0; i < top_k; ++i) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      // After the last choice in the order (larger logit, lower id).
      const bool left = i == 0 || logits[e] < logits[ids[i - 1]] ||
                        (logits[e] == logits[ids[i - 1]] && e > ids[i - 1]);
      if (left && (best < 0 || logits[e] > logits[best])) best = e;
    }
    ids[i] = static_cast<int32_t>(best < 0 ? i : best);  // NaN: any expert, the result is NaN
    factors[i] = exp_of(splat(logits[ids[i]] - peak))[0];
    chosen += factors[i];
  }
  const float inverse = 1.0f / (c.a[6] ? chosen : total);
  for (int64_t i = 0; i < top_k; ++i) factors[i] *= inverse;
}

// Sorts entries by expert, rows in order. `places` says where a row's i-th choice went, `tokens`
// which row an entry is of.
static void sort_run(const Instruction& c, const Step& step) {
  const int64_t rows = c.rows < 0 ? step.tokens : c.rows, experts = c.a[4], top_k = c.a[5];
  const int32_t* ids = pointer<const int32_t>(c.a[0]);
  int32_t *places = pointer<int32_t>(c.a[2]), *tokens = pointer<int32_t>(c.a[3]);
  const Entries at(c.a[1], experts);
  for (int64_t e = 0; e <= experts; ++e) at.start[e] = 0;
  for (int64_t i = 0; i < rows * top_k; ++i) ++at.start[ids[i] + 1];
  int32_t count = 0;
  for (int64_t e = 0; e < experts; ++e) {
    if (at.start[e + 1]) at.active[count++] = static_cast<int32_t>(e);
    at.start[e + 1] += at.start[e];
  }
  *at.active_count = count;
  for (int64_t i = 0; i < rows * top_k; ++i) places[i] = at.start[ids[i]]++;
  for (int64_t e = experts; e > 0; --e) at.start[e] = at.start[e - 1];
  at.start[0] = 0;
  for (int64_t i = 0; i < rows * top_k; ++i) tokens[places[i]] = static_cast<int32_t>(i / top_k);
}

struct ExpertSplit {
  int64_t experts;                   // that could be active
  int panels, panel_blocks, block;   // of one matrix

  int tasks() const { return static_cast<int>(experts) * panel_blocks; }
};

SIXFOLD_INLINE ExpertSplit split_experts(const Weight& w, int64_t rows, int64_t experts,
                                         int64_t top_k) {
  const int64_t most = rows * top_k < experts ? rows * top_k : experts;
  const LinearSplit s = split_linear(w, most ? rows * top_k / most : 1);
  return {most, (w.n + kPanel - 1) / kPanel, s.panel_blocks, s.panels};
}

static ExpertSplit experts_up_split(const Instruction& c, const Step& step) {
  const int64_t rows = c.rows < 0 ? step.tokens : c.rows;
  return split_experts(*pointer<const Weight>(c.a[3]), rows, c.a[7], c.a[8]);
}

static ExpertSplit experts_down_split(const Instruction& c, const Step& step) {
  const int64_t rows = c.rows < 0 ? step.tokens : c.rows;
  return split_experts(*pointer<const Weight>(c.a[2]), rows, c.a[5], c.a[6]);
}

// x (rows, k) as `linear` takes it, `out` where row 0 of panel 0 goes.
SIXFOLD_INLINE void multiply(const Weight& w, int64_t x, int64_t ldx, float* out, int64_t ldo,
                             int first, int last, int64_t rows) {
  Instruction c = {};
  c.a[0] = c.a[5] = x, c.a[1] = ldx;
  c.a[3] = reinterpret_cast<int64_t>(out), c.a[4] = ldo;
  switch (w.format) {
    case kF32: return linear_block<kF32>(w, c, first, last, 0, rows);
    case kBF16: return linear_block<kBF16>(w, c, first, last, 0, rows);
    case kF16: return linear_block<kF16>(w, c, first, last, 0, rows);
    case kQ8: return linear_block<kQ8>(w, c, first, last, 0, rows);
    case kQ8Half: return linear_block<kQ8Half>(w, c, first, last, 0, rows);
    default: return linear_block<kQ4>(w, c, first, last, 0, rows);
  }
}

// hidden = silu(gate) * up for a block of columns of one expert's rows.
static void experts_up_run(const Instruction& c, const Step& step, int task, float* scratch) {
  const ExpertSplit s = experts_up_split(c, step);
  const Entries entries(c.a[5], c.a[7]);
  const int number = task / s.panel_blocks, first = task % s.panel_blocks * s.block;
  if (number >= *entries.active_count) return;
  const int last = first + s.block < s.panels ? first + s.block : s.panels;
  const int expert = entries.active[number];
  const Weight* gate = pointer<const Weight>(c.a[3]) + 2 * expert;
  const int64_t n = gate->n, k = gate->k;
  const int columns = (last - first) * kPanel;
  const int width = first * kPanel + columns < n ? columns : static_cast<int>(n) - first * kPanel;
  const int64_t row_bytes = c.a[2] ? quantised_row_bytes(k) : 4 * k;
  const int64_t from = c.a[2] ? c.a[2] : c.a[0], stride = c.a[2] ? row_bytes : 4 * c.a[1];
  const int64_t space = (kScratchFloats - kExpertRows * columns) * 4 / row_bytes;
  const int64_t most = space < kExpertRows ? (space < 1 ? 1 : space) : kExpertRows;
  int8_t* gathered = reinterpret_cast<int8_t*>(scratch + kExpertRows * columns);
  for (int64_t e = entries.start[expert]; e < entries.start[expert + 1];) {
    const int64_t left = entries.start[expert + 1] - e, rows = left < most ? left : most;
    const int32_t* tokens = pointer<const int32_t>(c.a[6]) + e;
    int64_t x = from + tokens[0] * stride;
    if (rows > 1) {
      for (int64_t i = 0; i < rows; ++i)
        __builtin_memcpy(gathered + i * row_bytes, pointer<const int8_t>(from + tokens[i] * stride),
                         row_bytes);
      x = reinterpret_cast<int64_t>(gathered);
    }
    float* hidden = pointer<float>(c.a[4]) + e * n;
    multiply(gate[0], x, k, hidden, n, first, last, rows);
    multiply(gate[1], x, k, scratch - first * kPanel, columns, first, last, rows);
    for (int64_t i = 0; i < rows; ++i) {
      float* out = hidden + i * n + first * kPanel;
      const float* up = scratch + i * columns;
      int j = 0;
      for (; j + W <= width; j += W) store(out + j, activate(load(out + j), 0) * load(up + j));
      for (; j < width; ++j) out[j] = activate(splat(out[j]), 0)[0] * up[j];
    }
    e += rows;
  }
}

static void experts_down_run(const Instruction& c, const Step& step, int task) {
  const ExpertSplit s = experts_down_split(c, step);
  const Entries entries(c.a[4], c.a[5]);
  const int number = task / s.panel_blocks, first = task % s.panel_blocks * s.block;
  if (number >= *entries.active_count) return;
  const int last = first + s.block < s.panels ? first + s.block : s.panels;
  const int expert = entries.active[number];
  const Weight& w = pointer<const Weight>(c.a[2])[expert];
  const int64_t begin = entries.start[expert], rows = entries.start[expert + 1] - begin;
  const int64_t x = c.a[1] ? c.a[1] + begin * quantised_row_bytes(w.k) : c.a[0] + begin * w.k * 4;
  multiply(w, x, w.k, pointer<float>(c.a[3]) + begin * w.n, w.n, first, last, rows);
}

// The sum of a row's experts in the order of its choice, whatever other rows chose.
static void combine_row(const Instruction& c, int64_t t) {
  const int64_t width = c.a[4], top_k = c.a[5];
  const float* rows = pointer<const float>(c.a[0]);
  const int32_t* places = pointer<const int32_t>(c.a[1]) + t * top_k;
  const float* factors = pointer<const float>(c.a[2]) + t * top_k;
  float* out = pointer<float>(c.a[3]) + t * width;
  for (int64_t j = 0; j < width; ++j) out[j] = factors[0] * rows[places[0] * width + j];
  for (int64_t i = 1; i < top_k; ++i) {
    const float* row = rows + places[i] * width;
    const float factor = factors[i];
    for (int64_t j = 0; j < width; ++j) out[j] += factor * row[j];
  }
}
