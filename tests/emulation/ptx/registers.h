// Registers that never hold a value at the same time share a slot.
#pragma once

#include "machine.h"

namespace ptx {

// Compilers name a new register for nearly every result, some ten thousand in a kernel, and a
// fiber's slots would not fit into a cache. Most of these registers live within one stretch of
// instructions that nothing jumps into or out of; those of different stretches, and of one where
// one has been read for the last time, share a slot here. What is read in another stretch than it
// was written in, or may not have been written, keeps a slot of its own, and is poison until it is
// written.
void share_slots(Kernel* kernel);

}  // namespace ptx
