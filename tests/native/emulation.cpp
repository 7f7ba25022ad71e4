// Fibers, barriers, asynchronous copies and launches. Never compiled with -fsanitize=thread.
#include <algorithm>
#include <cstdlib>
#include <random>
#include <set>

#include "../../csrc/cuda/plan.h"
#include "machine.h"

Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace bnext::emulation {

int defect = -1;
Limits limits;
Statistics statistics;
std::set<uintptr_t> launched;
Thread* running = nullptr;

namespace {

constexpr int kWarp = 32;
const char* const kScopeNames[] = {"a shuffle", "a block's barrier", "a cluster's barrier",
                                   "the grid's barrier"};

std::mt19937_64 random_numbers;
std::string first_error;
Fiber host;
// Of the launch that runs.
const Kernel* kernel;
LaunchShape shape;
Barrier grid_barrier;
std::vector<Thread*> ready;  // a heap by priority
std::vector<std::unique_ptr<Block>> blocks;
std::vector<std::unique_ptr<Cluster>> clusters;
uint64_t order;  // which of three ways of drawing an order

void record(const std::string& message) {
  if (first_error.empty()) first_error = message;
}

void make_ready(Thread& t) {
  // Any thread next; or one block before the others; or some threads always before others.
  if (order == 0) t.priority = random_numbers();
  if (order == 1) t.priority = (t.priority >> 32 << 32) | (random_numbers() >> 32);
  t.waits = nullptr;
  ready.push_back(&t);
  std::push_heap(ready.begin(), ready.end(),
                 [](const Thread* a, const Thread* b) { return a->priority < b->priority; });
}

void switch_to_scheduler() {
  switch_fiber(running->fiber, host);
}

void exit_thread(Thread& t) {
  if (t.arrived) fail("exits before it waited for the cluster's barrier it arrived at", t.where);
  if (!t.copies.empty()) fail("exits before its asynchronous copies were waited for", t.where);
  Block& b = *t.block;
  Barrier* const barriers[] = {&b.warps[t.index / kWarp], &b.barrier, &b.cluster->barrier,
                               &grid_barrier};
  for (Barrier* barrier : barriers) {
    ++barrier->exited;
    if (!barrier->waiting.empty()) {
      const Thread& other = *barrier->waiting.front();
      fail("exits while " + name(other) + " waits in " + other.waits, other.where);
    }
  }
  if (--b.alive == 0) {
    block_exits(b);
    std::memset(b.shared.get(), 0xff, static_cast<size_t>(shape.shared_bytes));
    --b.cluster->alive;
  }
}

void run_thread() {
  kernel->run(kernel->function, kernel->args);
  exit_thread(*running);
  switch_to_scheduler();
  std::abort();  // never resumed
}

void start_cluster(int64_t number) {
  Cluster& cluster = *clusters.emplace_back(std::make_unique<Cluster>());
  const size_t threads = static_cast<size_t>(shape.threads);
  cluster.alive = shape.cluster_blocks;
  cluster.barrier.members = threads * static_cast<size_t>(shape.cluster_blocks);
  for (int rank = 0; rank < shape.cluster_blocks; ++rank) {
    Block& b = *blocks.emplace_back(std::make_unique<Block>());
    b.number = number * shape.cluster_blocks + rank;
    b.rank = rank;
    b.cluster = &cluster;
    b.alive = b.barrier.members = threads;
    b.warps.resize(threads / kWarp);
    for (Barrier& warp : b.warps) warp.members = kWarp;
    void* shared = nullptr;
    const size_t bytes = static_cast<size_t>(shape.shared_bytes);
    if (posix_memalign(&shared, 16, std::max<size_t>(bytes, 1)) != 0) std::abort();
    b.shared.reset(static_cast<unsigned char*>(shared));
    add_region(shared, bytes, Kind::kShared, "shared memory of block " + std::to_string(b.number),
               &b);
    cluster.blocks.push_back(&b);
    const uint64_t block_priority = random_numbers();
    b.threads.resize(threads);
    for (size_t i = 0; i < threads; ++i) {
      Thread& t = b.threads[i];
      t.block = &b;
      t.index = static_cast<int>(i);
      t.priority = order == 1 ? block_priority : random_numbers();
      start(t.fiber, run_thread);
      make_ready(t);
    }
  }
}

void end_cluster(Cluster& cluster) {
  for (Block* b : cluster.blocks) {
    remove_region(b->shared.get());
    b->shared.reset();
    for (Thread& t : b->threads) release(t.fiber);
    b->threads.clear();
  }
}

void land(Copy& copy) {
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  copy.landed = true;
}

void land_some(Thread& t) {
  for (Copy& copy : t.copies)
    if (!copy.landed && random_numbers() % 4 == 0) land(copy);
}

void resume(Thread& t) {
  Block& b = *t.block;
  if (!b.started) std::memset(b.shared.get(), 0xff, static_cast<size_t>(shape.shared_bytes));
  b.started = true;
  land_some(t);
  ++statistics.switches;
  threadIdx.x = static_cast<unsigned>(t.index);
  blockIdx.x = static_cast<unsigned>(b.number);
  running = &t;
  switch_fiber(host, t.fiber);
  running = nullptr;
}

void report_deadlock() {
  std::string text = "deadlock:";
  for (const auto& b : blocks)
    for (const Thread& t : b->threads)
      if (t.waits != nullptr && text.size() < 500)
        if (t.index == 0 || t.waits != b->threads[static_cast<size_t>(t.index) - 1].waits)
          text += " " + name(t) + " waits in " + t.waits + " (line " +
                  std::to_string(t.where.line()) + ");";
  record(text);
}

void run_grid() {
  std::vector<int64_t> numbers(static_cast<size_t>(shape.blocks / shape.cluster_blocks));
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<int64_t>(i);
  std::shuffle(numbers.begin(), numbers.end(), random_numbers);
  // Blocks that run side by side: all that a cooperative launch promises, else a few.
  const size_t together = shape.cooperative ? numbers.size() : 1 + random_numbers() % 4;
  grid_barrier = {};
  grid_barrier.members = static_cast<size_t>(shape.blocks * shape.threads);
  std::vector<Cluster*> at_work;
  while (first_error.empty()) {
    std::erase_if(at_work,
                  [](Cluster* c) { return c->alive == 0 ? (end_cluster(*c), true) : false; });
    while (!numbers.empty() && at_work.size() < together) {
      start_cluster(numbers.back());
      numbers.pop_back();
      at_work.push_back(clusters.back().get());
    }
    if (at_work.empty()) break;
    if (ready.empty()) {
      report_deadlock();
      break;
    }
    std::pop_heap(ready.begin(), ready.end(),
                  [](const Thread* a, const Thread* b) { return a->priority < b->priority; });
    Thread& next = *ready.back();
    ready.pop_back();
    resume(next);
  }
  for (Cluster* c : at_work) end_cluster(*c);  // after an error: their threads are abandoned
  ready.clear();
  clusters.clear();
  blocks.clear();
}

struct Refusal {
  cudaError_t error;
  const char* reason;
};

Refusal refusal(const LaunchShape& s) {
  const auto invalid = [](const char* reason) {
    return Refusal{cudaErrorInvalidConfiguration, reason};
  };
  if (s.threads < kWarp || s.threads > kMaxCudaThreads || s.threads % kWarp != 0)
    return invalid("threads must be a multiple of 32 within the kernels' launch bounds");
  if (s.blocks < 1 || s.blocks >= int64_t{1} << 31) return invalid("no such number of blocks");
  if (s.shared_bytes < 0 || s.shared_bytes > limits.shared_bytes_per_block)
    return invalid("more shared memory than a block can have");
  if (s.cluster_blocks < 1 || s.cluster_blocks > limits.max_cluster_blocks)
    return {cudaErrorInvalidClusterSize, "no such cluster size"};
  if (s.blocks % s.cluster_blocks != 0)
    return invalid("the cluster size does not divide the blocks");
  // Launch bounds let a block of kMaxCudaThreads have all registers of an SM.
  const int64_t per_sm = std::min(std::max<int64_t>(1, kMaxCudaThreads / s.threads),
                                  limits.shared_bytes_per_sm / (s.shared_bytes + 1024));
  if (s.cooperative && s.blocks > limits.sms * per_sm)
    return {cudaErrorCooperativeLaunchTooLarge,
            "more blocks than fit the GPU at a time in a cooperative launch"};
  return {cudaSuccess, nullptr};
}

}  // namespace

void set_seed(uint64_t seed) {
  random_numbers.seed(seed);
}
const std::string& error() {
  return first_error;
}
void set_error(const std::string& message) {
  record(message);
}
void clear_error() {
  first_error.clear();
}

std::string name(const Thread& t) {
  return "thread " + std::to_string(t.index) + " of block " + std::to_string(t.block->number);
}

void fail(const std::string& message, Where where) {
  const char* const slash = std::strrchr(where.file_name(), '/');
  const std::string file = slash != nullptr ? slash + 1 : where.file_name();
  record(name(*running) + " " + message +
         (where.line() != 0 ? " (" + file + ":" + std::to_string(where.line()) + ")" : ""));
  for (;;) switch_to_scheduler();  // which ends the launch
}

void sync(Scope scope, Where where) {
  Thread& t = *running;
  Block& b = *t.block;
  const int i = static_cast<int>(scope);
  if (scope == Scope::kGrid && !shape.cooperative)
    fail("reaches the grid's barrier in a launch that is not cooperative", where);
  // Without clusters this is no barrier at all on GPUs that have none.
  if (scope == Scope::kCluster && shape.cluster_blocks == 1) return;
  Barrier& barrier = scope == Scope::kWarp      ? b.warps[t.index / kWarp]
                     : scope == Scope::kBlock   ? b.barrier
                     : scope == Scope::kCluster ? b.cluster->barrier
                                                : grid_barrier;
  if (barrier.exited != 0)
    fail(std::string("waits in ") + kScopeNames[i] + " after others of its scope have exited",
         where);
  if (!barrier.waiting.empty()) {
    const Thread& other = *barrier.waiting.front();
    if (other.where.line() != where.line() ||
        std::strcmp(other.where.file_name(), where.file_name()) != 0)
      fail(std::string("waits in ") + kScopeNames[i] + " while " + name(other) + " waits at line " +
               std::to_string(other.where.line()) + ": divergent",
           where);
  }
  t.where = where;
  t.waits = kScopeNames[i];
  barrier.waiting.push_back(&t);
  if (barrier.waiting.size() == barrier.members) {
    ++(scope == Scope::kWarp ? statistics.shuffles : statistics.barriers);
    if (scope == Scope::kWarp) {
      uint64_t values[kWarp];
      Thread* const warp = &b.threads[static_cast<size_t>(t.index / kWarp * kWarp)];
      for (int i = 0; i < kWarp; ++i) values[i] = warp[i ^ warp[i].thread_bits].value;
      for (int i = 0; i < kWarp; ++i) warp[i].value = values[i];
    }
    for (Thread* other : barrier.waiting) {
      ++other->passed[i];
      make_ready(*other);
    }
    barrier.waiting.clear();
  }
  switch_to_scheduler();
}

bool any_of_block(bool says, Where where) {
  Block& b = *running->block;
  const uint32_t i = running->asked++;
  b.any[(i + 1) % 3] = false;  // all have read what it was
  b.any[i % 3] |= says;
  sync(Scope::kBlock, where);
  statistics.summed_again += running->index == 0 && b.any[i % 3];
  return b.any[i % 3];
}

void arrive_cluster(Where where) {
  Thread& t = *running;
  if (shape.cluster_blocks == 1) fail("arrives at a cluster's barrier without a cluster", where);
  if (t.arrived) fail("arrives at a cluster's barrier twice", where);
  t.arrived = true;
}

void wait_cluster(Where where) {
  if (!running->arrived) fail("waits for a cluster's barrier at which it has not arrived", where);
  running->arrived = false;
  sync(Scope::kCluster, where);
}

uint64_t shuffle_xor(uint64_t bits, int thread_bits, Where where) {
  if (thread_bits < 0 || thread_bits >= kWarp) fail("shuffles with no such thread", where);
  running->value = bits;
  running->thread_bits = thread_bits;
  sync(Scope::kWarp, where);
  return running->value;
}

unsigned char* shared_memory() {
  return running->block->shared.get();
}

void* in_block_of_cluster(void* shared, int rank, Where where) {
  const Block& b = *running->block;
  const ptrdiff_t offset = static_cast<unsigned char*>(shared) - b.shared.get();
  if (offset < 0 || offset >= shape.shared_bytes)
    fail("maps what is not in its shared memory to another block", where);
  if (rank < 0 || rank >= shape.cluster_blocks) fail("maps to no such block of its cluster", where);
  const Block& other = *b.cluster->blocks[static_cast<size_t>(rank)];
  if (other.alive == 0) fail("maps to a block of its cluster that has exited", where);
  return other.shared.get() + offset;
}

void expect_aligned(const void* address, size_t bytes, Where where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail("accesses " + std::to_string(bytes) + " bytes at an address not aligned to them", where);
}

void copy_async(void* shared, const void* global, int bytes, Where where) {
  Thread& t = *running;
  expect_aligned(shared, static_cast<size_t>(bytes), where);
  expect_aligned(global, static_cast<size_t>(bytes), where);
  const ptrdiff_t offset = static_cast<unsigned char*>(shared) - shared_memory();
  if (offset < 0 || offset + bytes > shape.shared_bytes)
    fail("copies to outside of its block's shared memory", where);
  ++statistics.copies;
  t.where = where;
  Copy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes,
            t.batch, false};
  copy_issued(copy);
  std::memset(shared, 0xff, static_cast<size_t>(bytes));  // until it lands
  if (random_numbers() % 4 == 0) land(copy);
  t.copies.push_back(copy);
}

void commit_copies() {
  ++running->batch;
}

void wait_for_copies(int pending) {
  Thread& t = *running;
  land_some(t);
  std::erase_if(t.copies, [&](Copy& copy) {
    if (copy.batch >= t.batch - pending) return false;
    if (!copy.landed) land(copy);
    copy_arrived(copy);
    return true;
  });
}

cudaError_t launch(const Kernel& k, const LaunchShape& s) {
  if (const auto [error, reason] = refusal(s); error != cudaSuccess) {
    record(std::string("launch refused: ") + reason);
    return error;
  }
  ++statistics.launches;
  launched.insert(reinterpret_cast<uintptr_t>(k.function));
  kernel = &k;
  shape = s;
  order = random_numbers() % 3;
  blockDim = {static_cast<unsigned>(s.threads), 1, 1};
  gridDim = {static_cast<unsigned>(s.blocks), 1, 1};
  add_region(const_cast<void*>(k.args), k.args_bytes, Kind::kConstant, "the kernel's arguments");
  run_grid();
  remove_region(const_cast<void*>(k.args));
  forget_accesses();
  return first_error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace bnext::emulation
