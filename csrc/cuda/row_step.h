// The step of minGRU and minLSTM on rows of a larger state, as the host sees it.
#pragma once

#include "../scan.h"

namespace msrnn {

// Launches one kernel. Returns what the CUDA runtime says is wrong, or null.
const char* launch_row_step(const RowStep& step, void* stream);

}  // namespace msrnn
