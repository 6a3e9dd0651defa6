#define LEVEL neon
#include "intrinsics.h"
#include "program.h"
#include "level.inl"
