// The C interface that ctypes calls. Levels are compiled in by SIXFOLD_HAS_<level>.
#include <cstring>

#include "team.h"

#define SIXFOLD_LEVELS(X) X(portable) X(avx2) X(avxvnni) X(avx512) X(avx512vnni) X(neon) X(neondot)

namespace sixfold {
#define DECLARE(name) namespace name { extern const Kernels kernels; }
SIXFOLD_LEVELS(DECLARE)

static const Kernels* find(const char* level) {
#ifdef SIXFOLD_X86
  if (!std::strcmp(level, "avx2")) return &avx2::kernels;
  if (!std::strcmp(level, "avxvnni")) return &avxvnni::kernels;
  if (!std::strcmp(level, "avx512")) return &avx512::kernels;
  if (!std::strcmp(level, "avx512vnni")) return &avx512vnni::kernels;
#endif
#ifdef SIXFOLD_ARM64
  if (!std::strcmp(level, "neon")) return &neon::kernels;
  if (!std::strcmp(level, "neondot")) return &neondot::kernels;
#endif
  return std::strcmp(level, "portable") ? nullptr : &portable::kernels;
}
}  // namespace sixfold

#ifdef _WIN32
#define SIXFOLD_API extern "C" __declspec(dllexport)
#else
#define SIXFOLD_API extern "C" __attribute__((visibility("default")))
#endif

SIXFOLD_API int sixfold_abi() { return 3; }

SIXFOLD_API int sixfold_has_level(const char* level) { return sixfold::find(level) != nullptr; }

SIXFOLD_API void* sixfold_team(int threads, const char* level) {
  const sixfold::Kernels* kernels = sixfold::find(level);
  return kernels ? new sixfold::Team(threads, kernels) : nullptr;
}

SIXFOLD_API void sixfold_team_free(void* team) { delete static_cast<sixfold::Team*>(team); }

SIXFOLD_API void sixfold_run(void* team, const void* instructions, int count, int64_t tokens) {
  static_cast<sixfold::Team*>(team)->run(
      static_cast<const sixfold::Instruction*>(instructions), count, sixfold::Step{tokens});
}
