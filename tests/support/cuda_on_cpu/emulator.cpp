// SPDX-License-Identifier: Apache-2.0
#include <ucontext.h>

#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned char POISON = 0xa5;

struct Warp {
  // two sets, since a lane may be at the next collective while another still reads this one
  uint64_t values[2][32];
  const char* name = nullptr;
  std::vector<uint32_t> waiting;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  uint32_t collectives = 0;
  bool done = false;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<uint32_t> at_barrier;
std::deque<uint32_t> ready;
uint32_t running;
ucontext_t scheduler;
const std::function<void()>* body;
std::string failure;

void run_fiber() {
  (*body)();
  fibers[running].done = true;
  swapcontext(&fibers[running].context, &scheduler);
}

void pause() {
  const uint32_t self = running;
  swapcontext(&fibers[self].context, &scheduler);
}

// the last of `count` to arrive releases them all, and waits its turn like the others
void arrive(std::vector<uint32_t>& waiting, size_t count) {
  waiting.push_back(running);
  if (waiting.size() == count) {
    ready.insert(ready.end(), waiting.begin(), waiting.end());
    waiting.clear();
  }
  pause();
}

void fail(const std::string& message) {
  if (failure.empty()) failure = message;
  pause();
}

uint32_t next(Order order, std::mt19937_64& random) {
  const size_t last = ready.size() - 1;
  if (order == 0) std::swap(ready.front(), ready.back());
  if (order > 1) std::swap(ready[random() % (last + 1)], ready.back());
  const uint32_t chosen = ready.back();
  ready.pop_back();
  return chosen;
}

void run_block(Order order, std::mt19937_64& random) {
  warps.assign(blockDim.x / 32, Warp());
  at_barrier.clear();
  ready.clear();
  for (uint32_t t = 0; t < blockDim.x; ++t) {
    Fiber& fiber = fibers[t];
    fiber.done = false;
    fiber.collectives = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    ready.push_back(t);
  }
  while (!ready.empty() && failure.empty()) {
    running = next(order, random);
    threadIdx = {running, 0, 0};
    swapcontext(&scheduler, &fibers[running].context);
  }
  for (uint32_t t = 0; t < blockDim.x; ++t)
    if (!fibers[t].done && failure.empty())
      failure = "thread " + std::to_string(t) + " waits for threads that went another way";
}

}  // namespace

uint32_t lane() { return running % 32; }

void block_barrier() { arrive(at_barrier, blockDim.x); }

const uint64_t* collective(const char* name, uint32_t mask, uint64_t value) {
  Warp& warp = warps[running / 32];
  if (mask != ~0u) fail(std::string(name) + ": only full warps are emulated");
  if (warp.waiting.empty()) warp.name = name;
  if (warp.name != name) fail(std::string(name) + " meets " + warp.name);
  uint64_t* values = warp.values[fibers[running].collectives++ % 2];
  values[lane()] = value;
  arrive(warp.waiting, 32);
  return values;
}

std::string launch(uint32_t blocks, uint32_t threads, void* shared, size_t shared_bytes,
                   Order order, const std::function<void()>& kernel) {
  if (threads == 0 || threads % 32 != 0 || threads > 1024) return "bad number of threads";
  if (shared_bytes > SHARED_BYTES) return "too much shared memory";
  failure.clear();
  body = &kernel;
  gridDim = {blocks, 1, 1};
  blockDim = {threads, 1, 1};
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  std::mt19937_64 random(order);
  auto* bytes = static_cast<unsigned char*>(shared);
  for (uint32_t b = 0; b < blocks && failure.empty(); ++b) {
    blockIdx = {b, 0, 0};
    std::memset(bytes, POISON, SHARED_BYTES);
    run_block(order, random);
    for (size_t i = shared_bytes; i < SHARED_BYTES && failure.empty(); ++i)
      if (bytes[i] != POISON) failure = "shared memory was written at byte " + std::to_string(i);
  }
  return failure;
}

}  // namespace emulator
