// One instruction-set level: everything above, in namespace sixfold::LEVEL. The including file sets
// LEVEL and is compiled with the level's flags.
namespace sixfold {
namespace LEVEL {
#include "simd.h"
#include "linear.inl"
#include "pointwise.inl"
#include "attention.inl"

static int tasks(const Instruction& c, const Step& step) {
  switch (c.op) {
    case kLinear: return linear_tasks(c, step);
    case kAttention: return attention_tasks(c, step);
    case kMerge: return merge_tasks(c, step);
    default: {
      const int64_t rows = c.rows < 0 ? step.tokens : c.rows;
      return static_cast<int>((rows + kRowsPerTask - 1) / kRowsPerTask);
    }
  }
}

static void run(const Instruction& c, const Step& step, int task, int, float* scratch) {
  switch (c.op) {
    case kEmbed: return by_rows<embed_row>(c, step, task);
    case kRmsNorm: return by_rows<norm_row>(c, step, task);
    case kAngles: return by_rows<angles_row>(c, step, task);
    case kRope: return by_rows<rope_row>(c, step, task);
    case kGate: return by_rows<gate_row>(c, step, task);
    case kQuantise: return by_rows<quantise_one>(c, step, task);
    case kKvWrite: return by_rows<write_row>(c, step, task);
    case kLinear: return linear_run(c, step, task);
    case kAttention: return attention_run(c, task, scratch);
    case kMerge: return merge_run(c, task);
  }
}

extern const Kernels kernels;
const Kernels kernels = {tasks, run};
}  // namespace LEVEL
}  // namespace sixfold
