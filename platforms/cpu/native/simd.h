// Vectors of one instruction-set level. Every level compiles the same sources inside a namespace of
// its own; only the primitives of this file differ. Included inside `namespace sixfold::LEVEL`.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef float nf __attribute__((vector_size(4 * W)));  // naturally aligned: in registers
typedef int32_t ni __attribute__((vector_size(4 * W)));

#define SIXFOLD_INLINE static inline __attribute__((always_inline))

SIXFOLD_INLINE nf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
SIXFOLD_INLINE void store(float* p, nf v) { *reinterpret_cast<vf*>(p) = v; }
SIXFOLD_INLINE nf splat(float x) { return nf{} + x; }
SIXFOLD_INLINE ni splat_int(int32_t x) { return ni{} + x; }
SIXFOLD_INLINE nf to_float(ni v) { return __builtin_convertvector(v, nf); }
SIXFOLD_INLINE nf choose(ni mask, nf a, nf b) {
  return (nf)(((ni)a & mask) | ((ni)b & ~mask));
}
SIXFOLD_INLINE nf max_of(nf a, nf b) { return choose(a > b, a, b); }

SIXFOLD_INLINE float sum_of(nf v) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += v[i];
  return total;
}
SIXFOLD_INLINE float max_lane(nf v) {
  float best = v[0];
  for (int i = 1; i < W; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// W numbers of a 16-bit format as float.
SIXFOLD_INLINE nf load_bf16(const uint16_t* p) {
  const vh raw = *reinterpret_cast<const vh*>(p);
  return (nf)(__builtin_convertvector(raw, vu) << 16);
}
SIXFOLD_INLINE nf load_f16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (nf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (nf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (nf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
  // Shift exponent and mantissa into place, then let one product rescale: exact for subnormals too.
  const vu raw = __builtin_convertvector(*reinterpret_cast<const vh*>(p), vu);
  const nf magnitude = (nf)((raw & 0x7fff) << 13) * splat(0x1p112f);
  return (nf)((vu)(ni)magnitude | ((raw & 0x8000) << 16));
#endif
}

// exp by 2^n times a polynomial (Cephes' expf); saturates instead of overflowing.
SIXFOLD_INLINE nf exp_of(nf x) {
  x = choose(x > splat(88.0f), splat(88.0f), x);
  const ni tiny = x < splat(-87.0f);
  const nf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const nf n = (x * 1.44269504088896341f + magic) - magic;
  nf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  nf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const ni power = (__builtin_convertvector(n, ni) + 127) << 23;
  return choose(tiny, nf{}, p * (nf)power);
}

// Sums of products of signed bytes: lanes are outputs, each lane holds four k. `kOffset` is what
// the level adds to every weight (VNNI multiplies unsigned by signed); the caller takes
// kOffset * sum(a) off again.
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
constexpr int kOffset = 128;
SIXFOLD_INLINE ni weight_bytes(const void* p) {
  return (ni)_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
}
SIXFOLD_INLINE ni dot_signed(ni sum, ni w, int32_t a) {
  return (ni)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(a));
}
SIXFOLD_INLINE ni dot_nibble(ni sum, ni w, int32_t a) { return dot_signed(sum, w, a); }
#elif defined(__AVXVNNI__)
constexpr int kOffset = 128;
SIXFOLD_INLINE ni weight_bytes(const void* p) {
  return (ni)_mm256_xor_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi8(-128));
}
SIXFOLD_INLINE ni dot_signed(ni sum, ni w, int32_t a) {
  return (ni)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(a));
}
SIXFOLD_INLINE ni dot_nibble(ni sum, ni w, int32_t a) { return dot_signed(sum, w, a); }
#elif defined(__AVX512BW__)
constexpr int kOffset = 0;
SIXFOLD_INLINE ni weight_bytes(const void* p) { return (ni)_mm512_loadu_si512(p); }
SIXFOLD_INLINE ni dot_nibble(ni sum, ni w, int32_t a) {
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)w, _mm512_set1_epi32(a));
  return sum + (ni)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
SIXFOLD_INLINE ni dot_signed(ni sum, ni w, int32_t a) {
  const __m512i all = _mm512_set1_epi32(a);
  const __mmask64 negative = _mm512_movepi8_mask((__m512i)w);
  const __m512i turned = _mm512_mask_sub_epi8(all, negative, _mm512_setzero_si512(), all);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8((__m512i)w), turned);
  return sum + (ni)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#elif defined(__AVX2__)
constexpr int kOffset = 0;
SIXFOLD_INLINE ni weight_bytes(const void* p) {
  return (ni)_mm256_loadu_si256((const __m256i*)p);
}
SIXFOLD_INLINE ni dot_nibble(ni sum, ni w, int32_t a) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(a));
  return sum + (ni)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
SIXFOLD_INLINE ni dot_signed(ni sum, ni w, int32_t a) {
  // |w| * (a with w's sign): at most 2 * 128 * 127 a pair, so the 16-bit sum cannot saturate.
  const __m256i turned = _mm256_sign_epi8(_mm256_set1_epi32(a), (__m256i)w);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), turned);
  return sum + (ni)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kOffset = 0;
SIXFOLD_INLINE ni weight_bytes(const void* p) { return (ni)vld1q_s32((const int32_t*)p); }
SIXFOLD_INLINE ni dot_signed(ni sum, ni w, int32_t a) {
  return (ni)vdotq_s32((int32x4_t)sum, (int8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(a)));
}
SIXFOLD_INLINE ni dot_nibble(ni sum, ni w, int32_t a) { return dot_signed(sum, w, a); }
#else
constexpr int kOffset = 0;
SIXFOLD_INLINE ni weight_bytes(const void* p) { return (ni)*reinterpret_cast<const vi*>(p); }
SIXFOLD_INLINE ni dot_signed(ni sum, ni w, int32_t a) {
  const ni all = splat_int(a);
  sum += ((w << 24) >> 24) * ((all << 24) >> 24);
  sum += ((w << 16) >> 24) * ((all << 16) >> 24);
  sum += ((w << 8) >> 24) * ((all << 8) >> 24);
  return sum + (w >> 24) * (all >> 24);
}
SIXFOLD_INLINE ni dot_nibble(ni sum, ni w, int32_t a) { return dot_signed(sum, w, a); }
#endif
