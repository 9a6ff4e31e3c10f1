// One step on the CPU, over every row of a table.
#pragma once

#include "../table.h"

namespace adamprox {

void step_on_cpu(TensorTable& table, int threads) noexcept;

// What it runs with here: "AVX-512", "AVX2" or "baseline".
const char* cpu_instruction_set();

}  // namespace adamprox
