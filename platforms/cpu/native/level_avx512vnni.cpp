#define LEVEL avx512vnni
#include "intrinsics.h"
#include "program.h"
#include "level.inl"
