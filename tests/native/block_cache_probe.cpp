// Threads that take and give back blocks of one cache all the time, while the process forks. Ends with 0 if
// no two of them ever had the same block, no block was lost, and every child could take one.
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "../../csrc/bindings/block_cache.h"

namespace {

constexpr int kThreads = 4, kRounds = 10000, kForks = 100;
constexpr size_t kPage = 4096;

fastlm::BlockCache cache;
std::atomic<int> wrong{0}, running{kThreads};

void work(int self) {
  for (int i = 0; i < kRounds; ++i) {
    void* const taken = cache.take(kPage * static_cast<size_t>(1 + i % 3));
    std::atomic<int>& owner = *static_cast<std::atomic<int>*>(taken);
    owner = self;
    wrong += !cache.owns(taken);
    wrong += owner != self || cache.statistics().used == 0;
    cache.give_back(taken);
    if (i % 500 == self) cache.trim();
    if (i % 700 == self) cache.set_limit(kPage * static_cast<size_t>(i % 11));
  }
  --running;
}

// A child has only the thread that forked: a mutex that another one held would stay locked for good.
bool child_takes_a_block() {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // ends a child that waits
    void* const taken = cache.take(kPage);
    cache.give_back(taken);
    _exit(0);
  }
  int status = -1;
  return waitpid(child, &status, 0) == child && status == 0;
}

}  // namespace

int main() {
  pthread_atfork([] { cache.before_fork(); }, [] { cache.after_fork(false); },
                 [] { cache.after_fork(true); });
  cache.set_limit(kPage * 8);
  std::vector<std::thread> threads;
  for (int self = 0; self < kThreads; ++self) threads.emplace_back(work, self);
  for (int i = 0; i < kForks && running > 0; ++i) {
    if (!child_takes_a_block()) _exit(2);
  }
  for (std::thread& thread : threads) thread.join();
  return wrong > 0 || cache.statistics().used > 0;
}
