// The C interface: make an index, search it, free it. Which kernel runs is decided by the processor.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include <sys/mman.h>

#include "scan.h"

namespace {

using namespace semid;

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kRowsTogether = 1024;  // that are multiplied with a matrix together, if there are many
constexpr int64_t kTile = 512, kLeastTile = 16;  // queries that a thread takes at a time: at most, at least

}  // namespace

struct semid::Tiles {
  int64_t count, threads;
  std::atomic<int64_t> taken{0};
};

void semid::out_of_memory() { throw std::bad_alloc(); }

// Large ones first, for queries scanned together help each other; small ones at last, so that threads end together.
bool semid::next_tile(Tiles& tiles, int64_t& first, int64_t& last) {
  first = tiles.taken.load();
  do {
    const int64_t left = tiles.count - first;
    if (left <= 0) return false;
    const int64_t share = tiles.threads > 1 ? 2 * left / (3 * tiles.threads) : left;
    last = first + std::min(left, std::min(kTile, std::max(kLeastTile, share)));
  } while (!tiles.taken.compare_exchange_weak(first, last));
  return true;
}

namespace {

int32_t best_isa() {
#ifdef SEMID_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
  return 0;
}

// The kernel asked for, or the best one that the processor has.
const Kernel& kernel(int32_t isa) {
  static const int32_t best = best_isa();
  if (isa < 0 || isa > best) isa = best;
#ifdef SEMID_X86
  if (isa == 2) return kernel_avx512;
  if (isa == 1) return kernel_avx2;
#endif
  return kernel_plain;
}

// Calls work(thread) in so many threads, one of them that of the caller. What one of them throws, this throws when all
// have ended.
template <typename Work>
void in_threads(size_t threads, Work work) {
  std::vector<std::exception_ptr> problems(threads);
  auto guarded = [&](size_t t) {
    try {
      work(t);
    } catch (...) {
      problems[t] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    for (size_t t = 1; t < threads; t++) others.emplace_back(guarded, t);
  } catch (const std::exception&) {  // the system gives no more threads, or no memory for one: those there are do it
  }
  guarded(0);
  for (std::thread& other : others) other.join();
  for (const std::exception_ptr& problem : problems)
    if (problem) std::rethrow_exception(problem);
}

// Calls work(first, last) for tiles of all numbers below `count`, on so many threads.
template <typename Work>
void in_tiles(int64_t count, int64_t tile, int32_t threads, Work work) {
  std::atomic<int64_t> next{0};
  const int64_t most = std::min<int64_t>(threads, (count + tile - 1) / tile);
  in_threads(static_cast<size_t>(std::max<int64_t>(most, 1)), [&](size_t) {
    for (int64_t first; (first = next.fetch_add(tile)) < count;) work(first, first + tile < count ? first + tile : count);
  });
}

struct Owner {
  Index index;
  std::vector<Run> runs;
  std::vector<int32_t> sizes, leaf_runs, second_columns, group_further;
  std::vector<Term> groups, further;
  std::vector<uint16_t> second_words;
  std::vector<float> leaf_constants, group_lows;
  std::vector<int32_t> group_sizes, group_leaves;
  ~Owner() { std::free(index.blocks); }
};

}  // namespace

extern "C" {

#define SEMID_API __attribute__((visibility("default")))

// What an index is made of; all arrays must live as long as it, except those marked (read once).
struct semid_parts {
  int64_t items;
  int32_t metric, dim, leaves, terms, zero_column, parts, width, heads, dtype;
  const int64_t* starts;          // (leaves + 1)                       (read once)
  const float* leaf_constants;    // (leaves)                           (read once)
  const int32_t* leaf_terms;      // (terms, leaves), terms >= 1; zero_column where there is none     (read once)
  const int32_t* first_codes;     // (items) column of each first codeword, or null      (read once)
  const float* first_constants;   // (columns) what items share by their first codeword, or null
  const uint8_t* head_codes;      // (items, heads)                     (read once)
  const int32_t* head_columns;    // (heads)
  const int32_t* head_sizes;      // (heads)
  const uint8_t* tail_codes;      // (items, ceil(parts / 2))           (read once)
  const float* codebooks;         // (parts, width, 16)
  const float* scalars;           // (items) what no query changes, without what is shared, or null   (read once)
  float factor;
  const void* vectors;
  const float* scale;
  const float* centre;    // (dim)
  const float* rotation;  // (dim, turned) packed, or null
  const float* words;     // (turned, columns) packed
  int32_t turned, columns;
};

static void take_terms(Owner& owner, const semid_parts& from) {
  Index& index = owner.index;
  const int32_t n = from.leaves;
  owner.leaf_constants.assign(from.leaf_constants, from.leaf_constants + n);
  owner.leaf_constants.resize(static_cast<size_t>(n) + 16);
  auto column = [&](int32_t term, int32_t leaf) { return from.leaf_terms[static_cast<int64_t>(term) * n + leaf]; };
  for (int32_t leaf = 0; leaf < n; leaf++)
    if (!leaf || column(0, leaf) != owner.groups.back().column) owner.groups.push_back({leaf, column(0, leaf)});
  index.group_count = static_cast<int32_t>(owner.groups.size());
  owner.groups.push_back({n, 0});

  owner.second_words.assign(static_cast<size_t>(n) + 16, 0);
  if (from.terms > 1) {
    std::map<int32_t, uint16_t> numbers;
    for (int32_t leaf = 0; leaf < n; leaf++) {
      const int32_t found = column(1, leaf);
      if (!numbers.count(found) && owner.second_columns.size() < 65535) {
        numbers[found] = static_cast<uint16_t>(owner.second_columns.size());
        owner.second_columns.push_back(found);
      }
      owner.second_words[static_cast<size_t>(leaf)] = numbers.at(found);
    }
  } else {
    owner.second_columns.push_back(from.zero_column);
  }
  index.further_terms = from.terms > 2 ? from.terms - 2 : 0;
  for (int32_t g = 0; g < index.group_count; g++) {
    const int32_t start = owner.groups[static_cast<size_t>(g)].start, end = owner.groups[static_cast<size_t>(g) + 1].start;
    owner.group_further.push_back(static_cast<int32_t>(owner.further.size()));
    owner.group_lows.push_back(from.leaf_constants[start]);
    owner.group_sizes.push_back(static_cast<int32_t>(from.starts[end] - from.starts[start]));
    owner.group_leaves.push_back(end - start);
    for (int32_t leaf = start; leaf < end; leaf++) {
      if (from.leaf_constants[leaf] < owner.group_lows.back()) owner.group_lows.back() = from.leaf_constants[leaf];
      for (int32_t term = 2; term < from.terms; term++)
        if (column(term, leaf) != from.zero_column) owner.further.push_back({leaf, column(term, leaf)});
    }
  }
  owner.group_further.push_back(static_cast<int32_t>(owner.further.size()));

  index.leaf_constants = owner.leaf_constants.data();
  index.group_lows = owner.group_lows.data();
  index.group_sizes = owner.group_sizes.data();
  index.group_leaves = owner.group_leaves.data();
  index.group_further = owner.group_further.data();
  index.groups = owner.groups.data();
  index.second_words = owner.second_words.data();
  index.second_columns = owner.second_columns.data();
  index.second_count = static_cast<int32_t>(owner.second_columns.size());
  index.further = owner.further.data();
  index.further_count = static_cast<int32_t>(owner.further.size());
}

SEMID_API int32_t semid_abi() { return 5; }

// 0 plain, 1 AVX2, 2 AVX-512
SEMID_API int32_t semid_best_isa() { return best_isa(); }

SEMID_API void semid_free(void* handle) { delete static_cast<Owner*>(handle); }

SEMID_API int64_t semid_bytes(const void* handle) {
  const Owner* owner = static_cast<const Owner*>(handle);
  return owner->index.block_bytes + static_cast<int64_t>(owner->runs.size() * sizeof(Run)) +
         static_cast<int64_t>((owner->sizes.size() + owner->leaf_runs.size()) * sizeof(int32_t));
}

// A handle, or null when memory is short or there are too many words.
SEMID_API void* semid_new(const semid_parts* from) try {
  auto owner = std::make_unique<Owner>();
  Index& index = owner->index;
  index.items = from->items;
  index.metric = from->metric;
  index.dim = from->dim;
  index.leaves = from->leaves;
  take_terms(*owner, *from);
  index.parts = from->parts;
  index.width = from->width;
  const int32_t tail_bytes = (from->parts + 1) / 2;
  index.rows = (tail_bytes + 1) / 2 * 2;
  index.heads = from->heads;
  index.head_columns = from->head_columns;
  index.head_sizes = from->head_sizes;
  index.codebooks = from->codebooks;
  index.factor = from->factor;
  index.dtype = from->dtype;
  index.vectors = from->vectors;
  index.scale = from->scale;
  index.centre = from->centre;
  index.rotation = from->rotation;
  index.words = from->words;
  index.turned = from->turned;
  index.columns = from->columns;

  index.first_constants = from->first_constants;
  const int64_t stride = index.block_stride();
  uint32_t slot = 0;
  int32_t word = -1;
  for (int32_t leaf = 0; leaf < index.leaves; leaf++) {
    owner->leaf_runs.push_back(static_cast<int32_t>(owner->runs.size()));
    owner->sizes.push_back(static_cast<int32_t>(from->starts[leaf + 1] - from->starts[leaf]));
    for (int64_t p = from->starts[leaf]; p < from->starts[leaf + 1];) {
      const int32_t next = from->first_codes ? from->first_codes[p] : -1;
      if (next != word) slot = (slot + kBlock - 1) / kBlock * kBlock;
      word = next;
      int64_t end = p + 1;
      while (end < from->starts[leaf + 1] && (word < 0 || from->first_codes[end] == word)) end++;
      owner->runs.push_back({static_cast<uint32_t>(p), slot, static_cast<int32_t>(end - p), word});
      slot += static_cast<uint32_t>(end - p);
      p = end;
    }
  }
  const int64_t offset = (static_cast<int64_t>(slot) + kBlock - 1) / kBlock * stride;
  owner->leaf_runs.push_back(static_cast<int32_t>(owner->runs.size()));
  index.runs = owner->runs.data();
  index.run_count = static_cast<int64_t>(owner->runs.size());
  index.leaf_sizes = owner->sizes.data();
  index.leaf_runs = owner->leaf_runs.data();
  index.block_bytes = offset;
  void* blocks = nullptr;
  const size_t aligned = offset < kHugePage ? 64 : kHugePage;  // pages of 2 MB spare the search most address look-ups
  if (posix_memalign(&blocks, aligned, static_cast<size_t>(offset ? offset : 64))) return nullptr;
#ifdef MADV_HUGEPAGE
  if (aligned == kHugePage) madvise(blocks, static_cast<size_t>(offset), MADV_HUGEPAGE);
#endif
  index.blocks = static_cast<uint8_t*>(blocks);
  std::memset(blocks, 0, static_cast<size_t>(offset ? offset : 64));

  float low = 0, high = 0;
  if (from->scalars && from->items) {
    low = std::numeric_limits<float>::infinity();
    high = -low;
    for (int64_t i = 0; i < from->items; i++) {
      low = from->scalars[i] < low ? from->scalars[i] : low;
      high = from->scalars[i] > high ? from->scalars[i] : high;
    }
  }
  index.scalar_low = low;
  index.scalar_step = (high - low) / 65535;
  const float inverse = high > low ? 65535 / (high - low) : 0;
  for (const Run& run : owner->runs) {
    for (int32_t i = 0; i < run.items; i++) {
      const int64_t place_of = static_cast<int64_t>(run.slot) + i;
      uint8_t* block = index.blocks + place_of / kBlock * stride;
      const int64_t lane = place_of % kBlock;
      const int64_t item = static_cast<int64_t>(run.position) + i;
      for (int32_t r = 0; r < tail_bytes; r++) block[r * kBlock + lane] = from->tail_codes[item * tail_bytes + r];
      for (int32_t h = 0; h < index.heads; h++)
        block[(index.rows + h) * kBlock + lane] = from->head_codes[item * index.heads + h];
      const uint16_t scalar =
          from->scalars ? static_cast<uint16_t>((from->scalars[item] - low) * inverse + 0.5f) : uint16_t{0};
      const int64_t place = (lane & 1) * kHalf + lane / 2;
      std::memcpy(block + (index.rows + index.heads) * kBlock + 2 * place, &scalar, 2);
    }
  }
  return owner.release();
} catch (const std::exception&) {
  return nullptr;
}

// 0, or 1 when memory is short.
SEMID_API int32_t semid_search(const void* handle, const Request* request) try {
  const Index& index = static_cast<const Owner*>(handle)->index;
  const Kernel& chosen = kernel(request->isa);
  const int64_t most = std::min<int64_t>(request->threads, (request->queries + kLeastTile - 1) / kLeastTile);
  Tiles tiles{request->queries, most, {}};
  if (most <= 1) {
    chosen.search(index, *request, tiles, request->seconds);
    return 0;
  }
  std::vector<std::array<double, 3>> seconds(static_cast<size_t>(most));
  in_threads(seconds.size(), [&](size_t thread) { chosen.search(index, *request, tiles, seconds[thread].data()); });
  for (const auto& part : seconds)
    for (size_t i = 0; i < 3; i++) request->seconds[i] += part[i];
  return 0;
} catch (const std::exception&) {
  return 1;
}

// See Multiplication. 0, or 1 when memory is short.
SEMID_API int32_t semid_multiply(const float* rows, int64_t count, int32_t dim, const float* packed, int64_t columns,
                                 float* products, int32_t threads, int32_t isa) try {
  const Kernel& chosen = kernel(isa);
  in_tiles(count, kRowsTogether, threads, [&](int64_t first, int64_t last) {
    chosen.multiply({last - first, dim, rows + first * dim, packed, columns, products + first * columns});
  });
  return 0;
} catch (const std::exception&) {
  return 1;
}

// The words of some items: (count, heads + 1) columns of the products; no first one if the scan reads no first codes.
SEMID_API void semid_columns(const void* handle, const int64_t* positions, int64_t count, int32_t* columns) {
  const Owner& owner = *static_cast<const Owner*>(handle);
  const Index& index = owner.index;
  const int64_t stride = index.block_stride();
  for (int64_t i = 0; i < count; i++) {
    const auto after = std::upper_bound(owner.runs.begin(), owner.runs.end(), positions[i],
                                        [](int64_t position, const Run& run) { return position < run.position; });
    const Run& run = *(after - 1);
    const int64_t slot = positions[i] - run.position + run.slot;
    const uint8_t* codes = index.blocks + slot / kBlock * stride + index.rows * kBlock + slot % kBlock;
    if (run.word >= 0) *columns++ = run.word;
    for (int32_t h = 0; h < index.heads; h++) *columns++ = index.head_columns[h] + codes[h * kBlock];
  }
}

// (count, dim) the sum of the words (any, dim) in the columns (count, levels) of each item.
SEMID_API void semid_sum_words(const float* words, int32_t dim, const int32_t* columns, int64_t count, int32_t levels,
                               float* sums) {
  for (int64_t i = 0; i < count; i++, sums += dim) {
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>(dim));
    for (int32_t level = 0; level < levels; level++) {
      const float* word = words + static_cast<int64_t>(*columns++) * dim;
      for (int32_t d = 0; d < dim; d++) sums[d] += word[d];
    }
  }
}

SEMID_API int32_t semid_encode(const Encoding* encoding, int32_t threads, int32_t isa) try {
  const Kernel& chosen = kernel(isa);
  in_tiles(encoding->items, 1024, threads,
           [&](int64_t first, int64_t last) { chosen.encode(*encoding, first, last); });
  return 0;
} catch (const std::exception&) {
  return 1;
}

SEMID_API int32_t semid_train(const Training* training, int32_t threads, int32_t isa) try {
  const Kernel& chosen = kernel(isa);
  in_tiles(training->parts, 1, threads, [&](int64_t first, int64_t last) { chosen.train(*training, first, last); });
  return 0;
} catch (const std::exception&) {
  return 1;
}

}  // extern "C"
