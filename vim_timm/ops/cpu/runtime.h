/* Threads and scratch memory shared by every build of kernel.c. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { ALIGNMENT = 64 };

typedef void (*Task)(const void *arguments, int64_t index, void *scratch);

/* Runs task(arguments, i, scratch) for every i < count on at most `threads` threads, with flush-to-zero on, each thread
   with its own aligned `scratch` bytes. Returns 0, or -1 when the scratch memory cannot be had (nothing has run then). */
int vim_timm_run(Task task, const void *arguments, int64_t count, int64_t threads, size_t scratch);

void *vim_timm_allocate(size_t bytes);
void vim_timm_free(void *memory);

/* The same for a workspace that the next call may have again, as it is: its contents are anything. */
void *vim_timm_borrow(size_t bytes);
void vim_timm_give_back(void *borrowed);
