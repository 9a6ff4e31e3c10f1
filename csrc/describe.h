// What Python and Triton's kernels are told of the tables of csrc/math, and of the bytes that a GPU is given.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "table.h"

namespace adamprox {

using Names = std::vector<std::tuple<const char*, const char*, const char*>>;

// (key, "moment" or "compute", the key of what must be on or null)
inline Names describe_states() {
  Names states;
  for (const StateKey& s : kStateKeys) {
    states.emplace_back(s.key, s.type == kMoment ? "moment" : "compute",
                        s.flag == kAlways ? nullptr : kFlagKeys[s.flag].key);
  }
  return states;
}

// (struct, decay, the key of the option that must be on or null)
inline Names describe_rules() {
  Names rules;
  for (const RuleKey& r : kRuleKeys) rules.emplace_back(r.name, r.decay, r.option);
  return rules;
}

inline std::vector<std::string> describe_numbers() {
  std::vector<std::string> numbers;
  for (const NumberKey& n : kNumberKeys) {
    numbers.push_back(n.key + (n.item < 0 ? "" : "[" + std::to_string(n.item) + "]"));
  }
  return numbers;
}

inline std::vector<std::string> describe_flags() {
  std::vector<std::string> flags;
  for (const FlagKey& f : kFlagKeys) flags.push_back(f.key);
  return flags;
}

// Where things are, in words of 8 bytes unless it says otherwise.
inline std::map<std::string, size_t> describe_layout() {
  return {
      {"row", sizeof(TensorRow) / 8},
      {"row.param", offsetof(TensorRow, param) / 8},
      {"row.states", offsetof(TensorRow, states) / 8},
      {"row.numel", offsetof(TensorRow, numel) / 8},
      {"row.scalars", offsetof(TensorRow, scalars) / 8},
      {"row.types", offsetof(TensorRow, param_dtype) / 8},
      {"scalars", sizeof(Scalars) / 8},
#define SCALAR(name) {"scalars." #name, offsetof(Scalars, name) / 8},
      ADAMPROX_SCALARS(SCALAR)
#undef SCALAR
          {"scalars.decay", offsetof(Scalars, decay) / 8},
      {"value", sizeof(Value) / 8},
      {"group_recipe", sizeof(GroupRecipe) / 8},
      {"group_recipe.flags", offsetof(GroupRecipe, flag) / 8},
      {"group_recipe.rule", offsetof(GroupRecipe, rule)},  // in bytes
      {"scalars_recipe", sizeof(ScalarsRecipe) / 8},
      {"head", sizeof(RecipesHead) / 8},
      {"record", sizeof(Record) / 8},
      {"decay_constants", kDecayConstants},
      {"chunk_size", kChunkSize},
      {"tile_size", kTileSize},
  };
}

}  // namespace adamprox
