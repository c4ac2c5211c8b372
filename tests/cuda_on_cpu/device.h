// CUDA C++ as plain C++: blocks one after the other, the threads of a block as fibers that take turns where they meet.
//
// It stands in place of the compiler's built-ins and of ops/cuda/ptx.cuh. Numbers are exact where the GPU's are approximate.
// Copies arrive only when they are waited for, and their targets hold NaN until then, so that a missing wait shows.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct Index {
  unsigned x, y, z;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned v;
  std::memcpy(&v, &f, 4);
  return v;
}

struct Copy {
  void* to;
  unsigned char bytes[16];
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  std::vector<std::vector<Copy>> copies;  // groups; the last one is open
  const void* offered;                    // to the other lanes of its warp
};

// Where `size` threads meet.
struct Barrier {
  int waiting = 0, generation = 0;
};

inline Index threadIdx, blockIdx, blockDim, gridDim;
inline std::vector<Thread> threads;
inline std::vector<Barrier> warp_barriers;
inline Barrier block_barrier, named_barriers[16];
inline ucontext_t scheduler;

inline Thread& self() { return threads[threadIdx.x]; }
inline int lane() { return threadIdx.x % 32; }

inline void yield() {
  const unsigned mine = threadIdx.x;
  swapcontext(&threads[mine].context, &scheduler);
  threadIdx = {mine, 0, 0};
}

inline void arrive(Barrier& barrier, int size) {
  const int generation = barrier.generation;
  if (++barrier.waiting == size) {
    barrier.waiting = 0;
    barrier.generation++;
  }
  while (barrier.generation == generation) yield();
}

inline void __syncwarp() { arrive(warp_barriers[threadIdx.x / 32], 32); }
template <int BARRIER>
void meet(int size) {
  arrive(named_barriers[BARRIER], size);
}
inline int anew(int x) { return x; }
inline void wait_for_last_kernel() {}
inline void let_next_kernel_start() {}
inline void block_sync() { arrive(block_barrier, blockDim.x); }
#define DYNAMIC_SHARED(TYPE, name) static TYPE name

// f(of), where of(i) is what lane i of the warp offers.
template <class X, class F>
auto together(const X& mine, F f) {
  const unsigned warp = threadIdx.x / 32 * 32;
  self().offered = &mine;
  __syncwarp();
  auto result = f([warp](int i) -> const X& { return *(const X*)threads[warp + i].offered; });
  __syncwarp();
  return result;
}

inline float __shfl_xor_sync(unsigned, float v, int mask) {
  const int other = lane() ^ mask;
  return together(v, [other](auto of) { return of(other); });
}

typedef unsigned short T;
typedef unsigned int T2;

inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }
inline float exp2_fast(float x) { return flushed(std::exp2(flushed(x))); }
inline float reciprocal(float x) { return flushed(1.f / flushed(x)); }

inline float from_bf16(T v) { return __uint_as_float((unsigned)v << 16); }
inline T to_bf16(float f) {
  const unsigned v = __float_as_uint(f);
  return f != f ? 0x7fff : (T)((v + 0x7fff + (v >> 16 & 1)) >> 16);
}
inline float from_half(T v) {
  const int exponent = v >> 10 & 31, fraction = v & 1023;
  float f = exponent == 31 ? (fraction ? NAN : INFINITY)
                           : std::ldexp((float)(fraction + (exponent ? 1024 : 0)), std::max(exponent, 1) - 25);
  return v >> 15 ? -f : f;
}
inline T to_half(float f) {
  const T sign = __float_as_uint(f) >> 16 & 0x8000;
  f = std::fabs(f);
  if (f != f) return sign | 0x7e00;
  if (f >= 65520.f) return sign | 0x7c00;
  if (f == 0.f) return sign;
  const int exponent = std::max(std::ilogb(f), -14);
  const int steps = (int)std::nearbyint(std::ldexp(f, 10 - exponent));  // a carry runs into the exponent as it should
  return sign | (T)(((exponent + 14) << 10) + steps);
}
inline float from_two_bytes(T v) { return HALF ? from_half(v) : from_bf16(v); }
inline T to_two_bytes(float f) { return HALF ? to_half(f) : to_bf16(f); }

inline float2 unpack(T2 v) { return {from_two_bytes(v & 0xffff), from_two_bytes(v >> 16)}; }
inline T2 pack(float low, float high) { return to_two_bytes(low) | (T2)to_two_bytes(high) << 16; }
inline T2 pack_bf16(float low, float high) { return to_bf16(low) | (T2)to_bf16(high) << 16; }

