#define LEVEL avx2
#include "intrinsics.h"
#include "program.h"
#include "level.inl"
