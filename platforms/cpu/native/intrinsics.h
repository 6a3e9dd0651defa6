#pragma once
#if defined(SIXFOLD_EMULATED)
#include SIXFOLD_EMULATED  // a test's stand-in for instructions that the CPU lacks
#elif defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
