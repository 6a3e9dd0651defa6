// The C interface that ctypes calls. Levels are compiled in by SIXFOLD_HAS_<level>.
#include <cstring>

#include "amx_permission.h"
#include "team.h"

#define DECLARE(level) namespace level { extern const Kernels kernels; }
#define FOUND(level) if (!std::strcmp(name, #level)) return &level::kernels;

namespace sixfold {
#ifdef SIXFOLD_HAS_portable
DECLARE(portable)
#endif
#ifdef SIXFOLD_HAS_avx2
DECLARE(avx2)
#endif
#ifdef SIXFOLD_HAS_avxvnni
DECLARE(avxvnni)
#endif
#ifdef SIXFOLD_HAS_avx512
DECLARE(avx512)
#endif
#ifdef SIXFOLD_HAS_avx512vnni
DECLARE(avx512vnni)
#endif
#ifdef SIXFOLD_HAS_amxint8
DECLARE(amxint8)
#endif
#ifdef SIXFOLD_HAS_neon
DECLARE(neon)
#endif
#ifdef SIXFOLD_HAS_neondot
DECLARE(neondot)
#endif
#ifdef SIXFOLD_HAS_neoni8mm
DECLARE(neoni8mm)
#endif

static const Kernels* find(const char* name) {
#ifdef SIXFOLD_HAS_portable
  FOUND(portable)
#endif
#ifdef SIXFOLD_HAS_avx2
  FOUND(avx2)
#endif
#ifdef SIXFOLD_HAS_avxvnni
  FOUND(avxvnni)
#endif
#ifdef SIXFOLD_HAS_avx512
  FOUND(avx512)
#endif
#ifdef SIXFOLD_HAS_avx512vnni
  FOUND(avx512vnni)
#endif
#ifdef SIXFOLD_HAS_amxint8
  if (!std::strcmp(name, "amxint8") && !amx_permitted()) return nullptr;
  FOUND(amxint8)
#endif
#ifdef SIXFOLD_HAS_neon
  FOUND(neon)
#endif
#ifdef SIXFOLD_HAS_neondot
  FOUND(neondot)
#endif
#ifdef SIXFOLD_HAS_neoni8mm
  FOUND(neoni8mm)
#endif
  return nullptr;
}
}  // namespace sixfold

#ifdef _WIN32
#define SIXFOLD_API extern "C" __declspec(dllexport)
#else
#define SIXFOLD_API extern "C" __attribute__((visibility("default")))
#endif

SIXFOLD_API int sixfold_abi() { return 5; }

SIXFOLD_API int sixfold_has_level(const char* level) { return sixfold::find(level) != nullptr; }

SIXFOLD_API void* sixfold_team(int threads, const char* level) {
  const sixfold::Kernels* kernels = sixfold::find(level);
  return kernels ? new sixfold::Team(threads, kernels) : nullptr;
}

// `cpus` has one entry for each of the team's threads. 0: the system refuses.
SIXFOLD_API int sixfold_team_place(void* team, const int* cpus) {
  return static_cast<sixfold::Team*>(team)->place(cpus);
}

SIXFOLD_API void sixfold_team_free(void* team) { delete static_cast<sixfold::Team*>(team); }

SIXFOLD_API void sixfold_run(void* team, const void* instructions, int count, int64_t tokens) {
  static_cast<sixfold::Team*>(team)->run(
      static_cast<const sixfold::Instruction*>(instructions), count, sixfold::Step{tokens});
}
