// What this machine can do at most, by loops that do nothing else: see machine_limits.py.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

constexpr int kTurns = 7;  // the median counts

// Sums `bytes` (a multiple of 256) from `data` and keeps the sum.
static void read_memory(const char* data, size_t bytes) {
  __m256i sums[8] = {};
  for (size_t i = 0; i < bytes; i += 256)
    for (int lane = 0; lane < 8; ++lane)
      sums[lane] = _mm256_add_epi64(sums[lane], _mm256_load_si256((const __m256i*)(data + i) + lane));
  for (auto& sum : sums) asm volatile("" : "+x"(sum));
}

constexpr int64_t kFloatSteps = 20'000'000, kFloatSums = 12;

static void multiply_floats() {
  __m256 sums[kFloatSums] = {}, factor = _mm256_set1_ps(0.5f);
  asm volatile("" : "+x"(factor));
  for (int64_t step = 0; step < kFloatSteps; ++step)
#pragma GCC unroll 12
    for (int i = 0; i < kFloatSums; ++i)
      asm volatile("vfmadd231ps %1, %1, %0" : "+x"(sums[i]) : "x"(factor));
}

// Four rows of 256 signed bytes by 16 columns, all in the first cache: the inner loop of the AVX2
// kernels (platforms/cpu/native/products_pairs.inl) without scales, packing or stores.
constexpr int kRows = 4, kDepth = 256, kColumns = 16;
constexpr int64_t kByteSteps = 60'000;

static void multiply_bytes() {
  alignas(64) int8_t weights[kDepth / 4 * 64], rows[kRows * kDepth];
  memset(weights, 3, sizeof weights);
  memset(rows, 5, sizeof rows);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t turn = 0; turn < kByteSteps; ++turn) {
    asm volatile("" ::: "memory");
    __m256i sums[kRows][2] = {};
#pragma GCC unroll 8
    for (int step = 0; step < kDepth / 4; ++step) {
      __m256i signs[2], sizes[2];
      for (int p = 0; p < 2; ++p) {
        signs[p] = _mm256_load_si256((const __m256i*)(weights + step * 64) + p);
        sizes[p] = _mm256_abs_epi8(signs[p]);
      }
      for (int m = 0; m < kRows; ++m) {
        int32_t four;
        memcpy(&four, rows + m * kDepth + step * 4, 4);
        const __m256i a = _mm256_set1_epi32(four);
        for (int p = 0; p < 2; ++p) {
          const __m256i pairs = _mm256_maddubs_epi16(sizes[p], _mm256_sign_epi8(a, signs[p]));
          sums[m][p] = _mm256_add_epi32(sums[m][p], _mm256_madd_epi16(pairs, ones));
          asm volatile("" : "+x"(sums[m][p]));
        }
      }
    }
    for (auto& row : sums)
      for (auto& sum : row) asm volatile("" : "+x"(sum));
  }
}

template <class Work>
static double seconds(int threads, Work work) {
  std::vector<double> times;
  for (int turn = 0; turn < kTurns; ++turn) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int i = 0; i < threads; ++i) others.emplace_back(work, i);
    for (auto& other : others) other.join();
    times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  return times[kTurns / 2];
}

int main(int, char** arguments) {
  const int threads = atoi(arguments[1]);
  const size_t each = (512u << 20) / threads / 4096 * 4096;
  char* data = (char*)aligned_alloc(4096, each * threads);
  memset(data, 1, each * threads);
  const double reading = seconds(threads, [&](int i) { read_memory(data + i * each, each); });
  const double floats = seconds(threads, [](int) { multiply_floats(); });
  const double bytes = seconds(threads, [](int) { multiply_bytes(); });
  const double products = 2.0 * kByteSteps * kRows * kColumns * kDepth;
  printf("{\"read GB/s\": %.1f, \"float32 GFLOP/s\": %.0f, \"int8 GOP/s\": %.0f}\n",
         each * threads / reading / 1e9, 16.0 * kFloatSteps * kFloatSums * threads / floats / 1e9,
         products * threads / bytes / 1e9);
}
