#define LEVEL neondot
#include "intrinsics.h"
#include "program.h"
#include "level.inl"
