// Starts the code of one instruction set: up to end_target.h the compiler may use it.
//
// A file of an instruction set first includes the headers of the standard library, then defines
// MSRNN_AVX2, or MSRNN_AVX512 and perhaps MSRNN_AVX512_BF16, and includes this. We use pragmas,
// since a compiler flag for the whole file leaks: it would also compile the functions of the
// standard library for wide instructions, and the linker may hand those to every other file, and
// so to an older processor.
#if defined(__clang__)

#if defined(MSRNN_AVX512_BF16)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#elif defined(MSRNN_AVX512)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#endif

#elif defined(MSRNN_AVX512_BF16)
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#elif defined(MSRNN_AVX512)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#else
#pragma GCC target("avx2,fma,f16c")
#endif
