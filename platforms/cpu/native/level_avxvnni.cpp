#define LEVEL avxvnni
#include "intrinsics.h"
#include "program.h"
#include "level.inl"
