#pragma once

namespace sixfold {
// Whether this process may use AMX tiles; asks the system, once.
bool amx_permitted();
}  // namespace sixfold
