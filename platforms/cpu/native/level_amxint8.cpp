#define LEVEL amxint8
#include "intrinsics.h"
#include "program.h"
#include "level.inl"
