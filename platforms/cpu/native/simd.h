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
// x - 0 and not 0 + x: compilers drop only the former, for which -0 stays what it is.
SIXFOLD_INLINE nf splat(float x) { return x - nf{}; }
SIXFOLD_INLINE ni splat_int(int32_t x) { return ni{} + x; }
SIXFOLD_INLINE nf to_float(ni v) { return __builtin_convertvector(v, nf); }
SIXFOLD_INLINE nf choose(ni mask, nf a, nf b) {
  return (nf)(((ni)a & mask) | ((ni)b & ~mask));
}
SIXFOLD_INLINE nf max_of(nf a, nf b) { return a > b ? a : b; }

// All lanes of the result hold the lanes of v joined by `join`, in log2(W) rounds.
template <int kStep = W / 2, typename V, typename Join>
SIXFOLD_INLINE V fold(V v, Join join) {
  if constexpr (kStep == 0) return v;
  else {
    typedef int32_t Lanes __attribute__((vector_size(4 * W)));
    Lanes other;
    for (int i = 0; i < W; ++i) other[i] = i ^ kStep;
    return fold<kStep / 2>(join(v, __builtin_shuffle(v, other)), join);
  }
}
SIXFOLD_INLINE float sum_of(nf v) {
  return fold(v, [](nf a, nf b) { return a + b; })[0];
}
SIXFOLD_INLINE int32_t sum_of_ints(ni v) {
  return fold(v, [](ni a, ni b) { return a + b; })[0];
}
SIXFOLD_INLINE float max_lane(nf v) {
  return fold(v, [](nf a, nf b) { return max_of(a, b); })[0];
}

