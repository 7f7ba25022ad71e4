// What the instrumented kernels touch: regions of memory, the last accesses to each of their bytes,
// and the functions that gcc and clang call under -fsanitize=thread. Never compiled with it.
#include <algorithm>
#include <climits>

#include "machine.h"

extern "C" {
// The linker's names for this library's first and last byte: constants and tables of the kernels.
extern const char __ehdr_start[] __attribute__((visibility("hidden")));
extern const char _end[] __attribute__((visibility("hidden")));
}

namespace bnext::emulation {
namespace {

#ifdef BNEXT_INSTRUMENTED
constexpr bool kInstrumented = true;
#else
constexpr bool kInstrumented = false;
#endif

// An access of a thread, and how many barriers the thread had passed by then.
struct Access {
  int64_t block = -1;  // -1: none
  int thread = 0;
  uint32_t passed[4] = {};
};

// Reads by one block between two of its barriers. Against any other thread, two different readers
// stand for all.
struct Reads {
  Access first;
  int other_thread = -1;
};

enum class Use { kRead, kWrite, kCopyIssued, kCopyArrived };

enum class State : uint8_t { kFresh, kWritten, kPending };

struct Byte {
  Access write;
  std::vector<Reads> reads;  // at most one entry per block
};

struct Region {
  uintptr_t begin, end;
  Kind kind;
  std::string name;
  Block* owner;
  bool exited = false;       // the owner
  std::vector<State> state;  // empty: all written
  std::vector<Byte> bytes;   // empty: read only
};

std::vector<std::unique_ptr<Region>> regions;  // by address
Region* latest = nullptr;
uintptr_t code_address = 0;  // of the access that is checked

Region* find(uintptr_t address) {
  if (latest != nullptr && latest->begin <= address && address < latest->end) return latest;
  const auto after =
      std::upper_bound(regions.begin(), regions.end(), address,
                       [](uintptr_t a, const std::unique_ptr<Region>& r) { return a < r->begin; });
  if (after == regions.begin()) return nullptr;
  Region* const region = std::prev(after)->get();
  return address < region->end ? latest = region : nullptr;
}

int cluster_of(int64_t block) {
  return static_cast<int>(block / static_cast<int64_t>(running->block->cluster->blocks.size()));
}

bool ordered_before_running(const Access& a) {
  const Thread& t = *running;
  const auto passed = [&](Scope scope) {
    const int i = static_cast<int>(scope);
    return t.passed[i] > a.passed[i];
  };
  const int64_t block = t.block->number;
  if (a.block < 0 || passed(Scope::kGrid)) return true;
  if (a.block == block)
    return a.thread == t.index || passed(Scope::kBlock) || passed(Scope::kCluster);
  return cluster_of(a.block) == cluster_of(block) && passed(Scope::kCluster);
}

Access access_of_running() {
  Access a{running->block->number, running->index};
  std::copy(std::begin(running->passed), std::end(running->passed), a.passed);
  a.passed[static_cast<int>(Scope::kCluster)] += running->arrived;  // the next one orders it
  return a;
}

std::string at(const Region& region, uintptr_t address) {
  return "byte " + std::to_string(address - region.begin) + " of " + region.name;
}

[[noreturn]] void fail_at(std::string message) {
  if (code_address != 0) {
    char text[32];
    std::snprintf(text, sizeof text, " at +0x%zx",
                  static_cast<size_t>(code_address - reinterpret_cast<uintptr_t>(__ehdr_start)));
    message += text;
    code_address = 0;
    fail(message, Where{});
  }
  fail(message, running->where);
}

[[noreturn]] void fail_race(const Region& region, uintptr_t address, const char* verb,
                            const Access& other, const char* others_verb) {
  fail_at(std::string(verb) + at(region, address) + " that thread " + std::to_string(other.thread) +
          " of block " + std::to_string(other.block) + " " + others_verb +
          " with no barrier between");
}

void check_reads(const Region& region, uintptr_t address, const Byte& byte) {
  for (const Reads& r : byte.reads) {
    if (!ordered_before_running(r.first)) fail_race(region, address, "writes ", r.first, "read");
    Access other = r.first;
    other.thread = r.other_thread;
    if (other.thread >= 0 && !ordered_before_running(other))
      fail_race(region, address, "writes ", other, "read");
  }
}

void add_read(Byte& byte, const Access& now) {
  for (Reads& r : byte.reads) {
    if (r.first.block != now.block) continue;
    if (!std::equal(std::begin(now.passed) + 1, std::end(now.passed), r.first.passed + 1))
      r = {now, -1};
    else if (r.first.thread != now.thread)
      r.other_thread = now.thread;
    return;
  }
  byte.reads.push_back({now, -1});
}

bool on_stack_or_in_library(uintptr_t address) {
  const uintptr_t stack = reinterpret_cast<uintptr_t>(running->fiber.stack);
  return (address >= stack && address < stack + kStackBytes) ||
         (address >= reinterpret_cast<uintptr_t>(__ehdr_start) &&
          address < reinterpret_cast<uintptr_t>(_end));
}

void check_owner(const Region& region) {
  Block& owner = *region.owner;
  if (&owner == running->block) return;
  if (owner.cluster != running->block->cluster)
    fail_at("accesses " + region.name + ", which is not of its cluster");
  const uint32_t passed = running->passed[static_cast<int>(Scope::kCluster)];
  if (passed == 0)
    fail_at("accesses " + region.name + " before a barrier of the cluster tells that it runs");
  if (region.exited) fail_at("accesses " + region.name + ", which has exited");
  const uint32_t next = passed + running->arrived + 1;
  owner.accessed_by_others_at = std::max(owner.accessed_by_others_at, next);
}

void check_state(const Region& region, uintptr_t address, State& state, Use use) {
  if (state == State::kPending && use != Use::kCopyArrived)
    fail_at("accesses " + at(region, address) + " before the copy to it was waited for");
  if (state == State::kFresh && use == Use::kRead)
    fail_at("reads " + at(region, address) + ", which was never written");
  if (use != Use::kRead) state = use == Use::kCopyIssued ? State::kPending : State::kWritten;
}

void check(const void* memory, size_t size, Use use) {
  const bool write = use != Use::kRead;
  const char* const verb = write ? "writes " : "reads ";
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  Region* const region = find(address);
  if (region == nullptr) {
    if (on_stack_or_in_library(address)) return;
    fail_at(verb + std::to_string(size) + " bytes outside of every buffer");
  }
  if (address + size > region->end) fail_at(verb + ("beyond the end of " + region->name));
  if (write && (region->kind == Kind::kInput || region->kind == Kind::kConstant))
    fail_at("writes to " + region->name);
  if (region->owner != nullptr) check_owner(*region);
  if (region->kind == Kind::kInput) statistics.bytes_read += static_cast<int64_t>(size);
  if (region->kind == Kind::kOutput && write)
    statistics.bytes_written += static_cast<int64_t>(size);
  if (region->bytes.empty()) return;
  const Access now = access_of_running();
  for (uintptr_t a = address; a < address + size; ++a) {
    Byte& byte = region->bytes[a - region->begin];
    if (!ordered_before_running(byte.write)) fail_race(*region, a, verb, byte.write, "wrote");
    if (write) check_reads(*region, a, byte);
    if (!region->state.empty()) check_state(*region, a, region->state[a - region->begin], use);
    if (write) {
      byte.write = now;
      byte.reads.clear();
    } else {
      add_read(byte, now);
    }
  }
}

void check_instrumented(const void* address, size_t size, Use use, const void* code) {
  if (running == nullptr || size == 0) return;
  code_address = reinterpret_cast<uintptr_t>(code);
  check(address, size, use);
  code_address = 0;
}

}  // namespace

void add_region(void* begin, size_t bytes, Kind kind, std::string name, Block* owner) {
  if (!kInstrumented || bytes == 0) return;
  const uintptr_t b = reinterpret_cast<uintptr_t>(begin);
  auto region =
      std::make_unique<Region>(Region{b, b + bytes, kind, std::move(name), owner, false, {}, {}});
  if (kind != Kind::kInput && kind != Kind::kConstant) region->bytes.resize(bytes);
  if (kind == Kind::kOutput || kind == Kind::kScratch || kind == Kind::kShared)
    region->state.resize(bytes, State::kFresh);
  const auto after =
      std::upper_bound(regions.begin(), regions.end(), b,
                       [](uintptr_t a, const std::unique_ptr<Region>& r) { return a < r->begin; });
  regions.insert(after, std::move(region));
}

void remove_region(void* begin) {
  latest = nullptr;
  std::erase_if(regions, [&](const std::unique_ptr<Region>& r) {
    return r->begin == reinterpret_cast<uintptr_t>(begin);
  });
}

bool fully_written(void* begin) {
  const Region* const region = find(reinterpret_cast<uintptr_t>(begin));
  return region == nullptr || std::all_of(region->state.begin(), region->state.end(),
                                          [](State s) { return s == State::kWritten; });
}

void forget_accesses() {
  for (const auto& region : regions) std::fill(region->bytes.begin(), region->bytes.end(), Byte{});
}

void block_exits(Block& block) {
  if (!kInstrumented || block.shared == nullptr) return;
  if (Region* region = find(reinterpret_cast<uintptr_t>(block.shared.get()))) region->exited = true;
  if (block.accessed_by_others_at > running->passed[static_cast<int>(Scope::kCluster)])
    fail("exits with no barrier of the cluster after others accessed its shared memory",
         running->where);
}

void copy_issued(const Copy& copy) {
  if (!kInstrumented) return;
  check(copy.from, static_cast<size_t>(copy.bytes), Use::kRead);
  check(copy.to, static_cast<size_t>(copy.bytes), Use::kCopyIssued);
}

// The copy may have read and written at any moment since it was issued.
void copy_arrived(const Copy& copy) {
  if (!kInstrumented) return;
  check(copy.from, static_cast<size_t>(copy.bytes), Use::kRead);
  statistics.bytes_read -= copy.bytes;  // were counted before
  check(copy.to, static_cast<size_t>(copy.bytes), Use::kCopyArrived);
}

}  // namespace bnext::emulation

#define BNEXT_HOOK(name, size, use)                                                 \
  void __tsan_##name(void* address) {                                               \
    bnext::emulation::check_instrumented(address, size, bnext::emulation::Use::use, \
                                         __builtin_return_address(0));              \
  }
#define BNEXT_HOOKS(size)                       \
  BNEXT_HOOK(read##size, size, kRead)           \
  BNEXT_HOOK(write##size, size, kWrite)         \
  BNEXT_HOOK(unaligned_read##size, size, kRead) \
  BNEXT_HOOK(unaligned_write##size, size, kWrite)

extern "C" {
BNEXT_HOOKS(1)
BNEXT_HOOKS(2)
BNEXT_HOOKS(4)
BNEXT_HOOKS(8)
BNEXT_HOOKS(16)
void __tsan_read_range(void* address, size_t size) {
  bnext::emulation::check_instrumented(address, size, bnext::emulation::Use::kRead,
                                       __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t size) {
  bnext::emulation::check_instrumented(address, size, bnext::emulation::Use::kWrite,
                                       __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
