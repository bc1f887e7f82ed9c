// The k highest of n scores, exactly, for many arrays at once: topology.select, in the same order and with the same ties.
//
// The k-th key is found digit by digit: a pass counts the keys that begin with the digits found so far, by their next
// digit, in shared memory; then one block for each leaf picks the digit. f32 takes three passes (11, 11 and 10 bits), 16
// bits take two. A last pass writes the mask. Where more scores are tied than are taken, each block first counts its own.
// All counts are integers, so the result does not depend on the order in which blocks run.
#include <algorithm>

#include "device.h"
#include "kernels.h"

namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32, kBins = 2048, kPerThread = kBins / kThreads;
constexpr int64_t kChunk = 4096;  // scores of a block, at least
static_assert(kPerLeaf == kBins + 4 + 1);

struct Leaves {
  Leaf leaf[kLeaves];
  int32_t count, blocks;
  int64_t chunk;
};

// What is known of the k-th key of a leaf.
struct Found {
  uint32_t prefix;  // its digits so far; in the end the key
  uint32_t need;    // how many of the keys that begin so are taken
  uint32_t ties;    // how many there are
  uint32_t open;    // 0: nothing is taken
};

// Memory of a search: the bins of each leaf, what is found of each, the ties in each block.
struct Work {
  Span<uint32_t> words;
  int32_t leaves;

  __device__ uint32_t& bin(int leaf, int i) const { return words[static_cast<int64_t>(leaf) * kBins + i]; }
  __device__ uint32_t& ties(int block) const { return words[static_cast<int64_t>(leaves) * (kBins + 4) + block]; }
  __device__ int64_t place(int leaf) const { return static_cast<int64_t>(leaves) * kBins + 4 * leaf; }
  __device__ Found found(int leaf) const {
    const int64_t i = place(leaf);
    return {words[i], words[i + 1], words[i + 2], words[i + 3]};
  }
  __device__ void set(int leaf, Found f) const {
    const int64_t i = place(leaf);
    words[i] = f.prefix, words[i + 1] = f.need, words[i + 2] = f.ties, words[i + 3] = f.open;
  }
};

// Keys in the order of the scores: NaN 1, -inf above it, ..., -0 and 0 alike, ..., inf. 0 is left for no candidate.
template <typename U>
__device__ uint32_t key_of(U bits, uint32_t infinity) {
  constexpr uint32_t sign = 1u << (8 * sizeof(U) - 1);
  const uint32_t magnitude = bits & (sign - 1);
  if (magnitude > infinity) return 1;
  if (magnitude == 0) return sign;
  return bits & sign ? sign - 1 - magnitude : sign + magnitude;
}

// The part of a leaf that a block works on.
template <typename U>
struct Part {
  Span<const U> scores;
  Span<const uint8_t> among;
  Span<uint8_t> taken;
  int leaf, first;
  int64_t begin, end;

  __device__ Part(const Leaves& leaves, int block) {
    leaf = 0;
    for (int step = kLeaves / 2; step > 0; step /= 2)
      if (leaf + step < leaves.count && leaves.leaf[leaf + step].first <= block) leaf += step;
    const Leaf& own = leaves.leaf[leaf];
    scores = {static_cast<const U*>(own.scores), own.n};
    among = {own.among, own.among ? own.n : 0};
    taken = {own.taken, own.n};
    first = own.first;
    begin = (block - first) * leaves.chunk;
    end = begin + leaves.chunk < own.n ? begin + leaves.chunk : own.n;
  }

  __device__ uint32_t key(int64_t i, uint32_t infinity) const {
    return among.size && !among[i] ? 0 : key_of<U>(scores[i], infinity);
  }
};

// Counts the keys that begin with the digits that are known, by their digit of `width` bits above `shift`.
template <typename U>
__global__ void __launch_bounds__(kThreads)
    count_digits(const __grid_constant__ Leaves leaves, Work work, uint32_t infinity, int shift, int width) {
  __shared__ Fixed<uint32_t, kBins> bins;
  const Part<U> part(leaves, blockIdx.x);
  const Found found = work.found(part.leaf);
  const int above = shift + width;
  const bool first = above == 8 * sizeof(U);
  if (!first && !found.open) return;
  for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
  __syncthreads();
#pragma unroll 4
  for (int64_t i = part.begin + threadIdx.x; i < part.end; i += kThreads) {
    const uint32_t key = part.key(i, infinity);
    if (key != 0 && (first || key >> above == found.prefix)) atomicAdd(&bins[key >> shift & ((1 << width) - 1)], 1u);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 1 << width; i += kThreads)
    if (bins[i]) atomicAdd(&work.bin(part.leaf, i), bins[i]);
}

