// arm64 with i8mm: an instruction multiplies two rows by two outputs over eight k. One row alone
// (or the last of three) takes the dot product.

constexpr int kOffset = 0;
constexpr int kTileRows = 8;
constexpr int kPartsAtOnce = 2;

// Lanes of `pair[m][p][h]` are (row 2m, row 2m + 1) x (outputs 2h, 2h + 1 of vector p).
template <int M, int P, typename LoadEight>
SIXFOLD_INLINE void products_of_eights(int eights, LoadEight load_eight, const int8_t* x,
                                       int64_t row, ni (*sum)[P]) {
  constexpr int kPairs = M / 2;
  int32x4_t pair[kPairs ? kPairs : 1][P][2] = {};
  for (int step = 0; step < eights; ++step) {
    int8x16_t first[P], second[P];  // four k of four outputs, and the next four k
    for (int p = 0; p < P; ++p) load_eight(step, p, first[p], second[p]);
    for (int m = 0; m < kPairs; ++m) {
      const int8_t* a = x + 2 * m * row + step * 8;
      const int8x16_t rows = vcombine_s8(vld1_s8(a), vld1_s8(a + row));
      for (int p = 0; p < P; ++p) {
        const int32x4_t one = vreinterpretq_s32_s8(first[p]), two = vreinterpretq_s32_s8(second[p]);
        pair[m][p][0] = vmmlaq_s32(pair[m][p][0], rows, vreinterpretq_s8_s32(vzip1q_s32(one, two)));
        pair[m][p][1] = vmmlaq_s32(pair[m][p][1], rows, vreinterpretq_s8_s32(vzip2q_s32(one, two)));
      }
    }
    if constexpr (M % 2) {
      const int8x16_t a = vcombine_s8(vld1_s8(x + (M - 1) * row + step * 8), vdup_n_s8(0));
      for (int p = 0; p < P; ++p) {
        const int32x4_t last = vdotq_laneq_s32((int32x4_t)sum[M - 1][p], first[p], a, 0);
        sum[M - 1][p] = (ni)vdotq_laneq_s32(last, second[p], a, 1);
      }
    }
  }
  for (int m = 0; m < kPairs; ++m)
    for (int p = 0; p < P; ++p) {
      const int64x2_t low = vreinterpretq_s64_s32(pair[m][p][0]);
      const int64x2_t high = vreinterpretq_s64_s32(pair[m][p][1]);
      sum[2 * m][p] += (ni)vzip1q_s64(low, high);
      sum[2 * m + 1][p] += (ni)vzip2q_s64(low, high);
    }
}

template <int M, int P, int K>
SIXFOLD_INLINE void products_of_bytes(const uint8_t* w, const int8_t* x, int64_t row,
                                      ni (*sum)[P]) {
  const auto load = [w](int step, int p, int8x16_t& first, int8x16_t& second) {
    const int8_t* at = reinterpret_cast<const int8_t*>(w) + 2 * step * kStride + p * 16;
    first = vld1q_s8(at), second = vld1q_s8(at + kStride);
  };
  products_of_eights<M, P>(K / 8, load, x, row, sum);
}

template <int M, int P, int K>
SIXFOLD_INLINE void products_of_nibbles(const uint8_t* w, const int8_t* x, int64_t row,
                                        ni (*sum)[P]) {
  const auto load = [w](int step, int p, int8x16_t& first, int8x16_t& second) {
    const uint8x16_t both = vld1q_u8(w + step * kStride + p * 16);
    first = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
    second = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
  };
  products_of_eights<M, P>(K / 8, load, x, row, sum);
}
