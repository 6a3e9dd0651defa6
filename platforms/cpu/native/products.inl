// Products of quantised weights with activations rounded to bytes, exact in integers: one file for
// each way that instruction sets have. Each way says how many vectors of outputs it takes at once
// (kPartsAtOnce), how many rows a tile has (kTileRows), and what it adds to every signed weight
// (kOffset; VNNI multiplies unsigned by signed).
//
// products_of_bytes adds to `sum` over K k signed weights times activations, for M rows that lie
// `row` bytes apart and P vectors of outputs, where P is kPartsAtOnce; products_of_nibbles the same
// for weights 0..15. With an offset the caller begins with -kOffset * sum(a).

SIXFOLD_INLINE int32_t four_bytes(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return four;
}

constexpr int kStride = 64;  // bytes from one step of four (or eight) k to the next: 16 outputs

#if defined(__AVX2__) && !defined(__AVX512BW__) && !defined(__AVXVNNI__)
#include "products_pairs.inl"
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#include "products_i8mm.inl"
#else
#include "products_dot.inl"
#endif