// One block for each leaf: the digit of the k-th key, from the counts, which are set to 0 again.
__global__ void __launch_bounds__(kThreads) pick_digit(Work work, Span<const int32_t> k, int width, bool first) {
  __shared__ Fixed<uint32_t, kThreads> sums;
  const int leaf = blockIdx.x, thread = threadIdx.x;
  const Found found = work.found(leaf);
  if (!first && !found.open) return;
  // This thread's bins, the highest first: those of thread 0 are the highest of all.
  uint32_t counts[kPerThread], sum = 0;
  for (int j = 0; j < kPerThread; j++) {
    uint32_t& bin = work.bin(leaf, kBins - 1 - (thread * kPerThread + j));
    counts[j] = bin, bin = 0;
    sum += counts[j];
  }
  sums[thread] = sum;
  __syncthreads();
  for (int step = 1; step < kThreads; step *= 2) {  // to the sum of this thread's and all higher bins
    const uint32_t before = thread >= step ? sums[thread - step] : 0;
    __syncthreads();
    sums[thread] += before;
    __syncthreads();
  }
  const uint32_t total = sums[kThreads - 1];
  const uint32_t asked = k[leaf] > 0 ? static_cast<uint32_t>(k[leaf]) : 0;
  const uint32_t need = !first ? found.need : asked < total ? asked : total;
  if (need == 0 && thread == 0) work.set(leaf, {0, 0, 0, 0});
  uint32_t higher = sums[thread] - sum;
  if (need == 0 || !(higher < need && need <= sums[thread])) return;
  for (int j = 0; j < kPerThread; higher += counts[j], j++)
    if (need <= higher + counts[j]) {
      const uint32_t digit = kBins - 1 - (thread * kPerThread + j);
      work.set(leaf, {(first ? 0 : found.prefix) << width | digit, need - higher, counts[j], 1});
      return;
    }
}

// How many scores of each block are tied with the k-th, where not all of these are taken.
template <typename U>
__global__ void __launch_bounds__(kThreads)
    count_ties(const __grid_constant__ Leaves leaves, Work work, uint32_t infinity) {
  __shared__ Fixed<uint32_t, 1> total;
  const Part<U> part(leaves, blockIdx.x);
  const Found found = work.found(part.leaf);
  if (!found.open || found.ties == found.need) return;
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  uint32_t own = 0;
  for (int64_t i = part.begin + threadIdx.x; i < part.end; i += kThreads) own += part.key(i, infinity) == found.prefix;
  atomicAdd(&total[0], own);
  __syncthreads();
  if (threadIdx.x == 0) work.ties(blockIdx.x) = total[0];
}

template <typename U>
__global__ void __launch_bounds__(kThreads)
    write_taken(const __grid_constant__ Leaves leaves, Work work, uint32_t infinity) {
  __shared__ Fixed<uint32_t, 1> total;
  __shared__ Fixed<uint32_t, kWarps> in_warp;
  const Part<U> part(leaves, blockIdx.x);
  const Found found = work.found(part.leaf);
  if (!found.open || found.ties == found.need) {
#pragma unroll 4
    for (int64_t i = part.begin + threadIdx.x; i < part.end; i += kThreads)
      part.taken[i] = found.open && part.key(i, infinity) >= found.prefix;
    return;
  }
  // The number of ties before this block, then before each score of it, in the order of indices.
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  uint32_t own = 0;
  for (int block = part.first + threadIdx.x; block < static_cast<int>(blockIdx.x); block += kThreads)
    own += work.ties(block);
  atomicAdd(&total[0], own);
  __syncthreads();
  uint32_t before = total[0];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t start = part.begin; start < part.end; start += kThreads) {
    const int64_t i = start + threadIdx.x;
    const uint32_t key = i < part.end ? part.key(i, infinity) : 0;
    const bool tied = key == found.prefix;
    const unsigned here = __ballot_sync(kAll, tied);
    if (lane == 0) in_warp[warp] = __popc(here);
    __syncthreads();
    uint32_t rank = before + __popc(here & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; w++) {
      if (w < warp) rank += in_warp[w];
      before += in_warp[w];
    }
    if (i < part.end) part.taken[i] = key > found.prefix || (tied && rank < found.need);
    __syncthreads();
  }
}

template <typename U>
void search(cudaStream_t stream, const Leaves& leaves, Work work, Span<const int32_t> k, uint32_t infinity) {
  for (int top = 8 * sizeof(U); top > 0;) {
    const int width = std::min(top, 11), shift = top - width;
    launch(count_digits<U>, dim3(leaves.blocks), kThreads, 0, stream, leaves, work, infinity, shift, width);
    launch(pick_digit, dim3(leaves.count), kThreads, 0, stream, work, k, width, top == 8 * sizeof(U));
    top = shift;
  }
  launch(count_ties<U>, dim3(leaves.blocks), kThreads, 0, stream, leaves, work, infinity);
  launch(write_taken<U>, dim3(leaves.blocks), kThreads, 0, stream, leaves, work, infinity);
}

}  // namespace

cudaError_t select(cudaStream_t stream, Scores type, std::vector<Leaf> given, const int32_t* k, uint32_t* words) {
  Leaves leaves = {};
  int64_t total = 0;
  for (const Leaf& leaf : given) total += leaf.n;
  leaves.chunk = std::max(kChunk, ((total + kBlocks - 1) / kBlocks + kThreads - 1) / kThreads * kThreads);
  for (const Leaf& leaf : given) {
    Leaf& own = leaves.leaf[leaves.count++] = leaf;
    own.first = leaves.blocks;
    leaves.blocks += static_cast<int32_t>((leaf.n + leaves.chunk - 1) / leaves.chunk);
  }
  const Work work = {{words, static_cast<int64_t>(leaves.count) * kPerLeaf + kBlocks}, leaves.count};
  const cudaError_t error = cudaMemsetAsync(words, 0, work.words.size * sizeof(uint32_t), stream);
  if (error != cudaSuccess) return error;
  const Span<const int32_t> counts = {k, leaves.count};
  if (type == Scores::F32)
    search<uint32_t>(stream, leaves, work, counts, 0x7f800000u);
  else
    search<uint16_t>(stream, leaves, work, counts, type == Scores::BF16 ? 0x7f80u : 0x7c00u);
  return cudaGetLastError();
}
