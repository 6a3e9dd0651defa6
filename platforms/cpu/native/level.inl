// One instruction-set level: everything above, in namespace sixfold::LEVEL. The including file sets
// LEVEL and is compiled with the level's flags.
namespace sixfold {
namespace LEVEL {
#include "simd.h"
#include "products.inl"
#include "linear.inl"
#include "pointwise.inl"
#include "kv_pages.inl"
#include "attention.inl"
#include "experts.inl"

static int tasks(const Instruction& c, const Step& step) {
  switch (c.op) {
    case kLinear: return linear_tasks(c, step);
    case kAttention: return attention_tasks(c, step);
    case kMerge: return merge_tasks(c, step);
    case kSortRows: return 1;
    case kExpertsUp: return experts_up_split(c, step).tasks();
    case kExpertsDown: return experts_down_split(c, step).tasks();
    default: {
      const int64_t rows = c.rows < 0 ? step.tokens : c.rows;
      return static_cast<int>((rows + kRowsPerTask - 1) / kRowsPerTask);
    }
  }
}

static void run_row(const Instruction& c, int64_t t) {
  switch (c.op) {
    case kEmbed: return embed_row(c, t);
    case kRmsNorm: return norm_row(c, t);
    case kAngles: return angles_row(c, t);
    case kRope: return rope_row(c, t);
    case kGate: return gate_row(c, t);
    case kQuantise: return quantise_one(c, t);
    case kKvWrite: return write_row(c, t);
    case kRoute: return route_row(c, t);
    case kCombine: return combine_row(c, t);
  }
}

// A chain goes through a row while the row is near.
static void run_rows(const Instruction* c, const Step& step, int task) {
  const int64_t rows = c->rows < 0 ? step.tokens : c->rows;
  const int64_t first = static_cast<int64_t>(task) * kRowsPerTask;
  for (int64_t t = first; t < rows && t < first + kRowsPerTask; ++t)
    for (int i = 0; i <= c->chain; ++i) run_row(c[i], t);
}

static void run(const Instruction& c, const Step& step, int task, int, float* scratch) {
  switch (c.op) {
    case kLinear: return linear_run(c, step, task);
    case kAttention: return attention_run(c, task, scratch);
    case kMerge: return merge_run(c, task);
    case kSortRows: return sort_run(c, step);
    case kExpertsUp: return experts_up_run(c, step, task, scratch);
    case kExpertsDown: return experts_down_run(c, step, task);
    default: return run_rows(&c, step, task);
  }
}

extern const Kernels kernels;
const Kernels kernels = {tasks, run};
}  // namespace LEVEL
}  // namespace sixfold