inline void check_aligned(const void* p, int bytes) {
  if ((uintptr_t)p % bytes) std::abort();
}

inline void copy16(void* shared, const void* global, bool valid) {
  Copy copy = {shared, {}};
  check_aligned(shared, 16);
  if (valid) {
    check_aligned(global, 16);
    std::memcpy(copy.bytes, global, 16);
  }
  std::memset(shared, 0xff, 16);
  self().copies.back().push_back(copy);
}

inline void store16(void* global, uint4 v, bool valid) {
  if (!valid) return;
  check_aligned(global, 16);
  std::memcpy(global, &v, 16);
}

inline void copies_commit() { self().copies.emplace_back(); }

template <int PENDING>
void copies_wait() {
  auto& groups = self().copies;
  while ((int)groups.size() - 1 > PENDING) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
    groups.erase(groups.begin());
  }
  __syncwarp();
}

inline void load_matrices(unsigned (&r)[4], const void* row) {
  check_aligned(row, 16);
  const int l = lane();
  together(row, [&](auto of) {
    for (int i = 0; i < 4; i++) std::memcpy(&r[i], (const char*)of(8 * i + l / 4) + l % 4 * 4, 4);
    return 0;
  });
}

inline void load_transposed(unsigned (&r)[4], const void* row) {
  check_aligned(row, 16);
  const int l = lane();
  together(row, [&](auto of) {
    for (int i = 0; i < 4; i++) {
      const auto at = [&](int k) { return (unsigned)((const T*)of(8 * i + k))[l / 4]; };
      r[i] = at(l % 4 * 2) | at(l % 4 * 2 + 1) << 16;
    }
    return 0;
  });
}

struct Fragments {
  unsigned a[4], b[2];
};

// Row r and column c of a (16 x 16) * b (16 x 8) from the lanes' fragments.
template <class Of, class Widen>
float product(Of of, Widen widen, int r, int c) {
  float sum = 0.f;
  for (int k = 0; k < 16; k++) {
    const unsigned a = of(r % 8 * 4 + k % 8 / 2).a[r / 8 + k / 8 * 2], b = of(c * 4 + k % 8 / 2).b[k / 8];
    sum += widen((T)(a >> k % 2 * 16)) * widen((T)(b >> k % 2 * 16));
  }
  return sum;
}

inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const int l = lane();
  together(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [&](auto of) {
    for (int i = 0; i < 4; i++) c[i] += product(of, from_two_bytes, l / 4 + i / 2 * 8, l % 4 * 2 + i % 2);
    return 0;
  });
}

inline void multiply_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const int l = lane();
  together(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [&](auto of) {
    for (int i = 0; i < 4; i++) c[i] += product(of, from_bf16, l / 4 + i / 2 * 8, l % 4 * 2 + i % 2);
    return 0;
  });
}

// Runs fibers in turn until all have returned; false where none of them can go on.
template <class Body>
bool run_block(const Body& body) {
  static const Body* current;
  current = &body;
  const auto entry = +[] {
    (*current)();
    self().done = true;
    while (true) yield();
  };
  warp_barriers.assign(threads.size() / 32, {});
  block_barrier = {};
  for (Barrier& barrier : named_barriers) barrier = {};
  for (Thread& thread : threads) {
    thread.done = false;
    thread.copies.assign(1, {});
    thread.stack.resize(1 << 16);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.context, entry, 0);
  }
  for (long turns = 0; turns < 10000000; turns++) {
    bool all_done = true;
    for (unsigned i = 0; i < threads.size(); i++) {
      if (threads[i].done) continue;
      all_done = false;
      threadIdx = {i, 0, 0};
      swapcontext(&scheduler, &threads[i].context);
    }
    if (all_done) return true;
  }
  return false;
}

// A kernel over a grid; arguments by their addresses, as cuLaunchKernel takes them.
template <class... A, std::size_t... I>
int launch(void (*kernel)(A...), const int* grid, int count, void** arguments, std::index_sequence<I...>) {
  blockDim = {(unsigned)count, 1, 1};
  gridDim = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
  threads.resize(count);
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
        if (!run_block([&] { kernel(*(A*)arguments[I]...); })) return 1;
  return 0;
}

#define EXPORT(kernel)                                                                            \
  template <class... A>                                                                           \
  int launch_##kernel(void (*k)(A...), const int* grid, int count, void** arguments) {            \
    return launch(k, grid, count, arguments, std::index_sequence_for<A...>{});                    \
  }                                                                                               \
  extern "C" int run_##kernel(const int* grid, int count, void** arguments) {                     \
    return launch_##kernel(kernel, grid, count, arguments);                                       \
  }
