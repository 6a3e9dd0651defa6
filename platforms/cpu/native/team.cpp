#include "team.h"

#include <chrono>

#include "affinity.h"

namespace sixfold {
namespace {

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kSpins = 4000;         // inside a run: then give the core to whoever else wants it
constexpr int kIdleSpins = 20000;    // between runs: then sleep until the next one
constexpr uint64_t kLow = 0xffffffffu;

}  // namespace

Team::Team(int threads, const Kernels* kernels) : kernels_(kernels) {
  for (int i = 0; i < threads; ++i) scratch_.emplace_back(new float[kScratchFloats]);
  reserve(64);
  for (int i = 1; i < threads; ++i) threads_.emplace_back([this, i] { worker(i); });
}

Team::~Team() {
  stopping_ = true;
  version_.fetch_add(2);
  version_.notify_all();
  for (auto& thread : threads_) thread.join();
}

bool Team::place(const int* cpus) {
  for (size_t i = 0; i < threads_.size(); ++i)
    if (!hold(threads_[i], cpus[i + 1])) return false;
  home_ = cpus[0];
  return true;
}

void Team::reserve(int count) {
  if (count <= capacity_) return;
  retired_.emplace_back(new Slot[count]);
  slots_ = retired_.back().get();
  capacity_ = count;
}

void Team::run(const Instruction* instructions, int count, const Step& step) {
  // On a helper's CPU the two would take turns until the system notices.
  if (home_ >= 0) move_to(home_);
  version_.fetch_add(1);
  reserve(count);
  const uint32_t version = version_.load() + 1;
  const uint64_t run = version;
  Slot* slots = slots_;
  for (int i = 0, chained = 0; i < count; ++i, --chained) {
    const int tasks = chained > 0 ? 0 : kernels_->tasks(instructions[i], step);
    if (chained <= 0) chained = instructions[i].chain + 1;
    slots[i].tasks.store(tasks, std::memory_order_relaxed);
    slots[i].next.store(run << 32, std::memory_order_relaxed);
    slots[i].done.store(run << 32, std::memory_order_relaxed);
  }
  instructions_.store(instructions, std::memory_order_relaxed);
  count_.store(count, std::memory_order_relaxed);
  tokens_.store(step.tokens, std::memory_order_relaxed);
  version_.store(version, std::memory_order_seq_cst);
  if (!threads_.empty()) version_.notify_all();
  walk(run, instructions, count, step, scratch_[0].get());
}

// Waits for all tasks of a slot; false when the run is over without this thread.
bool Team::finished(uint64_t run, const Slot& slot) {
  const int tasks = slot.tasks.load(std::memory_order_relaxed);
  for (int spins = 0;; ++spins) {
    const uint64_t done = slot.done.load(std::memory_order_acquire);
    if (done >> 32 != run) return false;
    if (static_cast<int>(done & kLow) >= tasks) return true;
    if (spins < kSpins) pause_briefly();
    else std::this_thread::yield();
  }
}

void Team::walk(uint64_t run, const Instruction* instructions, int count, const Step& step,
                float* scratch) {
  Slot* slots = slots_;
  for (int i = 0, waited = 0; i < count; ++i) {
    Slot& slot = slots[i];
    const int tasks = slot.tasks.load(std::memory_order_relaxed);
    for (uint64_t seen = slot.next.load(std::memory_order_acquire);;) {
      if (seen >> 32 != run) return;
      const int task = static_cast<int>(seen & kLow);
      if (task >= tasks) break;
      if (!slot.next.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
      kernels_->run(instructions[i], step, task, tasks, scratch);
      slot.done.fetch_add(1, std::memory_order_acq_rel);
      seen = slot.next.load(std::memory_order_acquire);
    }
    if (instructions[i].ahead) continue;
    for (; waited <= i; ++waited)
      if (!finished(run, slots[waited])) return;
  }
}

void Team::worker(int index) {
  uint32_t served = 0;
  for (;;) {
    uint32_t version = version_.load(std::memory_order_acquire);
    for (int spins = 0; version == served || version & 1; ++spins) {
      if (spins < kIdleSpins) pause_briefly();
      else version_.wait(version, std::memory_order_acquire);
      version = version_.load(std::memory_order_acquire);
    }
    if (stopping_) return;
    const Instruction* instructions = instructions_.load(std::memory_order_relaxed);
    const int count = count_.load(std::memory_order_relaxed);
    const Step step{tokens_.load(std::memory_order_relaxed)};
    std::atomic_thread_fence(std::memory_order_acquire);
    if (version_.load(std::memory_order_relaxed) != version) continue;
    served = version;
    walk(version, instructions, count, step, scratch_[index].get());
  }
}

}  // namespace sixfold
