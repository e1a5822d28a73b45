// SPDX-License-Identifier: Apache-2.0
#include "cpu/thread_pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

namespace mosaic::cpu {
namespace {

// Chunks that follow each other. Their thread takes them from the front, in order, so that what it asked of
// memory ahead of one chunk is for its next; who has nothing left to do takes them from the back.
struct alignas(64) Share {
  int64_t begin, size;
  std::atomic<int64_t> taken, at_front, at_back;

  void hold(int64_t from, int64_t to) {
    begin = from;
    size = to - from;
    for (auto* count : {&taken, &at_front, &at_back}) count->store(0, std::memory_order_relaxed);
  }
  // A chunk, or -1 when all are taken.
  int64_t take(bool own) {
    if (taken.load(std::memory_order_relaxed) >= size) return -1;
    if (taken.fetch_add(1, std::memory_order_relaxed) >= size) return -1;
    if (own) return begin + at_front.fetch_add(1, std::memory_order_relaxed);
    return begin + size - 1 - at_back.fetch_add(1, std::memory_order_relaxed);
  }
};

// Lives on its caller's stack. What is not atomic is guarded by the pool's mutex.
struct Job {
  static constexpr int kMostShares = 64;

  ChunkBody body;
  const void* context;
  int share_count;
  int open_places;  // helpers that may still join
  int helpers = 0;  // helpers inside
  Job* following = nullptr;
  std::atomic<int> joined{0};
  std::atomic<bool> all_taken{false};
  Share shares[kMostShares];

  Job(ChunkBody body, const void* context, int64_t chunks, int threads)
      : body(body),
        context(context),
        share_count(threads < kMostShares ? threads : kMostShares),
        open_places(threads - 1) {
    for (int s = 0; s < share_count; ++s)
      shares[s].hold(chunks * s / share_count, chunks * (s + 1) / share_count);
  }

  void work() {
    const int mine = joined.fetch_add(1, std::memory_order_relaxed) % share_count;
    for (int i = 0; i < share_count; ++i) {
      Share& share = shares[(mine + i) % share_count];
      for (int64_t c; (c = share.take(i == 0)) >= 0;) body(context, c);
    }
    all_taken = true;
  }
};

class Pool {
 public:
  void run(Job& job) {
    const int wanted = job.open_places;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < wanted && add_worker()) {
      }
      job.following = jobs_;
      jobs_ = &job;
    }
    for (int i = 0; i < wanted; ++i) work_available_.notify_one();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    for (Job** link = &jobs_; *link; link = &(*link)->following) {
      if (*link == &job) {
        *link = job.following;
        break;
      }
    }
    helper_left_.wait(lock, [&job] { return job.helpers == 0; });
  }

 private:
  bool add_worker() {
    // Workers inherit a full signal mask: a signal belongs to the threads the application made.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = true;
    try {
      std::thread([this] { serve(); }).detach();
      ++workers_;
    } catch (const std::system_error&) {
      started = false;  // out of threads: the caller does the work alone
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }

  Job* joinable() const {
    for (Job* job = jobs_; job; job = job->following) {
      if (job->open_places > 0 && !job->all_taken) return job;
    }
    return nullptr;
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Job* job = joinable();
      if (!job) {
        work_available_.wait(lock);
        continue;
      }
      --job->open_places;
      ++job->helpers;
      lock.unlock();
      job->work();
      lock.lock();
      if (--job->helpers == 0) helper_left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_available_;
  std::condition_variable helper_left_;
  Job* jobs_ = nullptr;
  int workers_ = 0;
};

// The OpenMP runtime that the process has loaded anyway, torch's; csrc links none and looks it up by name, in
// the global scope first, as the loader does for torch's own calls: a runtime that was preloaded, or loaded
// for all before torch was, is the one torch runs on (and the one beside libtorch_cpu.so is then not).
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*max_threads)();
};

const OpenMp& open_mp() {
  static const OpenMp found = {
      reinterpret_cast<decltype(OpenMp::parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
      reinterpret_cast<decltype(OpenMp::max_threads)>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"))};
  return found;
}

// A forked child has none of its parent's OpenMP threads, and that runtime would wait for them forever.
std::atomic<bool> g_forked{false};

// Never destroyed: workers may outlive static destructors. A forked child starts over with a new pool,
// because the threads are gone and the mutex may have been held at the fork. Set up when the library is
// loaded: a parent that never called a kernel may still have used OpenMP, through torch.
Pool* g_pool = [] {
  pthread_atfork(nullptr, nullptr, [] {
    g_pool = new Pool;
    g_forked = true;
  });
  return new Pool;
}();

struct Buffers {
  static constexpr int kSlots = 5;
  void* memory[kSlots] = {};
  int64_t bytes[kSlots] = {};
  ~Buffers() {
    for (void* p : memory) std::free(p);
  }
};

}  // namespace

void run_chunks(int threads, int64_t chunks, ChunkBody body, const void* context) {
  const int64_t useful = threads < chunks ? threads : chunks;
  if (useful <= 1) {
    for (int64_t c = 0; c < chunks; ++c) body(context, c);
    return;
  }
  Job job(body, context, chunks, static_cast<int>(useful));
  const OpenMp& team = open_mp();
  // Only a team of the size that torch uses: OpenMP ends and starts threads whenever the size changes.
  if (!g_forked && team.parallel && team.max_threads && team.max_threads() == threads) {
    team.parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job, threads, 0);
  } else {
    g_pool->run(job);
  }
}

void* scratch(int slot, int64_t bytes) {
  thread_local Buffers buffers;
  // A buffer of no bytes is one, too; and one huge call (a long prompt) does not keep its buffer for good.
  constexpr int64_t kKept = 16 << 20;
  const bool excessive = buffers.bytes[slot] > kKept && bytes < buffers.bytes[slot] / 4;
  if (bytes > buffers.bytes[slot] || excessive || !buffers.memory[slot]) {
    std::free(buffers.memory[slot]);
    const int64_t rounded = bytes / 4096 * 4096 + 4096;
    buffers.memory[slot] = std::aligned_alloc(64, rounded);
    buffers.bytes[slot] = buffers.memory[slot] ? rounded : 0;
  }
  return buffers.memory[slot];
}

}  // namespace mosaic::cpu
