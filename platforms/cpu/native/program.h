// What crosses from Python to the native kernels: instructions over raw memory, and the team of
// threads that runs them. The structs are mirrored by ctypes in platforms/cpu/native_library.py.
#pragma once
#include <cstdint>

namespace sixfold {

enum Op : int32_t {
  kEmbed = 0,      // a: ids i64, weight, out | scale
  kRmsNorm = 1,    // a: x, x stride, residual or 0, weight, out, total or 0, width | eps
  kAngles = 2,     // a: positions i64, inverse, cos, sin, half | scale
  kRope = 3,       // a: q, q stride, k, k stride, cos, sin, q out, k out, q norm or 0, k norm or 0,
                   //    shape* | eps
  kGate = 4,       // a: gate, gate stride, up, up stride, out, width, kind (0 silu, 1 gelu tanh)
  kLinear = 5,     // a: x, x stride, weight, out, out stride, quantised x or 0
  kQuantise = 6,   // a: x, x stride, quantised x, width, rows of x for each row of work
  kKvWrite = 7,    // a: k, k stride, v, v stride, pool layer, spec*, plan
  kAttention = 8,  // a: q, q stride, pool layer, out, spec*, plan, sinks or 0
  kMerge = 9,      // a: out, spec*, plan, sinks or 0
  kRoute = 10,     // a: logits, logits stride, ids i32, factors, experts, top k, renormalise
  kSortRows = 11,    // a: ids, entries*, places i32, tokens i32, experts, top k
  kExpertsUp = 12,    // a: x, x stride, quantised x or 0, weights*, hidden, entries*, tokens,
                      //    experts, top k
  kExpertsDown = 13,  // a: hidden, quantised hidden or 0, weights*, out, entries*, experts, top k
  kCombine = 14,      // a: expert rows, places, factors, out, width, top k
};

struct Instruction {
  int32_t op;
  int32_t rows;   // rows of work; -1 = the step's tokens
  int32_t chain;  // of the instructions that follow, so many do the same rows at once with this one
  int32_t ahead;  // not 0: the next instruction does not wait for this one
  int64_t a[12];
  float f[4];
};

// Of weights; keys and values have the first four, kQ8 with one float scale at the end of a row.
enum Format : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2, kQ8 = 3, kQ4 = 4, kQ8Half = 5 };

// A matrix (n, k) in panels of 16 rows; see packed layouts in docs/contracts/cpu-native.md.
struct Weight {
  int32_t format, n, k, has_min;
  const void* data;
  const uint16_t* scales;  // fp16 (panels, groups, 16), kQ8Half two a group; null for unquantised formats
  const uint16_t* mins;    // as scales, or null
  const float* bias;       // (n,) or null
};

struct RopeShape {
  int32_t heads, kv_heads, dim, half;
};

// A layer's pages are (page, kv head, key or value, token, row of `row_bytes`).
struct AttentionSpec {
  int32_t heads, kv_heads, dim, window;
  float scale, soft_cap;
  int32_t format, row_bytes;
};

// One cache group in one step.
struct AttentionPlan {
  int32_t rows, page_size, table_width, tokens;
  const int32_t* table;         // (rows, table_width)
  const int32_t* query_start;   // (rows + 1)
  const int32_t* context;       // (rows)
  const int64_t* slots;         // (tokens)
  const int32_t* work;          // (pieces, 5): row, first query, last query, first key, last key
  int32_t pieces, splits;       // splits: pieces that are part of a row, merged afterwards
  const int32_t* merges;        // (merge count, 3): token, first partial, last partial
  int32_t merge_count, unused;
  float* partials;              // (splits, heads, dim + 2)
};

struct Step {
  int64_t tokens;
};

struct Scratch;  // per thread, owned by the team

struct Kernels {
  int (*tasks)(const Instruction&, const Step&);
  void (*run)(const Instruction&, const Step&, int task, int tasks, float* scratch);
};

constexpr int64_t kScratchFloats = 1 << 20;

}  // namespace sixfold
