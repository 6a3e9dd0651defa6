// Where threads may run. Linux only; elsewhere nothing is done and the answer is false.
#pragma once
#include <thread>

namespace sixfold {

// Holds a running thread to one CPU; false when the system refuses.
bool hold(std::thread& thread, int cpu);

// Moves the calling thread to a CPU that its mask allows; the mask stays as it is.
void move_to(int cpu);

}  // namespace sixfold
