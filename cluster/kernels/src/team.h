// The threads that run a step together, from its beginning to its end: each calls every function below, does its share,
// and waits for the others where their results are needed.
//
// The barrier is our own: OpenMP's goes to sleep at once when a process holds more threads than cores, which it does as
// soon as another thread has called torch; a step has hundreds of barriers, microseconds apart.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

constexpr int SPINS = 20000;  // some hundred microseconds; then others may need the core

class Team {
   public:
    explicit Team(int64_t size) : size_(size) {}
    int64_t size() const { return size_; }

    void wait() {
        const int64_t phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; spin++)
            if (spin < SPINS) {
#if defined(__x86_64__)
                _mm_pause();
#endif
            } else {
                std::this_thread::yield();
            }
    }
    // The next unit of work that nobody has taken since the last wait.
    int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }

   private:
    int64_t size_;
    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<int64_t> phase_{0};
    alignas(64) std::atomic<int64_t> next_{0};
};

struct Worker {  // one thread of a team
    Team& team;
    int64_t index;

    int64_t begin(int64_t units) const { return units * index / team.size(); }
    int64_t end(int64_t units) const { return units * (index + 1) / team.size(); }
    void wait() const { team.wait(); }
};

// Runs `work(worker)` on so many threads at once.
template <class Work>
void with_team(int64_t num_threads, Work work) {
#if defined(_OPENMP)
    if (num_threads > 1) {
        Team* team = nullptr;
#pragma omp parallel num_threads(int(num_threads))
        {
            // OpenMP may give fewer threads than asked for.
#pragma omp single
            team = new Team(omp_get_num_threads());
            work(Worker{*team, omp_get_thread_num()});
        }
        delete team;
        return;
    }
#endif
    (void)num_threads;
    Team team(1);
    work(Worker{team, 0});
}
