// Operands and results for a program of which nothing is known but its tables: for the standalone binaries.
#pragma once
#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>

#include "launch.h"

namespace mpk {

inline std::vector<char> read_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

struct Memory {
  std::vector<AlignedBytes> keep;
  Operands o;
};

// Bytes of every operand: as many as its largest use, not one more.
inline std::vector<size_t> operand_bytes(const Program& p) {
  std::vector<size_t> bytes(p.header->args);
  for (const abi::Buffer& b : p.buffers) {
    const auto space = static_cast<abi::Space>(b.space);
    if (space == abi::Space::ARG) bytes[b.index] = std::max<size_t>(bytes[b.index], b.bytes);
    if (space == abi::Space::RESULT && b.alias >= 0) bytes[b.alias] = std::max<size_t>(bytes[b.alias], b.bytes);
  }
  return bytes;
}

inline std::vector<size_t> result_bytes(const Program& p) {
  std::vector<size_t> bytes(p.header->results);
  for (const abi::Buffer& b : p.buffers)
    if (static_cast<abi::Space>(b.space) == abi::Space::RESULT)
      bytes[b.index] = std::max<size_t>(bytes[b.index], b.bytes);
  return bytes;
}

// Moderate numbers in every type: 16-bit words that are bf16 between 0.5 and 2.
inline std::vector<AlignedBytes> operands(const Program& p) {
  std::vector<AlignedBytes> out;
  uint32_t seed = 1;
  for (size_t n : operand_bytes(p)) {
    out.push_back(aligned_bytes(n));
    for (size_t i = 0; i < n; i += 2) {
      seed = seed * 1664525u + 1013904223u;
      const uint16_t word = static_cast<uint16_t>(0x3f00 + (seed >> 24));
      std::memcpy(out.back().get() + i, &word, std::min<size_t>(2, n - i));
    }
  }
  return out;
}

// Fresh results and workspace, poisoned, for these operands.
inline Memory memory_for(const Program& p, const std::vector<AlignedBytes>& args) {
  Memory m;
  const auto fresh = [&m](size_t n) {
    m.keep.push_back(aligned_bytes(n));
    std::memset(m.keep.back().get(), 0xff, n);
    return m.keep.back().get();
  };
  for (const AlignedBytes& a : args) m.o.args.push_back(a.get());
  m.o.arg_bytes = operand_bytes(p), m.o.result_bytes = result_bytes(p);
  for (size_t n : m.o.result_bytes) m.o.results.push_back(fresh(n));
  m.o.workspace_bytes = p.header->workspace, m.o.workspace = fresh(m.o.workspace_bytes);
  return m;
}

}  // namespace mpk
