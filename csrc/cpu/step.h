// One step on the CPU, over every row of a table.
#pragma once

#include <string>
#include <vector>

#include "../table.h"

namespace adamprox {

void step_on_cpu(TensorTable& table, int threads) noexcept;

// "AVX-512", "AVX2" or "baseline": those that run here, widest first, and the one that is used, which is
// the first until a test wants another. Throws std::invalid_argument of one that does not run.
std::vector<std::string> cpu_instruction_sets();
const char* cpu_instruction_set();
void use_cpu_instruction_set(const std::string& name);

}  // namespace adamprox
