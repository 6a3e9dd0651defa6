// A team of threads that walks a list of instructions together.
#pragma once
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "program.h"

namespace sixfold {

class Team {
 public:
  Team(int threads, const Kernels* kernels);
  ~Team();
  void run(const Instruction* instructions, int count, const Step& step);
  // Holds thread i to cpus[i]. Thread 0 is whoever calls `run`: it begins each run on cpus[0] and
  // keeps its mask, which the threads that it starts for other work inherit.
  bool place(const int* cpus);

 private:
  // `next` and `done` carry the run's number in their high half, so that a thread that was
  // descheduled during an earlier run can never take part in a later one by mistake.
  struct alignas(64) Slot {
    std::atomic<uint64_t> next{0};
    std::atomic<uint64_t> done{0};
    std::atomic<int> tasks{0};
  };

  void worker(int index);
  static bool finished(uint64_t run, const Slot& slot);
  void walk(uint64_t run, const Instruction* instructions, int count, const Step& step,
            float* scratch);
  void reserve(int count);

  const Kernels* kernels_;
  std::vector<std::thread> threads_;
  std::vector<std::unique_ptr<float[]>> scratch_;
  std::vector<std::unique_ptr<Slot[]>> retired_;  // a late thread may still look at them
  std::atomic<Slot*> slots_{nullptr};
  int capacity_ = 0;
  int home_ = -1;  // thread 0's CPU
  // A seqlock around the job: odd while it is written.
  std::atomic<uint32_t> version_{0};
  std::atomic<const Instruction*> instructions_{nullptr};
  std::atomic<int> count_{0};
  std::atomic<int64_t> tokens_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace sixfold
