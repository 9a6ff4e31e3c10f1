// The backends' entry points: each makes one step over every row of a table.
#pragma once

#include "tensor_table.h"

namespace adamprox {

void fused_adam_cpu(const TensorTable& table, int threads);

}  // namespace adamprox
