// What Python and Triton's kernels are told of the tables of csrc/math, and of the bytes that a GPU is given.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "table.h"

namespace adamprox {

template <typename Key, size_t kSize, typename F>
auto describe(const Key (&keys)[kSize], F f) {
  std::vector<decltype(f(keys[0]))> result;
  for (const Key& key : keys) result.push_back(f(key));
  return result;
}

using Names = std::tuple<const char*, const char*, const char*>;

inline const char* name_of(int flag) { return flag == kAlways ? nullptr : kFlagKeys[flag].key; }

// (key, "moment" or "compute", the key of what must be on or null)
inline auto describe_states() {
  return describe(kStateKeys, [](const StateKey& s) {
    return Names(s.key, s.type == kMoment ? "moment" : "compute", name_of(s.flag));
  });
}

// (struct, decay, the key of what must be on or null)
inline auto describe_rules() {
  return describe(kRuleKeys,
                  [](const RuleKey& r) { return Names(r.name, r.decay, name_of(r.flag)); });
}

inline auto describe_numbers() {
  return describe(kNumberKeys, [](const NumberKey& n) {
    return n.key + (n.item < 0 ? "" : "[" + std::to_string(n.item) + "]");
  });
}

inline auto describe_flags() {
  return describe(kFlagKeys, [](const FlagKey& f) { return std::string(f.key); });
}

// Where things are, in words of 8 bytes unless it says otherwise.
inline std::map<std::string, size_t> describe_layout() {
  return {
      {"row", sizeof(TensorRow) / 8},
      {"row.param", offsetof(TensorRow, param) / 8},
      {"row.states", offsetof(TensorRow, states) / 8},
      {"row.numel", offsetof(TensorRow, numel) / 8},
      {"row.block", offsetof(TensorRow, block) / 8},
      {"row.scalars", offsetof(TensorRow, scalars) / 8},
      {"row.types", offsetof(TensorRow, param_dtype) / 8},
      {"row.slots", offsetof(TensorRow, first_slot) / 8},
      {"chunk", sizeof(Chunk) / 8},
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
