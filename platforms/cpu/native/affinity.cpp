#include "affinity.h"

#ifdef __linux__
#include <pthread.h>
#include <sched.h>

#include <cstring>

namespace sixfold {
namespace {

constexpr int kMost = 8192;  // CPUs; the kernel's own limit
struct Mask {
  cpu_set_t parts[kMost / CPU_SETSIZE];
  Mask() { std::memset(parts, 0, sizeof parts); }
  explicit Mask(int cpu) : Mask() { CPU_SET_S(cpu, sizeof parts, parts); }
};

}  // namespace

bool hold(std::thread& thread, int cpu) {
  if (cpu < 0 || cpu >= kMost) return false;
  const Mask only(cpu);
  return pthread_setaffinity_np(thread.native_handle(), sizeof only.parts, only.parts) == 0;
}

void move_to(int cpu) {
  if (sched_getcpu() == cpu) return;
  Mask before;
  const size_t size = sizeof before.parts;
  if (sched_getaffinity(0, size, before.parts) || !CPU_ISSET_S(cpu, size, before.parts)) return;
  const Mask only(cpu);
  if (!sched_setaffinity(0, size, only.parts)) sched_setaffinity(0, size, before.parts);
}

}  // namespace sixfold

#else

namespace sixfold {
bool hold(std::thread&, int) { return false; }
void move_to(int) {}
}  // namespace sixfold

#endif
