/* The part of the kernel that is compiled once: which instruction sets this machine runs, and a team of threads.

   No OpenMP is linked, so that a process never holds a second runtime: Python hands over `GOMP_parallel` of the one torch
   has loaded (LLVM's and Intel's runtimes export it too). Without it, plain threads are started for each call. */
#include "runtime.h"

#include <pthread.h>
#include <stdlib.h>

#if defined(_WIN32)
#include <malloc.h>
#endif

typedef void (*Team)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

static Team team;

EXPORT void vim_timm_set_team(void *gomp_parallel) { __atomic_store_n(&team, (Team)gomp_parallel, __ATOMIC_RELEASE); }

/* Names of the builds that this processor and operating system can run, best first, separated by blanks. */
EXPORT const char *vim_timm_instruction_sets(void) {
#if defined(HAVE_AVX512) && defined(HAVE_AVX2)
    __builtin_cpu_init();
    /* These tests read the control register too, so that a system which does not save the wide registers answers no. */
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return "avx512 avx2 baseline";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2 baseline";
#endif
#if defined(HAVE_NEON)
    return "neon";
#else
    return "baseline";
#endif
}

/* Whether the processor is Intel's. */
EXPORT int vim_timm_is_intel(void) {
#if defined(HAVE_AVX512) && defined(HAVE_AVX2)
    __builtin_cpu_init();
    return __builtin_cpu_is("intel") != 0;
#else
    return 0;
#endif
}

void *vim_timm_allocate(size_t bytes) {
    size_t size = (bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT;
#if defined(_WIN32)
    return _aligned_malloc(size, ALIGNMENT);
#else
    void *memory = NULL;
    return posix_memalign(&memory, ALIGNMENT, size) ? NULL : memory;
#endif
}

void vim_timm_free(void *memory) {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    free(memory);
#endif
}

/* Bytes of a workspace that is kept for the next call; a larger one is given back to the system. */
#ifndef KEPT_BYTES
#define KEPT_BYTES (16 << 20)
#endif

/* Memory allocated and freed in every block of a network would leave a hole between what the blocks keep, each of which
   the next block's tensors break up. The size stands in front of the memory. */
static char *workspace;

void *vim_timm_borrow(size_t bytes) {
    char *kept = __atomic_exchange_n(&workspace, NULL, __ATOMIC_ACQ_REL);
    if (kept && *(size_t *)(void *)kept >= bytes) return kept + ALIGNMENT;
    if (kept) vim_timm_free(kept);
    char *memory = vim_timm_allocate(ALIGNMENT + bytes);
    if (!memory) return NULL;
    *(size_t *)(void *)memory = bytes;
    return memory + ALIGNMENT;
}

void vim_timm_give_back(void *borrowed) {
    char *memory = (char *)borrowed - ALIGNMENT;
    if (*(size_t *)(void *)memory <= KEPT_BYTES) memory = __atomic_exchange_n(&workspace, memory, __ATOMIC_ACQ_REL);
    if (memory) vim_timm_free(memory);
}

/* States that decay into subnormal numbers cost a hundred times a normal step: flush them, and give the mode back after. */
#if defined(__x86_64__)
static unsigned flush_subnormals(void) {
    unsigned mode = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(mode | 0x8040);
    return mode;
}
static void restore(unsigned mode) { __builtin_ia32_ldmxcsr(mode); }
#elif defined(__aarch64__)
static unsigned flush_subnormals(void) {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    __asm__ volatile("msr fpcr, %0" : : "r"(mode | (1u << 24)));
    return (unsigned)mode;
}
static void restore(unsigned mode) { __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)mode)); }
#else
static unsigned flush_subnormals(void) { return 0; }
static void restore(unsigned mode) { (void)mode; }
#endif

typedef struct {
    Task task;
    const void *arguments;
    int64_t count, next_task, next_slot;
    char *scratch;
    size_t scratch_bytes;
} Work;

static void work_through(void *data) {
    Work *work = data;
    unsigned mode = flush_subnormals();
    char *scratch = work->scratch + __atomic_fetch_add(&work->next_slot, 1, __ATOMIC_RELAXED) * (int64_t)work->scratch_bytes;
    int64_t i;
    while ((i = __atomic_fetch_add(&work->next_task, 1, __ATOMIC_RELAXED)) < work->count)
        work->task(work->arguments, i, scratch);
    restore(mode);
}

static void *thread_body(void *data) {
    work_through(data);
    return NULL;
}

enum { MAX_OWN_THREADS = 64 };

static void run_on_own_threads(Work *work, int64_t threads) {
    pthread_t handles[MAX_OWN_THREADS];
    int64_t started = 0;
    /* A thread that cannot be started is not missed: this one takes its tasks. */
    while (started + 1 < threads && started < MAX_OWN_THREADS && !pthread_create(handles + started, NULL, thread_body, work))
        started++;
    work_through(work);
    while (started > 0) pthread_join(handles[--started], NULL);
}

int vim_timm_run(Task task, const void *arguments, int64_t count, int64_t threads, size_t scratch) {
    if (threads > count) threads = count;
    if (threads < 1) threads = 1;
    scratch = (scratch + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    Work work = {task, arguments, count, 0, 0, vim_timm_allocate(scratch * (size_t)threads), scratch};
    if (!work.scratch) return -1;
    Team parallel = __atomic_load_n(&team, __ATOMIC_ACQUIRE);
    if (threads == 1)
        work_through(&work);
    else if (parallel)
        parallel(work_through, &work, (unsigned)threads, 0);
    else
        run_on_own_threads(&work, threads);
    vim_timm_free(work.scratch);
    return 0;
}
