#define LEVEL portable
#include "intrinsics.h"
#include "program.h"
#include "level.inl"
