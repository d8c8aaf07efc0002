// Ends what begin_target.h started. GCC keeps the target until the end of the file, where it
// instantiates templates, so nothing may follow.
#if defined(__clang__)
#pragma clang attribute pop
#endif
