#define LEVEL avx512
#include "intrinsics.h"
#include "program.h"
#include "level.inl"
