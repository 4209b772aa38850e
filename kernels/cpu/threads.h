// A parallel loop over independent pieces of work.
#pragma once

#include <cstdint>

namespace quantcli {

void set_threads(int n);
int threads();

/// Calls run(context, begin, end) on disjoint ranges that cover 0 … n, each of at most `grain` pieces, on up to threads() threads.
void parallel_run(int64_t n, int64_t grain, void (*run)(const void* context, int64_t begin, int64_t end), const void* context);

/// Calls body(begin, end) likewise. Pieces must not depend on each other, so that the result is the same for any number of threads.
///
/// No std:: templates here nor in any file compiled for an instruction set: the linker keeps one copy of a template's code, and it might
/// keep the one with AVX-512 in it for everybody. A template over a lambda of that file is safe.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
    const auto run = [](const void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); };
    parallel_run(n, grain, run, &body);
}

}  // namespace quantcli
