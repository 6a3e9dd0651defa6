// Linux gives a process the tiles' state only when it asks (Documentation/arch/x86/xstate.rst).
#include "amx_permission.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sixfold {

bool amx_permitted() {
#if defined(SIXFOLD_EMULATED)
  return true;
#elif defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // <asm/prctl.h>, where it is new
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

}  // namespace sixfold
