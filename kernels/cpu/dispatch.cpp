// Chooses the instruction set at load.
#include "dispatch.h"

#include <atomic>

namespace quantcli {

// Each set's objects come from the same sources, compiled with QC_ISA naming their namespace.
#define QC_DECLARE(set)                      \
    namespace set {                          \
    extern const BlockOps block_ops;         \
    extern const SolveOps solve_ops;         \
    extern const Float4Ops float4_ops;       \
    extern const MinifloatOps minifloat_ops; \
    }
#define QC_ENTRY(set, supported, hidden) \
    InstructionSet { #set, supported, hidden, &set::block_ops, &set::solve_ops, &set::float4_ops, &set::minifloat_ops }

#if defined(__x86_64__)
QC_DECLARE(baseline)
QC_DECLARE(avx2)
QC_DECLARE(avx2x16)
QC_DECLARE(avx512)
#elif defined(__aarch64__)
QC_DECLARE(neon)
#else
QC_DECLARE(baseline)
#endif

// Best last.
static std::vector<InstructionSet> detect() {
#if defined(__x86_64__)
    // __builtin_cpu_supports also asks the operating system whether it saves these registers (xgetbv).
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    return {QC_ENTRY(baseline, true, false), QC_ENTRY(avx2x16, avx2, true), QC_ENTRY(avx2, avx2, false), QC_ENTRY(avx512, avx512, false)};
#elif defined(__aarch64__)
    return {QC_ENTRY(neon, true, false)};
#else
    return {QC_ENTRY(baseline, true, false)};
#endif
}

const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> sets = detect();
    return sets;
}

static std::atomic<const InstructionSet*> chosen{nullptr};

const InstructionSet& active_set() {
    if (const InstructionSet* set = chosen) return *set;
    const InstructionSet* best = nullptr;
    for (const auto& set : instruction_sets())
        if (set.supported && !set.hidden) best = &set;
    chosen = best;
    return *best;
}

bool select_set(const std::string& name) {
    for (const auto& set : instruction_sets()) {
        if (set.name != name || !set.supported) continue;
        chosen = &set;
        return true;
    }
    return false;
}

}  // namespace quantcli
