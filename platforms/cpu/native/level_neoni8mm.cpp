#define LEVEL neoni8mm
#include "intrinsics.h"
#include "program.h"
#include "level.inl"