// Lane i of the result is the sum of v[i]'s lanes: W vectors added pairwise, in log2(W) rounds.
template <int kStep>
SIXFOLD_INLINE nf add_neighbours(nf a, nf b) {
  typedef int32_t Lanes __attribute__((vector_size(4 * W)));
  Lanes from_even, from_odd;
  for (int i = 0; i < W; ++i) {
    from_even[i] = i & kStep ? W + i - kStep : i;
    from_odd[i] = i & kStep ? W + i : i + kStep;
  }
  return __builtin_shuffle(a, b, from_even) + __builtin_shuffle(a, b, from_odd);
}
template <int kStep = 1>
SIXFOLD_INLINE nf sums_of(nf* v) {
  if constexpr (kStep == W) return v[0];
  else {
    for (int i = 0; i < W / kStep / 2; ++i) v[i] = add_neighbours<kStep>(v[2 * i], v[2 * i + 1]);
    return sums_of<2 * kStep>(v);
  }
}
// W numbers of a 16-bit format as float.
SIXFOLD_INLINE nf load_bf16(const uint16_t* p) {
#if defined(__AVX512F__)
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (nf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#elif defined(__AVX2__)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (nf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
#else
  const vh raw = *reinterpret_cast<const vh*>(p);
  return (nf)(__builtin_convertvector(raw, vu) << 16);
#endif
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


typedef int8_t bytes_w __attribute__((vector_size(W)));
typedef uint16_t halves_w __attribute__((vector_size(2 * W)));

// W bytes as float, and W integers of -128..127 as bytes: compilers turn the generic conversions
// into scalar code.
SIXFOLD_INLINE nf load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return to_float((ni)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return to_float((ni)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  uint32_t four;
  __builtin_memcpy(&four, p, W);
  return to_float((ni)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
#else
  bytes_w bytes;
  __builtin_memcpy(&bytes, p, W);
  return __builtin_convertvector(bytes, nf);
#endif
}
SIXFOLD_INLINE void store_bytes(void* p, ni v) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
  const __m256i both = (__m256i)v;
  const __m128i low = _mm256_castsi256_si128(both), high = _mm256_extracti128_si256(both, 1);
  const __m128i words = _mm_packs_epi32(low, high), bytes = _mm_packs_epi16(words, words);
#elif defined(__aarch64__)
  const int16x4_t words = vmovn_s32((int32x4_t)v);
  const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
#else
  const bytes_w bytes = __builtin_convertvector(v, bytes_w);
#endif
  __builtin_memcpy(p, &bytes, W);
}

// Numbers rounded to a 16-bit format, ties to even; what fp16 cannot hold becomes its largest.
SIXFOLD_INLINE void store_bf16(uint16_t* p, nf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const halves_w out = __builtin_convertvector((ni)choose(v == v, (nf)rounded, (nf)(ni{} + 0x7fc0)),
                                               halves_w);
  __builtin_memcpy(p, &out, 2 * W);
}
SIXFOLD_INLINE void store_f16(uint16_t* p, nf v) {
  const nf most = splat(65504.0f);
  v = choose(v > most, most, choose(v < -most, -most, v));
#if defined(__AVX512F__)
  const __m256i out = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(p, &out, 2 * W);
#elif defined(__F16C__)
  const __m128i out = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(p, &out, 2 * W);
#elif defined(__aarch64__)
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  const vu bits = (vu)v, magnitude = bits & 0x7fffffff;
  const vu normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // Adding 0.5 lets the addition round a number below 2^-14 to the subnormals' step.
  const vu small = (vu)((nf)magnitude + splat(0.5f)) - (126u << 23);
  const ni tiny = (nf)magnitude < splat(0x1p-14f);
  vu out = (vu)choose(tiny, (nf)small, (nf)normal);
  out = (vu)choose(v == v, (nf)out, (nf)(ni{} + 0x7e00));
  const halves_w narrow = __builtin_convertvector(out | ((bits >> 16) & 0x8000), halves_w);
  __builtin_memcpy(p, &narrow, 2 * W);
#endif
}

// Keeps a value in its register: left alone, GCC regroups unrolled integer sums and spills most,
// and fuses a product into the sum that was to round it.
#if defined(SIXFOLD_KEEP)  // by a test's emulation
#elif defined(__aarch64__)
#define SIXFOLD_KEEP(value) asm("" : "+w"(value))
#else
#define SIXFOLD_KEEP(value) asm("" : "+x"(value))
#endif

// W vectors turned: lane j of vector i becomes lane i of vector j, in log2(W) rounds.
template <int kStep = 1>
SIXFOLD_INLINE void transpose(nf* v) {
  if constexpr (kStep < W) {
    typedef int32_t Lanes __attribute__((vector_size(4 * W)));
    Lanes low, high;
    for (int i = 0; i < W; ++i) {
      low[i] = i & kStep ? W + i - kStep : i;
      high[i] = i & kStep ? W + i : i + kStep;
    }
    for (int i = 0; i < W; ++i) {
      if (i & kStep) continue;
      const nf a = v[i], b = v[i + kStep];
      v[i] = __builtin_shuffle(a, b, low), v[i + kStep] = __builtin_shuffle(a, b, high);
    }
    transpose<2 * kStep>(v);
  }
}

// Bytes of a row rounded so that the largest magnitude is 127 times `inverse`'s reciprocal; ties go
// to even.
SIXFOLD_INLINE ni to_steps(nf x, float inverse) {
  const nf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  nf scaled = x * inverse;
  SIXFOLD_KEEP(scaled);
  return __builtin_convertvector((scaled + magic) - magic, ni);
}

// exp by 2^n times a polynomial (Cephes' expf); saturates instead of overflowing.
SIXFOLD_INLINE nf exp_of(nf x) {
  const nf most = splat(88.0f);
  x = x > most ? most : x;
  const ni tiny = x < splat(-87.0f);
  const nf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const nf shifted = x * 1.44269504088896341f + magic;
  const nf n = shifted - magic;
  nf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  nf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r + 1.0f) * r + 1.0f;
  const ni power = ((ni)shifted << 23) + 0x3f800000;  // the integer is in the low bits
  return choose(tiny, nf{}, p * (nf)power);
}

// 2^x for x up to 127, relative error below 2e-7; below -126.5 it is 0. Minimax polynomial of degree
// 5 on [-1/2, 1/2], fitted for this file with 2^0 exactly 1.
SIXFOLD_INLINE nf exp2_of(nf x) {
  const nf least = splat(-127.0f);
  x = least > x ? least : x;  // in this order NaN stays NaN
  const nf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const nf shifted = x + magic;
  const nf r = x - (shifted - magic);
  nf p = splat(1.32647285e-3f);
  p = p * r + 9.67151392e-3f;
  p = p * r + 5.55073358e-2f;
  p = p * r + 2.40222424e-1f;
  p = p * r + 6.93147004e-1f;
  p = p * r + 1.0f;
  const ni power = ((ni)shifted << 23) + 0x3f800000;  // the integer is in the low bits
  return p * (nf)power;
}
