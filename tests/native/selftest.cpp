// The native kernels against plain loops in double, without Python: for sanitizer builds and for
// cross-compiled ones under an emulator. Prints one line per level; exits 1 on the first mismatch.
//
//   selftest LEVEL...        (see platforms/cpu/native_library.py for the names)
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "program.h"

using namespace sixfold;
extern "C" int sixfold_has_level(const char*);
extern "C" void* sixfold_team(int, const char*);
extern "C" void sixfold_team_free(void*);
extern "C" void sixfold_run(void*, const void*, int, int64_t);

namespace {

std::mt19937 random_bits(7);
int checks = 0;

float normal() { return std::normal_distribution<float>()(random_bits); }
int64_t address(const void* p) { return reinterpret_cast<int64_t>(p); }

std::vector<float> normals(size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = normal();
  return values;
}

uint16_t half_of(float x) {  // exact for the few multiples of 2^-10 below 1 that are used here
  int exponent;
  const float fraction = std::frexp(x, &exponent);
  if (x == 0) return 0;
  return static_cast<uint16_t>(((exponent + 14) << 10) | (static_cast<int>(fraction * 2048) & 1023));
}

double from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

double from_f16(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const double size = exponent ? std::ldexp(1024 + (half & 1023), exponent - 25)
                               : std::ldexp(half & 1023, -24);
  return half & 0x8000 ? -size : size;
}

void near(double got, double want, double size, const char* what, int at) {
  ++checks;
  if (std::fabs(got - want) <= 3e-5 * (1 + size)) return;
  std::printf("%s: at %d got %.9g, want %.9g\n", what, at, got, want);
  std::exit(1);
}

// A weight of every format over guarded memory: exactly as many bytes as the layout has.
struct Matrix {
  Weight struct_{};
  std::vector<char> data;
  std::vector<uint16_t> scales, mins;
  std::vector<float> bias;
  std::vector<double> values;  // (n, k)
};

Matrix matrix(int format, int n, int k, bool has_min) {
  Matrix m;
  const int panels = (n + 15) / 16, groups = (k + 31) / 32;
  m.values.assign(static_cast<size_t>(n) * k, 0);
  m.bias = normals(n);
  if (format <= kF16) {
    const int item = format == kF32 ? 4 : 2;
    m.data.assign(static_cast<size_t>(panels) * k * 16 * item, 0);
    for (int o = 0; o < n; ++o)
      for (int i = 0; i < k; ++i) {
        const size_t at = (static_cast<size_t>(o / 16) * k + i) * 16 + o % 16;
        const float value = static_cast<float>(random_bits() % 512 + 1) / 1024;
        m.values[static_cast<size_t>(o) * k + i] = value;
        uint16_t two = half_of(value);
        if (format == kBF16) {
          uint32_t bits;
          std::memcpy(&bits, &value, 4);
          two = static_cast<uint16_t>(bits >> 16);
          bits &= 0xffff0000u;
          float kept;
          std::memcpy(&kept, &bits, 4);
          m.values[static_cast<size_t>(o) * k + i] = kept;
        }
        if (format == kF32) std::memcpy(&m.data[at * 4], &value, 4);
        else std::memcpy(&m.data[at * 2], &two, 2);
      }
  } else {
    const int per = format == kQ8Half ? 2 : 1;
    m.data.assign(static_cast<size_t>(panels) * groups * 16 * (format == kQ4 ? 16 : 32), 0);
    m.scales.assign(static_cast<size_t>(panels) * groups * per * 16, 0);
    if (has_min) m.mins.assign(static_cast<size_t>(panels) * groups * 16, 0);
    for (int o = 0; o < n; ++o)
      for (int g = 0; g < groups; ++g) {
        const size_t base = static_cast<size_t>(o / 16) * groups + g;
        float scale[2], low = 0;
        for (int h = 0; h < per; ++h) {
          scale[h] = static_cast<float>(random_bits() % 256 + 1) / 1024;
          m.scales[(base * per + h) * 16 + o % 16] = half_of(scale[h]);
        }
        if (has_min) {
          low = static_cast<float>(random_bits() % 256 + 1) / 1024;
          m.mins[base * 16 + o % 16] = half_of(low);
        }
        for (int i = 0; i < 32 && g * 32 + i < k; ++i) {
          double value;
          if (format == kQ4) {
            const int q = static_cast<int>(random_bits() % 16);
            char& byte = m.data[base * 256 + static_cast<size_t>((i / 8 * 16 + o % 16) * 4 + i % 4)];
            byte = static_cast<char>(byte | (i % 8 < 4 ? q : q << 4));
            value = scale[0] * (has_min ? q : q - 8) - low;
          } else {
            const int q = static_cast<int>(random_bits() % 256) - 128;
            m.data[base * 512 + static_cast<size_t>((i / 4 * 16 + o % 16) * 4 + i % 4)] =
                static_cast<char>(q);
            value = scale[format == kQ8Half ? i / 16 : 0] * q - low;
          }
          m.values[static_cast<size_t>(o) * k + g * 32 + i] = value;
        }
      }
  }
  m.struct_ = {format, n, k, has_min, m.data.data(), m.scales.data(),
               has_min ? m.mins.data() : nullptr, m.bias.data()};
  return m;
}

void check_linear(void* team, int format, int rows, int n, int k, bool has_min) {
  const Matrix m = matrix(format, n, k, has_min);
  const std::vector<float> x = normals(static_cast<size_t>(rows) * k);
  std::vector<float> out(static_cast<size_t>(rows) * n, NAN);
  const int groups = (k + 31) / 32;
  std::vector<char> codes(static_cast<size_t>(rows) * groups * (32 + 24));
  Instruction list[2] = {};
  list[0] = {kQuantise, rows, 0, 0, {address(x.data()), k, address(codes.data()), k, 1}, {}};
  list[1] = {kLinear, rows, 0, 0,
             {address(x.data()), k, address(&m.struct_), address(out.data()), n,
              address(codes.data())}, {}};
  sixfold_run(team, list, 2, rows);
  for (int r = 0; r < rows; ++r)
    for (int o = 0; o < n; ++o) {
      double want = m.bias[o], size = 0;
      for (int i = 0; i < k; ++i) {
        double a = x[static_cast<size_t>(r) * k + i];
        if (format >= kQ8) {
          float most = 0;
          for (int j = i / 32 * 32; j < i / 32 * 32 + 32 && j < k; ++j)
            most = std::fmax(most, std::fabs(x[static_cast<size_t>(r) * k + j]));
          a = std::nearbyintf(static_cast<float>(a) * (127.0f / most)) *
              static_cast<double>(most / 127.0f);
        }
        want += a * m.values[static_cast<size_t>(o) * k + i];
        size += std::fabs(a * m.values[static_cast<size_t>(o) * k + i]);
      }
      near(out[static_cast<size_t>(r) * n + o], want, size, "linear", r * n + o);
    }
}

// One row that decodes and one that prefills, with a window or without.
void check_attention(void* team, int heads, int kv_heads, int dim, int window, int page_size,
                     int format, bool sinking) {
  const int context[2] = {70, 9}, fresh[2] = {1, 41}, rows = 2, tokens = 42;
  const int width = (80 + page_size - 1) / page_size;
  std::vector<int32_t> table(rows * width), starts = {0, 1, 42}, contexts = {70, 9};
  for (int i = 0; i < rows * width; ++i) table[i] = 1 + (i * 37) % (rows * width);
  const int64_t slots = static_cast<int64_t>(rows * width + 1) * page_size;
  const int row_bytes = format == kF32 ? 4 * dim : format == kQ8 ? dim + 4 : 2 * dim;
  const int width_all = kv_heads * dim;
  // Keys and values by slot; the kernel writes them to the pages, which are read back as kept.
  const std::vector<float> keys = normals(static_cast<size_t>(slots) * width_all);
  const std::vector<float> values = normals(static_cast<size_t>(slots) * width_all);
  std::vector<uint8_t> pool(static_cast<size_t>(slots) * 2 * kv_heads * row_bytes, 0xff);
  std::vector<int64_t> everywhere(slots);
  for (int64_t i = 0; i < slots; ++i) everywhere[i] = slots - 1 - i;
  AttentionSpec spec = {heads, kv_heads, dim, window, 0.2f, 0.0f, format, row_bytes};
  AttentionPlan filling = {};
  filling.page_size = page_size, filling.slots = everywhere.data();
  Instruction fill[1] = {};
  fill[0] = {kKvWrite, static_cast<int32_t>(slots), 0, 0, {address(keys.data()), width_all,
             address(values.data()), width_all, address(pool.data()), address(&spec),
             address(&filling)}, {}};
  sixfold_run(team, fill, 1, slots);
  auto read = [&](int64_t slot, int head, int kind, int d) {
    const int64_t page = slot / page_size, at = slot % page_size;
    const uint8_t* row = &pool[static_cast<size_t>(
        (((page * kv_heads + head) * 2 + kind) * page_size + at) * row_bytes)];
    const float given = (kind ? values : keys)[static_cast<size_t>(
        (slots - 1 - slot) * width_all + head * dim + d)];
    double value = 0;
    if (format == kF32) {
      float x;
      std::memcpy(&x, row + 4 * d, 4);
      value = x;
    } else if (format == kQ8) {
      float scale;
      std::memcpy(&scale, row + dim, 4);
      value = static_cast<double>(static_cast<int8_t>(row[d])) * scale;
    } else {
      uint16_t bits;
      std::memcpy(&bits, row + 2 * d, 2);
      value = format == kBF16 ? from_bf16(bits) : from_f16(bits);
    }
    near(value, given, format == kF32 ? 0 : format == kF16 ? 300 : 3000, "kept", d);
    return value;
  };
  std::vector<double> all;  // (slots, kv heads, key or value, dim) as kept
  for (int64_t slot = 0; slot < slots; ++slot)
    for (int head = 0; head < kv_heads; ++head)
      for (int kind = 0; kind < 2; ++kind)
        for (int d = 0; d < dim; ++d) all.push_back(read(slot, head, kind, d));
  auto kept = [&](int64_t slot, int head, int kind, int d) {
    return all[static_cast<size_t>(((slot * kv_heads + head) * 2 + kind) * dim + d)];
  };
  const std::vector<float> q = normals(static_cast<size_t>(tokens) * heads * dim);
  std::vector<float> out(q.size(), NAN);
  const std::vector<float> sinks = normals(static_cast<size_t>(heads));
  const int64_t sink = sinking ? address(sinks.data()) : 0;
  // Row 0 is cut in two parts that are merged.
  const int begin = window ? std::max(0, 70 - window + 1) : 0, middle = (begin + 71) / 2;
  std::vector<int32_t> work = {0, 0, 1, begin, middle, 0, 0, 1, middle, 71};
  for (int query = 0; query < 41; query += 16) {
    const int last = query + 16 < 41 ? query + 16 : 41;
    work.insert(work.end(), {1, query, last, window ? std::max(0, 9 - window + 1) : 0, 9 + last});
  }
  const int32_t merge[3] = {0, 0, 2};
  std::vector<float> partials(static_cast<size_t>(2) * heads * (dim + 2));
  AttentionPlan plan = {rows, page_size, width, tokens, table.data(), starts.data(),
                        contexts.data(), nullptr, work.data(),
                        static_cast<int32_t>(work.size() / 5), 2, merge, 1, 0, partials.data()};
  Instruction list[2] = {};
  list[0] = {kAttention, tokens, 0, 0, {address(q.data()), heads * dim, address(pool.data()),
             address(out.data()), address(&spec), address(&plan), sink}, {}};
  list[1] = {kMerge, tokens, 0, 0, {address(out.data()), address(&spec), address(&plan), sink}, {}};
  sixfold_run(team, list, 2, tokens);
  for (int token = 0; token < tokens; ++token) {
    const int row = token ? 1 : 0, position = context[row] + (token ? token - 1 : 0);
    const int first = window ? std::max(0, position - window + 1) : 0;
    for (int head = 0; head < heads; ++head) {
      std::vector<double> weights;
      double total = 0, best = -1e300;
      const int kv_head = head / (heads / kv_heads);
      auto slot = [&](int p) {
        return static_cast<int64_t>(table[row * width + p / page_size]) * page_size + p % page_size;
      };
      for (int p = first; p <= position; ++p) {
        double dot = 0;
        for (int d = 0; d < dim; ++d)
          dot += static_cast<double>(q[(static_cast<size_t>(token) * heads + head) * dim + d]) *
                 kept(slot(p), kv_head, 0, d);
        weights.push_back(dot * 0.2f);
        best = std::fmax(best, dot * 0.2f);
      }
      if (sinking) total = std::exp(sinks[static_cast<size_t>(head)] - best);
      for (double& w : weights) total += w = std::exp(w - best);
      for (int d = 0; d < dim; ++d) {
        double want = 0;
        for (int p = first; p <= position; ++p)
          want += weights[p - first] / total * kept(slot(p), kv_head, 1, d);
        near(out[(static_cast<size_t>(token) * heads + head) * dim + d], want, 1, "attention", token);
      }
    }
  }
  (void)fresh;
}

}  // namespace

int main(int count, char** names) {
  for (int i = 1; i < count; ++i) {
    if (!sixfold_has_level(names[i])) {
      std::printf("this build has no level %s\n", names[i]);
      return 1;
    }
    for (int threads : {1, 3}) {
      void* team = sixfold_team(threads, names[i]);
      for (int format = kF32; format <= kQ8Half; ++format)
        for (int rows : {1, 2, 5, 13, 31})
          for (int n : {1, 16, 37})
            for (int k : {1, 31, 64, 97}) {
              check_linear(team, format, rows, n, k, false);
              if (format == kQ8 || format == kQ4) check_linear(team, format, rows, n, k, true);
            }
      for (int window : {0, 6, 20})
        for (int page_size : {1, 16})
          for (int format : {kF32, kBF16, kF16, kQ8}) {
            check_attention(team, 6, 2, 16, window, page_size, format, false);
            check_attention(team, 3, 3, 20, window, page_size, format, true);
            check_attention(team, 8, 1, 64, window, page_size, format, true);
          }
      sixfold_team_free(team);
    }
    std::printf("%s: %d checks passed\n", names[i], checks);
    checks = 0;
  }
  return 0;
}
