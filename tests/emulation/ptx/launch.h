// Programs and their launches.
#pragma once

#include <string_view>

#include "machine.h"

namespace ptx {

// The kernels of a module. One of a name that is there already takes its place.
void load_module(std::string_view text);

const Kernel* find_kernel(std::string_view name);

// Runs the whole grid before it returns. `values` are pointers to the parameters, as
// cudaLaunchKernel takes them. False if no GPU could run it. `together`: as in runtime.h.
bool launch(const Kernel& kernel, emulated::dim3 grid, emulated::dim3 block,
            uint64_t dynamic_shared, void** values, bool together = false);

}  // namespace ptx
