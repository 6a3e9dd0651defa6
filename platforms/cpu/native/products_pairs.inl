// AVX2: products of bytes are added in pairs to 16 bits, the pairs to 32 bits.

constexpr int kOffset = 0;
constexpr int kTileRows = 4;
constexpr int kPartsAtOnce = 2;  // halves the loads of activations, of which two go in a cycle

// |w| * (a with w's sign): at most 2 * 128 * 127 a pair, so the 16-bit sum cannot saturate.
template <int M, int P, int K>
SIXFOLD_INLINE void products_of_bytes(const uint8_t* w, const int8_t* x, int64_t row,
                                      ni (*sum)[P]) {
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8  // measured: 3 to 5 %
  for (int step = 0; step < K / 4; ++step, w += kStride) {
    __m256i signs[P], sizes[P];
    for (int p = 0; p < P; ++p) {
      signs[p] = _mm256_loadu_si256((const __m256i*)(w + p * 32));
      sizes[p] = _mm256_abs_epi8(signs[p]);
    }
    for (int m = 0; m < M; ++m) {
      const __m256i a = _mm256_set1_epi32(four_bytes(x + m * row + step * 4));
      for (int p = 0; p < P; ++p) {
        const __m256i pairs = _mm256_maddubs_epi16(sizes[p], _mm256_sign_epi8(a, signs[p]));
        sum[m][p] += (ni)_mm256_madd_epi16(pairs, ones);
        SIXFOLD_KEEP(sum[m][p]);
      }
    }
  }
}

// At most 8 * 2 * 15 * 127 = 30480: a group's sum fits 16 bits.
template <int M, int P, int K>
SIXFOLD_INLINE void products_of_nibbles(const uint8_t* w, const int8_t* x, int64_t row,
                                        ni (*sum)[P]) {
  static_assert(K <= 32);
  __m256i pairs[M][P];
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < P; ++p) pairs[m][p] = _mm256_setzero_si256();
  const __m256i mask = _mm256_set1_epi8(15);
  for (int step = 0; step < K / 8; ++step, w += kStride) {
    __m256i low[P], high[P];
    for (int p = 0; p < P; ++p) {
      const __m256i both = _mm256_loadu_si256((const __m256i*)(w + p * 32));
      low[p] = _mm256_and_si256(both, mask);
      high[p] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    }
    for (int m = 0; m < M; ++m) {
      const int8_t* a = x + m * row + step * 8;
      const __m256i first = _mm256_set1_epi32(four_bytes(a));
      const __m256i second = _mm256_set1_epi32(four_bytes(a + 4));
      for (int p = 0; p < P; ++p) {
        const __m256i one = _mm256_maddubs_epi16(low[p], first);
        const __m256i two = _mm256_maddubs_epi16(high[p], second);
        pairs[m][p] = _mm256_add_epi16(pairs[m][p], _mm256_add_epi16(one, two));
        SIXFOLD_KEEP(pairs[m][p]);
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < P; ++p)
      sum[m][p] += (ni)_mm256_madd_epi16(pairs[m][p], _mm256_set1_epi16(1));
}
