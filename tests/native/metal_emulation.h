// As much of Metal's language as the kernels use, so that their sources compile with a C++ compiler
// and run on a CPU. Written from Apple's Metal Shading Language Specification.
//
// The threads of a threadgroup are fibers on one system thread. A fiber runs until it meets the
// others of its simdgroup or threadgroup; who goes first is the caller's to say, so that a result
// that depends on it shows. Stricter than a GPU: every access of a buffer is checked against its
// bounds, no two threads may write one element of an output, memory of a threadgroup starts as NaN,
// and threads that meet must all meet, at the same line.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

typedef unsigned int uint;
struct uint3 {
  uint x, y, z;
};

// Pages of threadgroup memory stand in a section of their own, so that it can be spoilt and sized.
#define threadgroup static __attribute__((section("threadgroup_memory")))
extern "C" __attribute__((weak)) char __start_threadgroup_memory[], __stop_threadgroup_memory[];

namespace emulation {

constexpr int kLanes = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kStack = 64 << 10;
constexpr long kThreadgroupBytes = 32 << 10;

struct Fault {
  char text[240];
};

template <typename... A>
[[noreturn]] void fail(const char* format, A... a) {
  Fault fault;
  std::snprintf(fault.text, sizeof fault.text, format, a...);
  throw fault;
}

// A place where threads meet. Values of two rounds are kept apart: who is early for the next round
// must not overwrite what others still read.
struct Gate {
  int members = 0, arrived = 0, line = 0;
  unsigned round = 0;
  uint64_t values[2][kLanes];
};

struct Thread {
  ucontext_t context;
  uint3 position;
  uint index;  // in the threadgroup
  Gate* waits_at;
  unsigned waits_for;
  bool done;
};

struct Group {
  ucontext_t scheduler;
  Thread threads[kMostThreads];
  Gate simdgroups[kMostThreads / kLanes], whole;
  uint3 position, size, groups;
  int count;
  Thread* now;
  Fault fault;
  bool failed;
};

static Group group;
static char* stacks = nullptr;

inline void meet(Gate& gate, int line) {
  Thread* self = group.now;
  if (gate.arrived == 0) gate.line = line;
  if (gate.line != line) fail("threads meet at lines %d and %d", gate.line, line);
  if (++gate.arrived == gate.members) {
    gate.arrived = 0;
    ++gate.round;
    return;
  }
  self->waits_at = &gate;
  self->waits_for = gate.round + 1;
  swapcontext(&self->context, &group.scheduler);
  self->waits_at = nullptr;
}

// Every lane's value, once all lanes have brought theirs.
template <typename T>
struct Lanes {
  int count;
  T lane[kLanes];
};

template <typename T>
Lanes<T> exchange(T value, int line) {
  static_assert(sizeof(T) <= 8, "a lane's value is at most eight bytes");
  Gate& gate = group.simdgroups[group.now->index / kLanes];
  uint64_t* values = gate.values[gate.round & 1];
  std::memcpy(&values[group.now->index % kLanes], &value, sizeof value);
  meet(gate, line);
  Lanes<T> all;
  all.count = gate.members;
  for (int i = 0; i < all.count; ++i) std::memcpy(&all.lane[i], &values[i], sizeof(T));
  return all;
}

template <typename T>
struct Input {
  const char* name;
  const T* data;
  int64_t size, at;
  const T& operator[](int64_t i) const {
    if (at + i < 0 || at + i >= size)
      fail("reads %s[%lld], it has %lld", name, (long long)(at + i), (long long)size);
    return data[at + i];
  }
  Input operator+(int64_t by) const { return {name, data, size, at + by}; }
};

template <typename T>
struct Output {
  const char* name;
  T* data;
  int64_t size;
  uint32_t* writer;  // 1 + the number of the thread that wrote the element
  struct Element {
    const Output& out;
    int64_t i;
    void operator=(T value) const {
      const uint3 p = group.now->position;
      const uint32_t self = 1 + p.x + 4099 * p.y + 1000003 * p.z;
      if (out.writer[i] != 0 && out.writer[i] != self)
        fail("two threads write %s[%lld]", out.name, (long long)i);
      out.writer[i] = self;
      out.data[i] = value;
    }
  };
  Element operator[](int64_t i) const {
    if (i < 0 || i >= size)
      fail("writes %s[%lld], it has %lld", name, (long long)i, (long long)size);
    return {*this, i};
  }
};

enum Order : int { kForward, kBackward, kOddFirst };

inline int turn(int order, int i, int count) {
  if (order == kForward) return i;
  if (order == kBackward) return count - 1 - i;
  const int odd = count / 2;
  return i < odd ? 2 * i + 1 : 2 * (i - odd);
}

static void (*body)() = nullptr;

inline void enter() {
  try {
    body();
  } catch (const Fault& fault) {
    if (!group.failed) group.fault = fault;
    group.failed = true;
  }
  group.now->done = true;
  swapcontext(&group.now->context, &group.scheduler);
}

inline void report_stuck(int left) {
  int line = 0;
  for (int i = 0; i < group.count; ++i)
    if (!group.threads[i].done) line = group.threads[i].waits_at->line;
  std::snprintf(group.fault.text, sizeof group.fault.text,
                "%d of %d threads wait at line %d for others that ended", left, group.count, line);
  group.failed = true;
}

inline void run_group(int order) {
  std::fill(__start_threadgroup_memory, __stop_threadgroup_memory, '\xFF');
  for (int left = group.count; left > 0 && !group.failed;) {
    bool moved = false;
    for (int i = 0; i < group.count && !group.failed; ++i) {
      Thread& thread = group.threads[turn(order, i, group.count)];
      if (thread.done || (thread.waits_at && thread.waits_at->round < thread.waits_for)) continue;
      group.now = &thread;
      swapcontext(&group.scheduler, &thread.context);
      moved = true;
      left -= thread.done;
    }
    if (!moved) report_stuck(left);
  }
}

inline void begin_group(uint3 at, const uint* threads, uint size) {
  group.position = at;
  group.count = static_cast<int>(std::min(size, threads[0] - at.x * size));
  group.failed = false;
  group.whole = Gate();
  group.whole.members = group.count;
  for (Gate& gate : group.simdgroups) gate = Gate();
  for (int i = 0; i < group.count; ++i) {
    Thread& thread = group.threads[i];
    thread.index = static_cast<uint>(i);
    thread.position = {at.x * size + thread.index, at.y, at.z};
    thread.waits_at = nullptr;
    thread.done = false;
    ++group.simdgroups[i / kLanes].members;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks + i * kStack;
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
}

// All threadgroups one after the other. False with a message when a thread did what it must not.
inline bool run(void (*kernel)(), const uint* threads, uint size, int order, char* message) {
  const long used = __stop_threadgroup_memory - __start_threadgroup_memory;
  if (size > kMostThreads || used > kThreadgroupBytes) {
    std::snprintf(message, sizeof(Fault), "%u threads and %ld bytes in a threadgroup", size, used);
    return false;
  }
  if (stacks == nullptr) stacks = new char[kMostThreads * kStack];
  body = kernel;
  group.size = {size, 1, 1};
  group.groups = {(threads[0] + size - 1) / size, threads[1], threads[2]};
  for (uint z = 0; z < threads[2]; ++z)
    for (uint y = 0; y < threads[1]; ++y)
      for (uint x = 0; x < group.groups.x; ++x) {
        begin_group({x, y, z}, threads, size);
        run_group(order);
        if (group.failed) {
          std::memcpy(message, group.fault.text, sizeof group.fault.text);
          return false;
        }
      }
  return true;
}

}  // namespace emulation

#define SIXFOLD_LINE int line = __builtin_LINE()

namespace metal {

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline void threadgroup_barrier(mem_flags, SIXFOLD_LINE) {
  emulation::meet(emulation::group.whole, line);
}

template <typename T>
T simd_sum(T value, SIXFOLD_LINE) {
  const auto all = emulation::exchange(value, line);
  T sum = all.lane[0];
  for (int i = 1; i < all.count; ++i) sum += all.lane[i];
  return sum;
}

template <typename T>
T simd_max(T value, SIXFOLD_LINE) {
  const auto all = emulation::exchange(value, line);
  return *std::max_element(all.lane, all.lane + all.count);
}

template <typename T>
T simd_min(T value, SIXFOLD_LINE) {
  const auto all = emulation::exchange(value, line);
  return *std::min_element(all.lane, all.lane + all.count);
}

inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }

namespace precise {
inline float exp(float x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
}  // namespace precise

template <typename To, typename From>
To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace metal

// IEEE 754 binary16, rounded to nearest even.
struct half {
  uint16_t bits;
  half() = default;
  explicit half(float f) {
    const float size = std::fabs(f);
    uint16_t magnitude;
    if (std::isnan(f)) {
      magnitude = 0x7E00;
    } else if (size >= 65520.0f) {
      magnitude = 0x7C00;
    } else {
      const int exponent = size == 0.0f ? -14 : std::max(std::ilogb(size), -14);
      const float steps = std::nearbyint(std::ldexp(size, 10 - exponent));
      magnitude = static_cast<uint16_t>(((exponent + 14) << 10) + static_cast<int>(steps));
    }
    bits = static_cast<uint16_t>(magnitude | (std::signbit(f) ? 0x8000 : 0));
  }
  explicit operator float() const {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size;
    if (exponent == 31)
      size = fraction ? NAN : INFINITY;
    else
      size = std::ldexp(static_cast<float>(fraction + (exponent ? 1024 : 0)),
                        (exponent ? exponent : 1) - 25);
    return bits & 0x8000 ? -size : size;
  }
};

// The upper half of a float, rounded to nearest even.
struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float f) {
    uint32_t word = metal::as_type<uint32_t>(f);
    if (std::isnan(f))
      word |= 0x400000;
    else
      word += 0x7FFF + (word >> 16 & 1);
    bits = static_cast<uint16_t>(word >> 16);
  }
  explicit operator float() const {
    return metal::as_type<float>(static_cast<uint32_t>(bits) << 16);
  }
};
typedef half float16_t;
