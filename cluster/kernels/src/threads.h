// Which thread of how many. Built without OpenMP, everything runs on the caller's thread.
#pragma once
#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
inline int64_t num_threads() { return omp_get_num_threads(); }
inline int64_t thread_index() { return omp_get_thread_num(); }
#else
inline int64_t num_threads() { return 1; }
inline int64_t thread_index() { return 0; }
#endif
