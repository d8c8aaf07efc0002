// Reads the text of a PTX module.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "machine.h"

namespace ptx {

// What this machine has not learnt, one line for each kind of instruction.
struct Unknown : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::vector<Kernel> read_module(std::string_view text);

}  // namespace ptx
