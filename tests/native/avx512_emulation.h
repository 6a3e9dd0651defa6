// The AVX-512 and VNNI instructions that the kernels use, as loops, so that those levels run on a
// CPU without them. Written from the operation sections of Intel's intrinsics guide. Included in
// place of <immintrin.h>; vectors are GCC's, lowered to whatever the CPU has.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

typedef int64_t __m512i __attribute__((vector_size(64), may_alias));
typedef int64_t __m256i __attribute__((vector_size(32), may_alias));
typedef int64_t __m128i __attribute__((vector_size(16), may_alias));
typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef uint64_t __mmask64;

#define SIXFOLD_KEEP(value) asm("" : "+m"(value))  // no register holds these vectors

namespace emulated {
template <typename T, typename V>
struct Lanes {
  static constexpr int kCount = sizeof(V) / sizeof(T);
  T lane[kCount];
  explicit Lanes(V v) { std::memcpy(lane, &v, sizeof v); }
  Lanes() { std::memset(lane, 0, sizeof lane); }
  V vector() const {
    V v;
    std::memcpy(&v, lane, sizeof v);
    return v;
  }
};
using I8 = Lanes<int8_t, __m512i>;
using U8 = Lanes<uint8_t, __m512i>;
using I16 = Lanes<int16_t, __m512i>;
using I32 = Lanes<int32_t, __m512i>;
inline int32_t saturate16(int32_t x) { return x > 32767 ? 32767 : x < -32768 ? -32768 : x; }
}  // namespace emulated

static inline __m512i _mm512_setzero_si512() { return __m512i{}; }

static inline __m512i _mm512_set1_epi32(int32_t x) {
  emulated::I32 r;
  for (auto& lane : r.lane) lane = x;
  return r.vector();
}

static inline __m512i _mm512_set1_epi16(int16_t x) {
  emulated::I16 r;
  for (auto& lane : r.lane) lane = x;
  return r.vector();
}

static inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i unsigned_bytes, __m512i bytes) {
  emulated::I32 r(sum);
  const emulated::U8 a(unsigned_bytes);
  const emulated::I8 b(bytes);
  for (int i = 0; i < 64; ++i) r.lane[i / 4] += a.lane[i] * b.lane[i];  // does not saturate
  return r.vector();
}

static inline __m512i _mm512_maddubs_epi16(__m512i unsigned_bytes, __m512i bytes) {
  const emulated::U8 a(unsigned_bytes);
  const emulated::I8 b(bytes);
  emulated::I16 r;
  for (int i = 0; i < 32; ++i)
    r.lane[i] = static_cast<int16_t>(emulated::saturate16(
        a.lane[2 * i] * b.lane[2 * i] + a.lane[2 * i + 1] * b.lane[2 * i + 1]));
  return r.vector();
}

static inline __m512i _mm512_madd_epi16(__m512i x, __m512i y) {
  const emulated::I16 a(x), b(y);
  emulated::I32 r;
  for (int i = 0; i < 32; ++i) r.lane[i / 2] += a.lane[i] * b.lane[i];
  return r.vector();
}

static inline __mmask64 _mm512_movepi8_mask(__m512i x) {
  const emulated::I8 a(x);
  __mmask64 mask = 0;
  for (int i = 0; i < 64; ++i) mask |= static_cast<uint64_t>(a.lane[i] < 0) << i;
  return mask;
}

static inline __m512i _mm512_mask_sub_epi8(__m512i otherwise, __mmask64 mask, __m512i x,
                                           __m512i y) {
  emulated::I8 r(otherwise);
  const emulated::I8 a(x), b(y);
  for (int i = 0; i < 64; ++i)
    if (mask >> i & 1) r.lane[i] = static_cast<int8_t>(a.lane[i] - b.lane[i]);
  return r.vector();
}

static inline __m512i _mm512_abs_epi8(__m512i x) {
  emulated::I8 r(x);
  for (auto& lane : r.lane) lane = static_cast<int8_t>(lane < 0 ? -lane : lane);
  return r.vector();
}

static inline __m256i _mm256_loadu_si256(const __m256i* p) {
  __m256i v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline __m128i _mm_loadu_si128(const __m128i* p) {
  __m128i v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline __m512i _mm512_cvtepu16_epi32(__m256i words) {
  uint16_t h[16];
  std::memcpy(h, &words, sizeof h);
  emulated::I32 r;
  for (int i = 0; i < 16; ++i) r.lane[i] = h[i];
  return r.vector();
}

static inline __m512i _mm512_cvtepi8_epi32(__m128i bytes) {
  int8_t b[16];
  std::memcpy(b, &bytes, sizeof b);
  emulated::I32 r;
  for (int i = 0; i < 16; ++i) r.lane[i] = b[i];
  return r.vector();
}

static inline __m128i _mm512_cvtepi32_epi8(__m512i x) {
  const emulated::I32 from(x);
  int8_t b[16];
  for (int i = 0; i < 16; ++i) b[i] = static_cast<int8_t>(from.lane[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
}

static inline __m512i _mm512_slli_epi32(__m512i x, unsigned by) {
  emulated::I32 r(x);
  for (auto& lane : r.lane) lane = static_cast<int32_t>(static_cast<uint32_t>(lane) << by);
  return r.vector();
}

static inline __m512 _mm512_cvtph_ps(__m256i halves) {
  uint16_t h[16];
  std::memcpy(h, &halves, sizeof h);
  float f[16];
  for (int i = 0; i < 16; ++i) {
    const uint32_t magnitude = static_cast<uint32_t>(h[i] & 0x7fff) << 13;
    float scaled;
    std::memcpy(&scaled, &magnitude, 4);
    scaled *= 0x1p112f;
    f[i] = h[i] & 0x8000 ? -scaled : scaled;
  }
  __m512 v;
  std::memcpy(&v, f, sizeof v);
  return v;
}

#define _MM_FROUND_TO_NEAREST_INT 0

// For numbers that fp16 holds after rounding.
static inline __m256i _mm512_cvtps_ph(__m512 v, int) {
  uint16_t h[16];
  for (int i = 0; i < 16; ++i) {
    const double size = std::fabs(static_cast<double>(v[i]));
    int exponent = 0;
    std::frexp(size, &exponent);
    if (exponent < -13) exponent = -13;  // a subnormal has the step of the smallest normal
    // Steps of 2^(exponent - 11): 1024..2047 of them, 2048 carry into the exponent by themselves.
    const int steps = size == size ? static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent))) : 0;
    const int bits = size != size ? 0x7e00 : steps < 1024 ? steps : ((exponent + 13) << 10) + steps;
    h[i] = static_cast<uint16_t>(bits | (std::signbit(v[i]) ? 0x8000 : 0));
  }
  __m256i out;
  std::memcpy(&out, h, sizeof out);
  return out;
}
