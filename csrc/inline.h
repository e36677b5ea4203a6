// VITKERNELS_INLINE: always inlined, so that code compiled for one processor never shares an out-of-line copy with code
// for another.
#pragma once

#ifdef __CUDACC__
#define VITKERNELS_INLINE __host__ __device__ __forceinline__
#else
#define VITKERNELS_INLINE inline __attribute__((always_inline))
#endif
