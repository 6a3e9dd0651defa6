// Four k at once into lanes of 32 bits: VNNI, arm64's dot product, or plain vectors.

constexpr int kTileRows = W == 16 ? 8 : W == 8 ? 6 : 4;
constexpr int kPartsAtOnce = 1;

#if defined(__AVX512VNNI__)
constexpr int kOffset = 128;
SIXFOLD_INLINE ni dot_unsigned(ni sum, ni w, int32_t a) {
  return (ni)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(a));
}
SIXFOLD_INLINE ni dot_signed(ni sum, ni w, int32_t a) {
  return dot_unsigned(sum, w ^ splat_int(0x80808080), a);
}
#elif defined(__AVXVNNI__)
constexpr int kOffset = 128;
SIXFOLD_INLINE ni dot_unsigned(ni sum, ni w, int32_t a) {
  return (ni)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(a));
}
SIXFOLD_INLINE ni dot_signed(ni sum, ni w, int32_t a) {
  return dot_unsigned(sum, w ^ splat_int(0x80808080), a);
}
#elif defined(__AVX512BW__)
constexpr int kOffset = 0;
SIXFOLD_INLINE ni dot_unsigned(ni sum, ni w, int32_t a) {
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)w, _mm512_set1_epi32(a));
  return sum + (ni)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
SIXFOLD_INLINE ni dot_signed(ni sum, ni w, int32_t a) {
  // |w| * (a with w's sign): at most 2 * 128 * 127 a pair, so the 16-bit sum cannot saturate.
  const __m512i all = _mm512_set1_epi32(a);
  const __mmask64 negative = _mm512_movepi8_mask((__m512i)w);
  const __m512i turned = _mm512_mask_sub_epi8(all, negative, _mm512_setzero_si512(), all);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8((__m512i)w), turned);
  return sum + (ni)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kOffset = 0;
SIXFOLD_INLINE ni dot_signed(ni sum, ni w, int32_t a) {
  return (ni)vdotq_s32((int32x4_t)sum, (int8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(a)));
}
SIXFOLD_INLINE ni dot_unsigned(ni sum, ni w, int32_t a) { return dot_signed(sum, w, a); }
#else
constexpr int kOffset = 0;
SIXFOLD_INLINE ni dot_signed(ni sum, ni w, int32_t a) {
  const ni all = splat_int(a);
  sum += ((w << 24) >> 24) * ((all << 24) >> 24);
  sum += ((w << 16) >> 24) * ((all << 16) >> 24);
  sum += ((w << 8) >> 24) * ((all << 8) >> 24);
  return sum + (w >> 24) * (all >> 24);
}
SIXFOLD_INLINE ni dot_unsigned(ni sum, ni w, int32_t a) { return dot_signed(sum, w, a); }
#endif

template <int M, int P, int K>
SIXFOLD_INLINE void products_of_bytes(const uint8_t* w, const int8_t* x, int64_t row,
                                      ni (*sum)[P]) {
  static_assert(P == 1);
  for (int step = 0; step < K / 4; ++step, w += kStride) {
    const ni four = (ni)*reinterpret_cast<const vi*>(w);
    for (int m = 0; m < M; ++m)
      sum[m][0] = dot_signed(sum[m][0], four, four_bytes(x + m * row + step * 4));
  }
}

template <int M, int P, int K>
SIXFOLD_INLINE void products_of_nibbles(const uint8_t* w, const int8_t* x, int64_t row,
                                        ni (*sum)[P]) {
  static_assert(P == 1);
  for (int step = 0; step < K / 8; ++step, w += kStride) {
    const ni both = (ni)*reinterpret_cast<const vi*>(w);
    const ni low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
    for (int m = 0; m < M; ++m) {
      const int8_t* a = x + m * row + step * 8;
      sum[m][0] = dot_unsigned(sum[m][0], low, four_bytes(a));
      sum[m][0] = dot_unsigned(sum[m][0], high, four_bytes(a + 4));
    }
  }
}
