// Threads live for one call: a call is one weight matrix (milliseconds and more), and nothing has to survive a fork.
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace quantcli {

static std::atomic<int> n_threads{1};

void set_threads(int n) { n_threads = std::max(1, n); }
int threads() { return n_threads; }

void parallel_run(int64_t n, int64_t grain, void (*run)(const void*, int64_t, int64_t), const void* context) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t begin; (begin = next.fetch_add(grain)) < n;) run(context, begin, std::min(n, begin + grain));
    };
    const int64_t useful = (n + grain - 1) / grain;
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < std::min<int64_t>(n_threads, useful); ++i) others.emplace_back(work);
    } catch (const std::system_error&) {
        // The system gives no more threads: those there are do all the work.
    }
    work();
    for (auto& thread : others) thread.join();
}

}  // namespace quantcli
