// The instruction sets compiled in, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "../api.h"
#include "../float4.h"
#include "../minifloat.h"
#include "../solve.h"

namespace quantcli {

/// One instruction set: every op's entry, compiled for it.
struct InstructionSet {
    const char* name;
    bool supported;  // by this machine and its operating system
    bool hidden;     // only for tests: never chosen unless named
    const BlockOps* blocks;
    const SolveOps* solve;
    const Float4Ops* float4;
    const MinifloatOps* minifloat;
};

const std::vector<InstructionSet>& instruction_sets();

/// The one in use: the best that the machine supports, unless select() named another.
const InstructionSet& active_set();

/// Makes `name` the set in use; false when it is not compiled in or the machine lacks it.
bool select_set(const std::string& name);

}  // namespace quantcli
