// The emulated GPU: its limits, its threads and its memory. Errors end a launch with a text that
// names block and thread.
//
// Always checked: the shape of a launch; barriers that some threads of their scope never reach, or
// reach at another place; shuffles without all 32 threads of a warp; alignment; shared memory of a
// block that has exited. Shared memory starts as NaNs, and asynchronous copies land at random
// moments.
//
// Where the kernels are compiled with -fsanitize=thread (whose calls memory.cpp answers in place of
// ThreadSanitizer's library, which knows no clusters and no copies), every access is checked too,
// whatever the order drawn: races between threads that no barrier separates, bytes outside of every
// buffer, bytes never written, copies not waited for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "emulation.h"
#include "fiber.h"

namespace bnext::emulation {

struct Limits {
  int64_t shared_bytes_per_block = 227 * 1024;
  int64_t shared_bytes_per_sm = 228 * 1024;
  int64_t sms = 132;
  int64_t max_cluster_blocks = 16;
};

struct Statistics {
  int64_t launches, switches, barriers, shuffles, copies;
  int64_t summed_again;               // blocks whose floats were no good, by any_of_block
  int64_t bytes_read, bytes_written;  // of tensors, by instrumented kernels
};

extern Limits limits;
extern Statistics statistics;
extern std::set<uintptr_t> launched;  // kernels
void set_seed(uint64_t seed);

// The text of the first error since clear_error(); empty: none.
const std::string& error();
void clear_error();
void set_error(const std::string& message);

struct Block;

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
  int batch;
  bool landed;
};

struct Thread {
  Block* block;
  int index;                // in its block
  uint32_t passed[4] = {};  // barriers, of each scope
  uint32_t asked = 0;       // calls of any_of_block
  bool arrived = false;     // at a cluster's barrier that it will wait for
  Fiber fiber;
  const char* waits = nullptr;  // for what
  Where where;
  uint64_t priority = 0, value = 0;
  int thread_bits = 0;
  std::vector<Copy> copies;
  int batch = 0;  // batches of copies committed
};

struct Barrier {
  size_t members = 0, exited = 0;
  std::vector<Thread*> waiting;
};

struct Cluster {
  Barrier barrier;
  std::vector<Block*> blocks;
  int64_t alive = 0;
};

struct Block {
  int64_t number;
  int rank;  // in its cluster
  Cluster* cluster;
  std::vector<Thread> threads;
  std::vector<Barrier> warps;
  Barrier barrier;
  size_t alive;
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, std::free};
  bool started = false;
  bool any[3] = {};                    // answers of any_of_block, in turn
  uint32_t accessed_by_others_at = 0;  // 1 + their cluster barriers before
};

// The thread that runs; null: the host.
extern Thread* running;
[[noreturn]] void fail(const std::string& message, Where where);
std::string name(const Thread& thread);

// Memory that kernels may touch. Tensors are read only or written only.
enum class Kind { kInput, kOutput, kConstant, kState, kScratch, kShared };
void add_region(void* begin, size_t bytes, Kind kind, std::string name, Block* owner = nullptr);
void remove_region(void* begin);
bool fully_written(void* begin);  // of an output; true where kernels are not instrumented
void forget_accesses();           // a launch has ended: what follows is ordered after it
void block_exits(Block& block);
void copy_issued(const Copy& copy);
void copy_arrived(const Copy& copy);

}  // namespace bnext::emulation
