// One query after the other: score leaves, choose some, scan their items' codes, and re-rank the best by their vectors.
//
// This file is compiled once for each instruction set (SEMID_ISA), so nothing in it may have external linkage except
// its Kernel: an inline function of the standard library, compiled here for AVX-512, could replace the one that other
// processors run. Templates are therefore used with types of this file's anonymous namespace only.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include <sys/mman.h>

#include "scan.h"

#if SEMID_ISA > 0
#include <immintrin.h>
#endif

namespace semid {
namespace {

// -- memory and selection ---------------------------------------------------------------------------------------------

// Aligned for any register. Much of it comes from the system itself, and goes back there: what a thread has freed, the
// C library may keep for good.
constexpr size_t kMuch = 128 << 10;

void* allocate(size_t bytes) {
  void* made = nullptr;
  if (bytes >= kMuch)
    made = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  else if (posix_memalign(&made, 64, bytes))
    made = MAP_FAILED;
  if (made == MAP_FAILED) out_of_memory();
  return made;
}

void release(void* made, size_t bytes) {
  if (bytes >= kMuch)
    munmap(made, bytes);
  else
    std::free(made);
}

template <typename T>
struct Buffer {  // grows, never shrinks
  T* data = nullptr;
  size_t capacity = 0;
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(data, capacity * sizeof(T)); }
  T* room(size_t count) {
    if (count > capacity) {
      size_t grown = count + count / 2 + 64;
      void* moved = allocate(grown * sizeof(T));
      if (capacity) std::memcpy(moved, static_cast<void*>(data), capacity * sizeof(T));
      release(data, capacity * sizeof(T));
      data = static_cast<T*>(moved);
      capacity = grown;
    }
    return data;
  }
};

struct Less {
  template <typename T>
  bool operator()(const T& a, const T& b) const { return a < b; }
};

struct Scored {  // leaf or item, and how far it is
  float score;
  int32_t number;
  bool operator<(const Scored& other) const {
    return score < other.score || (score == other.score && number < other.number);
  }
};

struct Found {  // item of the scan: its sum in the upper half, its position in the lower
  uint64_t value;
  bool operator<(const Found& other) const { return value < other.value; }
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The best so many of what a scan finds. Sums are compared as unsigned numbers, offset so that none is negative.
struct Best {
  Found* data;
  size_t count, keep, limit;
  int64_t threshold;  // only sums below it are wanted

  static size_t room(size_t wanted) { return 2 * wanted + 64 + kBlock; }
  void start(size_t wanted, Found* memory) {
    data = memory;
    keep = wanted;
    limit = 2 * wanted + 64;
    count = 0;
    threshold = INT64_MAX;
  }
  void add(uint32_t sum, uint32_t position) { data[count++] = {static_cast<uint64_t>(sum) << 32 | position}; }
  void shrink() {
    if (count <= keep) return;
    std::nth_element(data, data + keep, data + count, Less{});
    Found worst = *std::max_element(data, data + keep, Less{});
    count = keep;
    threshold = static_cast<int64_t>(worst.value >> 32) + 1;  // an equal sum may still win by position
  }
};

// Items side by side that a query has to scan.
struct Visit {
  uint32_t position, slot;  // of the first, as in Run
  int32_t items;
  uint32_t base;  // what is added to their sums
};

struct Tables {
  float unit;         // what one step of the sums is worth
  float low;          // the sum of the least entries of all tables
  uint16_t multiplier;  // of scalars, times 2^-16
  const uint8_t* lut;   // (parts, padded, 16)
  const uint8_t* heads;  // (heads, 256)
};

// One of the queries that are scanned together.
struct Scan {
  Tables tables;
  float lowest;  // what a base of 0 stands for
  size_t next, first_end, end;  // of its visits: to be scanned next, after the very best leaves, after the last
  Best best;
};

struct Scratch {
  Buffer<float> query, centred, rotated, products, scores, bounds, tables, partial, near_scores;
  Buffer<int32_t> near_items, near_numbers, group_counts, inside, chosen;
  Buffer<Scored> sorted, hits;
  Buffer<uint8_t> luts;
  Buffer<Visit> visits;
  Buffer<Found> found;
  Buffer<Scan> scans;
};

// -- leaves -----------------------------------------------------------------------------------------------------------

// Minimum and maximum; lane by lane, which compilers turn into instructions for whole registers.
struct Range {
  float low, high;
};

Range range_of(const float* values, size_t count) {
  constexpr size_t kWide = 32;
  float low[kWide], high[kWide];
  for (size_t j = 0; j < kWide; j++) {
    low[j] = INFINITY;
    high[j] = -INFINITY;
  }
  size_t i = 0;
  for (; i + kWide <= count; i += kWide) {
    for (size_t j = 0; j < kWide; j++) {
      low[j] = values[i + j] < low[j] ? values[i + j] : low[j];
      high[j] = values[i + j] > high[j] ? values[i + j] : high[j];
    }
  }
  Range range{low[0], high[0]};
  for (size_t j = 1; j < kWide; j++) {
    range.low = low[j] < range.low ? low[j] : range.low;
    range.high = high[j] > range.high ? high[j] : range.high;
  }
  for (; i < count; i++) {
    range.low = values[i] < range.low ? values[i] : range.low;
    range.high = values[i] > range.high ? values[i] : range.high;
  }
  return range;
}

// Leaves or groups of leaves, each with a score and a number of items.
struct Listed {
  float* scores;
  int32_t* items;
  int32_t* leaves;   // how many leaves each is; null: one
  int32_t* numbers;  // which leaf each is
  size_t count;
};

struct Amount {
  int64_t items, leaves;
  bool covers(const Amount& other) const { return items >= other.items && leaves >= other.leaves; }
};

// What is listed with a score of at most `limit`.
Amount amount_within(const Listed& listed, float limit) {
  uint32_t items = 0, leaves = 0;  // fewer than 2^32 in all
  if (listed.leaves) {
    for (size_t i = 0; i < listed.count; i++) {
      const uint32_t inside = listed.scores[i] <= limit ? ~0u : 0u;
      items += static_cast<uint32_t>(listed.items[i]) & inside;
      leaves += static_cast<uint32_t>(listed.leaves[i]) & inside;
    }
  } else {
    for (size_t i = 0; i < listed.count; i++) {
      const uint32_t inside = listed.scores[i] <= limit ? ~0u : 0u;
      items += static_cast<uint32_t>(listed.items[i]) & inside;
      leaves -= inside;
    }
  }
  return {items, leaves};
}

// Two scores: within the upper one there is enough, within the lower one there is not.
struct Bracket {
  float lower, upper;
  Amount below;  // what is within the lower one
};

// Halves the range of scores until no more than `few` leaves are between the two; no branch depends on single scores.
// What is needed must be there.
Bracket bracket(const Listed& listed, const Amount& needed, int64_t few) {
  const Range range = range_of(listed.scores, listed.count);
  Bracket found{-INFINITY, range.high, {0, 0}};
  float low = range.low;
  int64_t reached = amount_within(listed, range.high).leaves;
  for (int32_t step = 0; step < 24 && reached - found.below.leaves > few; step++) {
    const float middle = low + (found.upper - low) / 2;
    if (!(middle > low && middle < found.upper)) break;
    const Amount within = amount_within(listed, middle);
    if (within.covers(needed)) {
      found.upper = middle;
      reached = within.leaves;
    } else {
      found.lower = low = middle;
      found.below = within;
    }
  }
  return found;
}

constexpr int64_t kFew = 8;

// The last leaf that is needed, by score and then by number; enough of them must be there.
Scored last_needed(const Listed& leaves, const Amount& needed, Scratch& scratch) {
  const Bracket around = bracket(leaves, needed, kFew);
  Scored* between = scratch.sorted.room(leaves.count + 1);
  size_t count = 0;
  for (size_t i = 0; i < leaves.count; i++) {
    between[count] = {leaves.scores[i], static_cast<int32_t>(i)};
    count += leaves.scores[i] > around.lower && leaves.scores[i] <= around.upper;
  }
  std::sort(between, between + count, Less{});
  Amount held = around.below;
  size_t last = 0;
  for (; last < count; last++) {
    held.items += leaves.items[between[last].number];
    held.leaves++;
    if (held.covers(needed)) break;
  }
  last = last < count ? last : count - 1;
  return {between[last].score, leaves.numbers[between[last].number]};
}

// Leaves whose first word is the same are neighbours, a *group*; nearly all have a second word, few a third.
struct Groups {
  const Index& index;
  const float* products;
  float* scores;   // (leaves, padded) those of the groups scored last
  float* seconds;  // products of the second words
  float* bounds;   // (groups) no leaf of a group has a lower score

  float product(int32_t g) const { return products[index.groups[g].column]; }
  int32_t start(int32_t g) const { return index.groups[g].start; }
  int32_t end(int32_t g) const { return index.groups[g + 1].start; }
};

Groups bound_groups(const Index& index, const float* products, Scratch& scratch) {
  Groups groups{index, products, scratch.scores.room(index.leaves + 32), scratch.partial.room(index.second_count + 64),
                scratch.bounds.room(index.group_count)};
  for (int32_t w = 0; w < index.second_count; w++) groups.seconds[w] = products[index.second_columns[w]];
  float least = range_of(groups.seconds, static_cast<size_t>(index.second_count)).low, least_further = 0;
  for (int32_t t = 0; t < index.further_count; t++)
    least_further = std::min(least_further, products[index.further[t].column]);
  least += least_further * static_cast<float>(index.further_terms);
  for (int32_t g = 0; g < index.group_count; g++) groups.bounds[g] = groups.product(g) + index.group_lows[g] + least;
  return groups;
}

void score_group(const Groups& groups, int32_t g) {
  const Index& index = groups.index;
  const float product = groups.product(g), *seconds = groups.seconds;
  const int32_t end = groups.end(g);
  float* scores = groups.scores;
  int32_t i = groups.start(g);
#if SEMID_ISA == 2
  if (index.second_count <= 512) {
    const int32_t pairs = (index.second_count + 31) / 32;
    const __m512 shared = _mm512_set1_ps(product);
    for (; i < end; i += 16) {  // what is written past the end belongs to groups that are scored later, if at all
      const __m512i word = _mm512_cvtepu16_epi32(_mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(index.second_words + i)));
      __m512 found = _mm512_permutex2var_ps(_mm512_load_ps(seconds), word, _mm512_load_ps(seconds + 16));
      for (int32_t p = 1; p < pairs; p++) {
        const __m512 other =
            _mm512_permutex2var_ps(_mm512_load_ps(seconds + 32 * p), word, _mm512_load_ps(seconds + 32 * p + 16));
        found = _mm512_mask_mov_ps(found, _mm512_cmpge_epi32_mask(word, _mm512_set1_epi32(32 * p)), other);
      }
      const __m512 rest = _mm512_add_ps(shared, _mm512_loadu_ps(index.leaf_constants + i));
      _mm512_storeu_ps(scores + i, _mm512_add_ps(found, rest));
    }
  }
#endif
  for (; i < end; i++) scores[i] = product + index.leaf_constants[i] + seconds[index.second_words[i]];
  for (int32_t t = index.group_further[g]; t < index.group_further[g + 1]; t++)
    scores[index.further[t].start] += groups.products[index.further[t].column];
}

// Appends the leaves of a group that count and have a score of at most `limit`.
void take_group(const Groups& groups, int32_t g, const int32_t* counts, float limit, Listed& leaves) {
  const float* scores = groups.scores;
  int32_t i = groups.start(g);
  const int32_t end = groups.end(g);
#if SEMID_ISA == 2
  const __m512 bound = _mm512_set1_ps(limit);
  const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i < end; i += 16) {
    const __mmask16 there = static_cast<__mmask16>(i + 16 <= end ? 0xFFFF : (1u << (end - i)) - 1);
    const __m512 found = _mm512_loadu_ps(scores + i);  // not masked: that would wait for the store
    const __m512i items = _mm512_maskz_loadu_epi32(there, counts + i);
    const __mmask16 inside =
        _mm512_mask_cmp_ps_mask(_mm512_test_epi32_mask(items, items), found, bound, _CMP_LE_OQ);
    _mm512_storeu_ps(leaves.scores + leaves.count, _mm512_maskz_compress_ps(inside, found));
    _mm512_storeu_si512(leaves.items + leaves.count, _mm512_maskz_compress_epi32(inside, items));
    _mm512_storeu_si512(leaves.numbers + leaves.count,
                        _mm512_maskz_compress_epi32(inside, _mm512_add_epi32(places, _mm512_set1_epi32(i))));
    leaves.count += static_cast<size_t>(__builtin_popcount(inside));
  }
#else
  for (; i < end; i++) {
    leaves.scores[leaves.count] = scores[i];
    leaves.items[leaves.count] = counts[i];
    leaves.numbers[leaves.count] = i;
    leaves.count += scores[i] <= limit && counts[i];
  }
#endif
}

// The leaves with a score of at most `limit`, and that count, of the groups with a bound of at most `of_groups`.
Listed leaves_within(const Groups& groups, const int32_t* counts, float of_groups, float limit, Scratch& scratch) {
  const size_t room = static_cast<size_t>(groups.index.leaves) + 16;
  Listed leaves{scratch.near_scores.room(room), scratch.near_items.room(room), nullptr, scratch.near_numbers.room(room), 0};
  int32_t* inside = scratch.inside.room(static_cast<size_t>(groups.index.group_count) + 1);
  size_t count = 0;
  for (int32_t g = 0; g < groups.index.group_count; g++) {
    inside[count] = g;
    count += groups.bounds[g] <= of_groups;
  }
  for (size_t i = 0; i < count; i++) {
    score_group(groups, inside[i]);
    take_group(groups, inside[i], counts, limit, leaves);
  }
  return leaves;
}

constexpr int32_t kManyGroups = 16;  // from so many on, most are left out by their bounds
constexpr double kEnough = 1.5;      // so much more than what is needed, the groups with the lowest bounds hold

// A score that enough leaves are within, found among the groups with the lowest bounds; infinite if that fails.
float score_limit(const Groups& groups, const int32_t* counts, int32_t* group_counts, const Amount& needed,
                  Scratch& scratch) {
  const Index& index = groups.index;
  if (index.group_count < kManyGroups) return INFINITY;
  const Listed listed{groups.bounds, group_counts, index.group_leaves, nullptr, static_cast<size_t>(index.group_count)};
  const Amount more{static_cast<int64_t>(kEnough * static_cast<double>(needed.items)),
                    static_cast<int64_t>(kEnough * static_cast<double>(needed.leaves))};
  const Bracket around = bracket(listed, more, index.leaves / 64);
  const Listed leaves = leaves_within(groups, counts, around.upper, INFINITY, scratch);
  return amount_within(leaves, INFINITY).covers(needed) ? bracket(leaves, needed, kFew).upper : INFINITY;
}

constexpr size_t kFirst = 8;  // leaves to scan before all others, so that the threshold of the scan falls quickly

// The leaves to open: the best until they hold what is needed, into scratch.chosen. The very best come first, the others
// in the order of memory. Returns how many items and leaves.
Amount choose_leaves(const Index& index, const float* products, const int32_t* counts, int32_t* group_counts,
                     Amount needed, Scratch& scratch) {
  const Groups groups = bound_groups(index, products, scratch);
  const float limit = score_limit(groups, counts, group_counts, needed, scratch);
  const Listed leaves = leaves_within(groups, counts, limit, limit, scratch);
  int32_t* chosen = scratch.chosen.room(leaves.count + 1);
  if (!leaves.count) return {0, 0};
  const Amount there = amount_within(leaves, INFINITY);
  needed = {std::min(needed.items, there.items), std::min(needed.leaves, there.leaves)};
  const Scored last = last_needed(leaves, needed, scratch);
  const size_t first = std::min(kFirst, leaves.count);
  Scored near = last_needed(leaves, {0, static_cast<int64_t>(first)}, scratch);
  if (last < near) near = last;
  Scored* nearest = scratch.sorted.room(leaves.count + 1);
  size_t filled = 0;
  for (size_t i = 0; i < leaves.count; i++) {
    nearest[filled] = {leaves.scores[i], leaves.numbers[i]};
    filled += !(near < nearest[filled]);
  }
  std::sort(nearest, nearest + filled, Less{});
  for (size_t i = 0; i < filled; i++) chosen[i] = nearest[i].number;
  Amount held{0, 0};
  for (size_t i = 0; i < leaves.count; i++) {
    const Scored leaf{leaves.scores[i], leaves.numbers[i]};
    const bool wanted = !(last < leaf);
    held.items += wanted ? leaves.items[i] : 0;
    held.leaves += wanted;
    chosen[filled] = leaf.number;
    filled += wanted && near < leaf;
  }
  return held;
}

// -- tables -----------------------------------------------------------------------------------------------------------

// Bytes of the tables of one query.
size_t table_bytes(const Index& index) {
  return static_cast<size_t>(index.rows) * 32 + static_cast<size_t>(index.heads) * 256;
}

Tables make_tables(const Index& index, const float* rotated, const float* products, Scratch& scratch, uint8_t* memory) {
  float* tables = scratch.tables.room(static_cast<size_t>(index.rows) * 32);
  float* lows = scratch.partial.room(2 * index.rows + index.heads);
  float range = 0, low = 0;
  for (int32_t p = 0; p < index.parts; p++) {
    const float* words = index.codebooks + static_cast<int64_t>(p) * index.width * 16;
    float sums[16] = {0};
    for (int32_t w = 0; w < index.width; w++) {
      const float x = index.factor * rotated[p * index.width + w];
      for (int32_t c = 0; c < 16; c++) sums[c] += x * words[w * 16 + c];
    }
    float least = sums[0], most = sums[0];
    for (int32_t c = 1; c < 16; c++) {
      least = sums[c] < least ? sums[c] : least;
      most = sums[c] > most ? sums[c] : most;
    }
    std::memcpy(tables + p * 16, sums, sizeof sums);
    lows[p] = least;
    low += least;
    range = std::max(range, most - least);
  }
  float unit = range / 127;  // two parts are added in one byte
  for (int32_t h = 0; h < index.heads; h++) {
    const float* head = products + index.head_columns[h];
    const Range range_of_head = range_of(head, static_cast<size_t>(index.head_sizes[h]));
    lows[index.parts + h] = range_of_head.low;
    low += range_of_head.low;
    unit = std::max(unit, (range_of_head.high - range_of_head.low) / 255);
  }
  unit = std::max(unit, index.scalar_step * 65535 / 32768);  // scalars must leave room in 16 bits
  if (!(unit > 0)) unit = 1;
  const float inverse = 1 / unit;

  uint8_t* lut = memory;
  for (int32_t p = 0; p < 2 * index.rows; p++) {
    uint8_t entries[16] = {0};
    for (int32_t c = 0; c < 16 && p < index.parts; c++)
      entries[c] = static_cast<uint8_t>((tables[p * 16 + c] - lows[p]) * inverse + 0.5f);
    std::memcpy(lut + p * 16, entries, 16);
  }
  uint8_t* heads = lut + static_cast<size_t>(index.rows) * 32;
  for (int32_t h = 0; h < index.heads; h++) {
    const float* head = products + index.head_columns[h];
    const float least = lows[index.parts + h];
    const int32_t size = index.head_sizes[h];
    for (int32_t c = 0; c < size; c++) heads[h * 256 + c] = static_cast<uint8_t>((head[c] - least) * inverse + 0.5f);
    std::memset(heads + h * 256 + size, 0, 256 - size);
  }
  const float scaled = index.scalar_step * inverse * 65536;
  return {unit, low, static_cast<uint16_t>(std::min(scaled + 0.5f, 65535.0f)), lut, heads};
}

// -- scan -------------------------------------------------------------------------------------------------------------

// Sums of a block are kept as (even items, odd items), for bytes become 16 bits wide that way; each fits, or is cut off.
#if SEMID_ISA == 2

// The entries of one level's table for 64 codes.
inline __m512i look_up(const uint8_t* table, int32_t size, __m512i codes) {
  const __m512i a = _mm512_loadu_si512(table);
  if (size <= 64) return _mm512_permutexvar_epi8(codes, a);
  const __m512i lower = _mm512_permutex2var_epi8(a, codes, _mm512_loadu_si512(table + 64));
  if (size <= 128) return lower;
  const __m512i upper =
      _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), codes, _mm512_loadu_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), lower, upper);
}

inline __m512i table_of(const uint8_t* lut) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lut)));
}

inline void sum_block(const Index& index, const Tables& tables, const uint8_t* block, __m512i& even, __m512i& odd) {
  const __m512i nibble = _mm512_set1_epi8(15);
  even = odd = _mm512_setzero_si512();
  const uint8_t* lut = tables.lut;
  for (int32_t r = 0; r < index.rows; r++, lut += 32, block += kBlock) {
    __m512i codes = _mm512_load_si512(block);
    asm("" : "+v"(codes));  // loaded once, and not by each of the instructions that use it
    const __m512i low = _mm512_shuffle_epi8(table_of(lut), _mm512_and_si512(codes, nibble));
    const __m512i high =
        _mm512_shuffle_epi8(table_of(lut + 16), _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble));
    const __m512i both = _mm512_add_epi8(low, high);
    even = _mm512_add_epi16(even, both);  // with those of odd items in the upper byte
    odd = _mm512_add_epi16(odd, _mm512_srli_epi16(both, 8));
  }
  even = _mm512_sub_epi16(even, _mm512_slli_epi16(odd, 8));
  for (int32_t h = 0; h < index.heads; h++, block += kBlock) {
    const __m512i found = look_up(tables.heads + h * 256, index.head_sizes[h], _mm512_load_si512(block));
    even = _mm512_add_epi16(even, _mm512_and_si512(found, _mm512_set1_epi16(255)));
    odd = _mm512_add_epi16(odd, _mm512_srli_epi16(found, 8));
  }
  const __m512i multiplier = _mm512_set1_epi16(static_cast<int16_t>(tables.multiplier));
  even = _mm512_adds_epu16(even, _mm512_mulhi_epu16(_mm512_load_si512(block), multiplier));
  odd = _mm512_adds_epu16(odd, _mm512_mulhi_epu16(_mm512_load_si512(block + kBlock), multiplier));
}

#else

void sum_block(const Index& index, const Tables& tables, const uint8_t* block, uint16_t* total) {
#if SEMID_ISA == 1
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i* sums = reinterpret_cast<__m256i*>(total);
  for (int32_t half = 0; half < 2; half++) {
    __m256i even = _mm256_setzero_si256(), odd = _mm256_setzero_si256();
    for (int32_t r = 0; r < index.rows; r++) {
      const __m128i* lut = reinterpret_cast<const __m128i*>(tables.lut + r * 32);
      const __m256i codes = _mm256_load_si256(reinterpret_cast<const __m256i*>(block + r * kBlock) + half);
      const __m256i low =
          _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(lut)), _mm256_and_si256(codes, nibble));
      const __m256i high = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(lut + 1)),
                                               _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble));
      const __m256i both = _mm256_add_epi8(low, high);
      even = _mm256_add_epi16(even, both);
      odd = _mm256_add_epi16(odd, _mm256_srli_epi16(both, 8));
    }
    _mm256_store_si256(sums + half, _mm256_sub_epi16(even, _mm256_slli_epi16(odd, 8)));
    _mm256_store_si256(sums + 2 + half, odd);
  }
#else
  std::memset(total, 0, 2 * kBlock);
  for (int32_t r = 0; r < index.rows; r++) {
    const uint8_t *low = tables.lut + r * 32, *high = low + 16, *codes = block + r * kBlock;
    for (int32_t j = 0; j < kBlock; j++)
      total[(j & 1) * kHalf + j / 2] += static_cast<uint16_t>(low[codes[j] & 15] + high[codes[j] >> 4]);
  }
#endif
  const uint8_t* codes = block + index.rows * kBlock;
  for (int32_t h = 0; h < index.heads; h++, codes += kBlock) {
    const uint8_t* table = tables.heads + h * 256;
    for (int32_t j = 0; j < kHalf; j++) {
      total[j] += table[codes[2 * j]];
      total[kHalf + j] += table[codes[2 * j + 1]];
    }
  }
#if SEMID_ISA == 1
  const __m256i multiplier = _mm256_set1_epi16(static_cast<int16_t>(tables.multiplier));
  for (int32_t i = 0; i < 4; i++) {
    const __m256i raw = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes) + i);
    _mm256_store_si256(sums + i, _mm256_adds_epu16(_mm256_load_si256(sums + i), _mm256_mulhi_epu16(raw, multiplier)));
  }
#else
  for (int32_t j = 0; j < kBlock; j++) {
    uint16_t raw;
    std::memcpy(&raw, codes + 2 * j, 2);
    total[j] = static_cast<uint16_t>(
        std::min<uint32_t>(65535, total[j] + (static_cast<uint32_t>(raw) * tables.multiplier >> 16)));
  }
#endif
}

// Which of the sums are below a bound.
inline uint64_t below(const uint16_t* sums, int64_t bound) {
  uint64_t found = 0;
#if SEMID_ISA == 1
  // unsigned a < b as: not max(a, b) == a
  const __m256i least = _mm256_set1_epi16(static_cast<int16_t>(bound));
  const __m256i* all = reinterpret_cast<const __m256i*>(sums);
  for (int32_t half = 0; half < 2; half++) {
    const __m256i a = _mm256_load_si256(all + 2 * half), b = _mm256_load_si256(all + 2 * half + 1);
    const __m256i packed =
        _mm256_permute4x64_epi64(_mm256_packs_epi16(_mm256_cmpeq_epi16(_mm256_max_epu16(a, least), a),
                                                    _mm256_cmpeq_epi16(_mm256_max_epu16(b, least), b)),
                                 0xD8);
    found |= static_cast<uint64_t>(~static_cast<uint32_t>(_mm256_movemask_epi8(packed))) << 32 * half;
  }
#else
  for (int32_t j = 0; j < kBlock; j++) found |= static_cast<uint64_t>(sums[j] < bound) << j;
#endif
  return found;
}

#endif

// The bits of the first so many items: those of even items in the lower half, of odd ones in the upper.
inline uint64_t first_items(int32_t items) {
  if (items >= kBlock) return ~uint64_t{0};
  const uint64_t even = (uint64_t{1} << ((items + 1) / 2)) - 1, odd = (uint64_t{1} << (items / 2)) - 1;
  return even | odd << kHalf;
}

inline void prefetch(const void* data, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(data) + b);
}

// `ahead`: what comes next, read from memory while this is scanned, block by block.
void scan_items(const Index& index, const Tables& tables, const Visit& visit, const uint8_t* allowed, const Visit& ahead,
                Best& best) {
  const int64_t stride = index.block_stride();
  const uint8_t* block = index.blocks + visit.slot / kBlock * stride;
  const uint8_t* next = index.blocks + ahead.slot / kBlock * stride;
  const int32_t skipped = static_cast<int32_t>(visit.slot % kBlock), end = skipped + visit.items;
  const int32_t next_end = static_cast<int32_t>(ahead.slot % kBlock) + ahead.items;
  uint64_t wanted = ~first_items(skipped);
  for (int32_t done = 0; done < end; done += kBlock, block += stride, next += stride, wanted = ~uint64_t{0}) {
    if (done < next_end) prefetch(next, stride);
    const int64_t left = best.threshold - visit.base;
    if (left <= 0) return;
    alignas(64) uint16_t sums[kBlock];
    uint64_t near = wanted & first_items(end - done);
#if SEMID_ISA == 2
    __m512i even, odd;
    sum_block(index, tables, block, even, odd);
    if (left <= 65535) {
      const __m512i bound = _mm512_set1_epi16(static_cast<int16_t>(left));
      near &= _mm512_cmplt_epu16_mask(even, bound) | static_cast<uint64_t>(_mm512_cmplt_epu16_mask(odd, bound)) << kHalf;
    }
    if (!near) continue;
    _mm512_store_si512(sums, even);
    _mm512_store_si512(sums + kHalf, odd);
#else
    sum_block(index, tables, block, sums);
    if (left <= 65535) near &= below(sums, left);
#endif
    const uint32_t origin = visit.position + static_cast<uint32_t>(done - skipped);  // of the block; wraps below 0
    for (; near; near &= near - 1) {
      const uint32_t j = static_cast<uint32_t>(__builtin_ctzll(near));
      const uint32_t position = origin + 2 * (j % kHalf) + j / kHalf;
      if (!allowed || allowed[position]) best.add(visit.base + sums[j], position);
    }
    if (best.count >= best.limit) best.shrink();
  }
}

// What to scan for a query whose leaves are the first `count` of scratch.chosen, those from kFirst on in the
// order of memory: appended to `visits`, leaves side by side as one.
void list_visits(const Index& index, const float* products, size_t count, Scan& scan, Scratch& scratch) {
  const int32_t* leaves = scratch.chosen.data;
  auto shared = [&](const Run& run) { return run.word < 0 ? 0 : index.first_constants[run.word] + products[run.word]; };
  // Sums become unsigned by counting from the least that any item in these leaves can have
  float least = INFINITY;
  size_t runs = 0;
  for (size_t i = 0; i < count; i++) {
    const int32_t leaf = leaves[i], end = index.leaf_runs[leaf + 1];
    for (int32_t r = index.leaf_runs[leaf]; r < end; r++, runs++) {
      const float sum = shared(index.runs[r]);
      least = sum < least ? sum : least;
    }
  }
  scan.lowest = least;
  const float inverse = 1 / scan.tables.unit;
  Visit* visits = scratch.visits.room(scan.next + runs);
  size_t filled = scan.next, mergeable = scan.next;
  for (size_t i = 0; i < count; i++) {
    if (i == kFirst) mergeable = filled;
    const int32_t leaf = leaves[i], end = index.leaf_runs[leaf + 1];
    for (int32_t r = index.leaf_runs[leaf]; r < end; r++) {
      const Run& run = index.runs[r];
      if (filled > mergeable) {
        Visit& before = visits[filled - 1];
        const uint32_t items = static_cast<uint32_t>(before.items);
        if (before.position + items == run.position && before.slot + items == run.slot && run.slot % kBlock) {
          before.items += run.items;
          continue;
        }
      }
      const float base = (shared(run) - least) * inverse;
      visits[filled++] = {run.position, run.slot, run.items, base < 4e9f ? static_cast<uint32_t>(base) : 4000000000u};
    }
    if (i + 1 == kFirst) scan.first_end = filled;
  }
  if (count < kFirst) scan.first_end = filled;
  scan.end = filled;
}

// Scans on up to a visit, or up to a place in memory.
void scan_until(const Index& index, const Visit* visits, const uint8_t* allowed, size_t end, uint64_t slot, Scan& scan) {
  while (scan.next < end && visits[scan.next].slot < slot) {
    const Visit& visit = visits[scan.next++];
    scan_items(index, scan.tables, visit, allowed, visits[scan.next < scan.end ? scan.next : scan.next - 1], scan.best);
  }
}

// -- exact distances --------------------------------------------------------------------------------------------------

struct Products {  // of a query x and a row y: x.y and, where they are needed, |x - y|^2 or y.y
  float xy, other;
};

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  } else {
    const uint32_t bits = exponent == 31 ? 0x7F800000 | mantissa << 13 : (exponent + 112) << 23 | mantissa << 13;
    std::memcpy(&value, &bits, 4);
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float entry(const float* row, int32_t i) { return row[i]; }
inline float entry(const uint16_t* row, int32_t i) { return half_to_float(row[i]); }
inline float entry(const int8_t* row, int32_t i) { return static_cast<float>(row[i]); }

#if SEMID_ISA == 2
inline __m512 entries(const float* row) { return _mm512_loadu_ps(row); }
inline __m512 entries(const uint16_t* row) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
}
inline __m512 entries(const int8_t* row) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row))));
}
constexpr int32_t kLanes = 16;
using Register = __m512;
inline Register load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* x, Register a) { _mm512_storeu_ps(x, a); }
inline Register zero() { return _mm512_setzero_ps(); }
inline Register spread(float x) { return _mm512_set1_ps(x); }
inline Register multiply_add(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }
inline Register subtract_product(Register a, Register b, Register c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline float total(Register a) { return _mm512_reduce_add_ps(a); }
inline Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
#elif SEMID_ISA == 1
inline __m256 entries(const float* row) { return _mm256_loadu_ps(row); }
inline __m256 entries(const uint16_t* row) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
}
inline __m256 entries(const int8_t* row) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row))));
}
constexpr int32_t kLanes = 8;
using Register = __m256;
inline Register load(const float* x) { return _mm256_loadu_ps(x); }
inline void store(float* x, Register a) { _mm256_storeu_ps(x, a); }
inline Register zero() { return _mm256_setzero_ps(); }
inline Register spread(float x) { return _mm256_set1_ps(x); }
inline Register multiply_add(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }
inline Register subtract_product(Register a, Register b, Register c) { return _mm256_fnmadd_ps(a, b, c); }
inline Register add(Register a, Register b) { return _mm256_add_ps(a, b); }
inline float total(Register a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#else
template <typename T>
inline float entries(const T* row) { return entry(row, 0); }
constexpr int32_t kLanes = 1;
using Register = float;
inline Register load(const float* x) { return *x; }
inline void store(float* x, Register a) { *x = a; }
inline Register zero() { return 0; }
inline Register spread(float x) { return x; }
inline Register multiply_add(Register a, Register b, Register c) { return a * b + c; }
inline Register subtract_product(Register a, Register b, Register c) { return c - a * b; }
inline Register add(Register a, Register b) { return a + b; }
inline float total(Register a) { return a; }
#endif

// |x - scale y|^2
template <typename T>
float squared_distance(const float* x, const T* y, float scale, int32_t dim) {
  Register even = zero(), odd = zero();
  const Register by = spread(scale);
  int32_t i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
    const Register a = subtract_product(entries(y + i), by, load(x + i));
    const Register b = subtract_product(entries(y + i + kLanes), by, load(x + i + kLanes));
    even = multiply_add(a, a, even);
    odd = multiply_add(b, b, odd);
  }
  float sum = total(add(even, odd));
  for (; i < dim; i++) {
    const float left = x[i] - scale * entry(y, i);
    sum += left * left;
  }
  return sum;
}

// x.y and y.y
template <typename T>
Products products_of(const float* x, const T* y, int32_t dim) {
  Register xy = zero(), yy = zero();
  int32_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    const Register row = entries(y + i);
    xy = multiply_add(row, load(x + i), xy);
    yy = multiply_add(row, row, yy);
  }
  Products sums{total(xy), total(yy)};
  for (; i < dim; i++) {
    sums.xy += x[i] * entry(y, i);
    sums.other += entry(y, i) * entry(y, i);
  }
  return sums;
}

template <typename T>
float distance(const Index& index, const float* query, const T* rows, int64_t position) {
  const T* row = rows + position * index.dim;
  const float scale = index.scale ? index.scale[position] : 1.0f;
  if (index.metric == kL2) return std::sqrt(squared_distance(query, row, scale, index.dim));
  const Products sums = products_of(query, row, index.dim);
  if (index.metric == kInnerProduct) return -scale * sums.xy;
  const float length = index.dtype == kFloat32 ? 1.0f : std::sqrt(sums.other);  // float32 rows are kept at length 1
  return std::min(std::max(1.0f - sums.xy / std::max(length, 1e-30f), 0.0f), 2.0f);
}

template <typename T>
size_t rerank(const Index& index, const float* query, const Best& best, Scratch& scratch) {
  const T* rows = static_cast<const T*>(index.vectors);
  Scored* hits = scratch.hits.room(best.count);
  const int64_t bytes = static_cast<int64_t>(index.dim) * sizeof(T);
  constexpr size_t kAhead = 6;
  for (size_t i = 0; i < std::min(kAhead, best.count); i++)
    prefetch(rows + (best.data[i].value & 0xFFFFFFFF) * index.dim, bytes);
  for (size_t i = 0; i < best.count; i++) {
    if (i + kAhead < best.count)
      prefetch(rows + (best.data[i + kAhead].value & 0xFFFFFFFF) * index.dim, bytes);
    const int64_t position = static_cast<int64_t>(best.data[i].value & 0xFFFFFFFF);
    hits[i] = {distance(index, query, rows, position), static_cast<int32_t>(position)};
  }
  return best.count;
}

// -- products of queries with words -----------------------------------------------------------------------------------
//
// As BLAS does it, but in the thread that asks, and in no other: BLAS has threads of its own, which wait for work by
// turning round, and so take the processor from those that scan.

constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 3 : 1;  // at a time: their sums fill the registers
constexpr int kColumns = kPanel / kLanes;

// `Rows` rows times `Panels` panels; the last panel may have fewer columns.
template <int Rows, int Panels>
void multiply_panels(const Multiplication& from, int64_t row, int64_t panel) {
  Register sums[Rows][Panels * kColumns];
  for (auto& of_row : sums)
    for (Register& sum : of_row) sum = zero();
  const int64_t dim = from.dim;
  const float* rows = from.rows + row * dim;
  const float* packed = from.packed + panel * dim * kPanel;
  for (int64_t d = 0; d < dim; d++) {
    Register words[Panels * kColumns];
    for (int p = 0; p < Panels; p++)
      for (int c = 0; c < kColumns; c++)
        words[p * kColumns + c] = load(packed + (p * dim + d) * kPanel + c * kLanes);
    for (int r = 0; r < Rows; r++)
      for (int c = 0; c < Panels * kColumns; c++) sums[r][c] = multiply_add(spread(rows[r * dim + d]), words[c], sums[r][c]);
  }
  for (int r = 0; r < Rows; r++) {
    float* products = from.products + (row + r) * from.columns;
    for (int p = 0; p < Panels; p++) {
      const int64_t first = (panel + p) * kPanel, left = from.columns - first;
      float last[kPanel];
      float* to = left < kPanel ? last : products + first;
      for (int c = 0; c < kColumns; c++) store(to + c * kLanes, sums[r][p * kColumns + c]);
      if (left < kPanel) std::memcpy(products + first, last, sizeof(float) * static_cast<size_t>(left));
    }
  }
}

void multiply(const Multiplication& from) {
  const int64_t panels = (from.columns + kPanel - 1) / kPanel;
  const int64_t whole = from.count / kRows * kRows;
  for (int64_t panel = 0; panel < panels; panel++)
    for (int64_t row = 0; row < whole; row += kRows) multiply_panels<kRows, 1>(from, row, panel);
  for (int64_t row = whole; row < from.count; row++) {  // several panels, for else each sum waits for the last
    int64_t panel = 0;
    for (; panel + 4 <= panels; panel += 4) multiply_panels<1, 4>(from, row, panel);
    for (; panel < panels; panel++) multiply_panels<1, 1>(from, row, panel);
  }
}

// -- the whole --------------------------------------------------------------------------------------------------------

// Chooses leaves of one query; they are then in scratch.chosen, as list_visits wants them. Returns how many.
size_t route(const Index& index, const Request& request, int64_t q, const float* products, const int32_t* counts,
             int32_t* group_counts, Scratch& scratch) {
  Amount held{0, 0};
  if (request.given) {
    int32_t* leaves = scratch.chosen.room(static_cast<size_t>(request.given_width));
    for (int64_t i = 0; i < request.given_width; i++) {
      const int64_t leaf = request.given[q * request.given_width + i];
      if (leaf < 0) continue;
      leaves[held.leaves++] = static_cast<int32_t>(leaf);
      held.items += counts[leaf];
    }
    std::sort(leaves + std::min<int64_t>(kFirst, held.leaves), leaves + held.leaves, Less{});
  } else {
    const int64_t leaves = std::min<int64_t>(request.least_leaves, index.leaves);
    const Amount needed{std::min(request.goal, index.items), std::max<int64_t>(leaves, 1)};
    held = choose_leaves(index, products, counts, group_counts, needed, scratch);
  }
  const size_t count = static_cast<size_t>(held.leaves);
  if (request.leaves) {
    Opened* opened = request.leaves + q * index.leaves;
    for (size_t i = 0; i < count; i++) opened[i] = {scratch.scores.data[scratch.chosen.data[i]], scratch.chosen.data[i]};
  }
  request.candidates[q] = held.items;
  request.opened[q] = held.leaves;
  return count;
}

// A query as it is compared: divided by its length, if that is given.
const float* comparable(const Index& index, const Request& request, int64_t q, float* memory) {
  const float* query = request.vectors + q * index.dim;
  if (!request.lengths) return query;
  const float length = request.lengths[q];
  for (int32_t d = 0; d < index.dim; d++) memory[d] = query[d] / length;
  return memory;
}

// Some queries in the space of the codes, and their products with all words, into scratch.rotated and scratch.products.
void transform(const Index& index, const Request& request, int64_t first, size_t count, Scratch& scratch) {
  const size_t dim = static_cast<size_t>(index.dim), turned = static_cast<size_t>(index.turned);
  const size_t width = index.rotation ? dim : turned;
  float* query = scratch.query.room(dim);
  float* centred = scratch.centred.room(count * width);
  for (size_t i = 0; i < count; i++) {
    const float* from = comparable(index, request, first + static_cast<int64_t>(i), query);
    float* to = centred + i * width;
    for (size_t d = 0; d < dim; d++) to[d] = from[d] - index.centre[d];
    std::memset(to + dim, 0, sizeof(float) * (width - dim));
  }
  const int64_t rows = static_cast<int64_t>(count);
  float* rotated = scratch.rotated.room(count * turned);
  if (index.rotation)
    multiply({rows, index.dim, centred, index.rotation, index.turned, rotated});
  else
    std::memcpy(rotated, centred, sizeof(float) * count * turned);
  float* products = scratch.products.room(count * static_cast<size_t>(index.columns));
  multiply({rows, index.turned, rotated, index.words, index.columns, products});
}

// Writes the hits of one query.
void finish(const Index& index, const Request& request, int64_t q, const Scan& scan, Scratch& scratch) {
  const int64_t width = request.k ? request.k : request.keep;
  int64_t* positions = request.positions + q * width;
  float* distances = request.distances + q * width;
  int64_t filled = 0;
  if (request.k) {
    const float* query = comparable(index, request, q, scratch.query.room(static_cast<size_t>(index.dim)));
    const size_t found = index.dtype == kFloat32   ? rerank<float>(index, query, scan.best, scratch)
                         : index.dtype == kFloat16 ? rerank<uint16_t>(index, query, scan.best, scratch)
                                                   : rerank<int8_t>(index, query, scan.best, scratch);
    filled = std::min<int64_t>(request.k, static_cast<int64_t>(found));
    Scored* hits = scratch.hits.data;
    std::partial_sort(hits, hits + filled, hits + found, Less{});
    for (int64_t i = 0; i < filled; i++) {
      positions[i] = hits[i].number;
      distances[i] = hits[i].score;
    }
  } else {
    const Best& best = scan.best;
    std::sort(best.data, best.data + best.count, Less{});
    filled = static_cast<int64_t>(best.count);
    const float low = scan.lowest + scan.tables.low + index.scalar_low;
    for (int64_t i = 0; i < filled; i++) {
      const uint64_t value = best.data[i].value;
      positions[i] = static_cast<int64_t>(value & 0xFFFFFFFF);
      distances[i] = low + scan.tables.unit * static_cast<float>(value >> 32);
    }
  }
  for (int64_t i = filled; i < width; i++) {
    positions[i] = -1;
    distances[i] = INFINITY;
  }
}

constexpr size_t kTogether = 512;       // queries that are scanned together, at most,
constexpr size_t kTogetherBytes = 8 << 20;  // unless what they need takes more memory than that
constexpr size_t kPieceBytes = 256 << 10;   // of memory that one query after the other scans, so that it stays in the cache
constexpr size_t kTransformed = 8 * kRows;  // queries whose products are made together, so that these stay in the cache

// Some of the queries [first, last), the first ones: as many as are scanned together. Returns how many.
int64_t search_together(const Index& index, const Request& request, int64_t first, int64_t last, Scratch& scratch,
                        double* seconds) {
  const int32_t* counts = request.counts ? request.counts : index.leaf_sizes;
  const size_t keep = static_cast<size_t>(std::min(request.keep, index.items)), room = Best::room(keep);
  const size_t bytes = (table_bytes(index) + 63) / 64 * 64;
  const size_t fitting = kTogetherBytes / (room * sizeof(Found) + bytes) + 1;
  const size_t most = std::min(std::min(kTogether, fitting), static_cast<size_t>(last - first));
  Found* found = scratch.found.room(most * room);
  uint8_t* luts = scratch.luts.room(most * bytes);
  Scan* scans = scratch.scans.room(most);
  int32_t* group_counts = index.group_sizes;
  if (request.counts && !request.given) {
    group_counts = scratch.group_counts.room(static_cast<size_t>(index.group_count));
    for (int32_t g = 0; g < index.group_count; g++) {
      group_counts[g] = 0;
      for (int32_t leaf = index.groups[g].start; leaf < index.groups[g + 1].start; leaf++) group_counts[g] += counts[leaf];
    }
  }
  size_t queries = 0, listed = 0;
  for (; queries < most && listed * sizeof(Visit) < kTogetherBytes; queries++) {
    const double started = now();
    const int64_t q = first + static_cast<int64_t>(queries);
    const size_t place = queries % kTransformed;
    if (!place) transform(index, request, q, std::min(kTransformed, most - queries), scratch);
    const float* rotated = scratch.rotated.data + place * static_cast<size_t>(index.turned);
    const float* products = scratch.products.data + place * static_cast<size_t>(index.columns);
    const size_t count = route(index, request, q, products, counts, group_counts, scratch);
    const double routed = now();
    Scan& scan = scans[queries];
    scan.tables = make_tables(index, rotated, products, scratch, luts + queries * bytes);
    scan.best.start(keep, found + queries * room);
    scan.next = listed;
    list_visits(index, products, count, scan, scratch);
    listed = scan.end;
    scan_until(index, scratch.visits.data, request.allowed, scan.first_end, UINT64_MAX, scan);
    scan.best.shrink();
    seconds[0] += routed - started;
    seconds[1] += now() - routed;
  }
  const double listing = now();
  // Piece by piece of memory: what one query has brought into the cache, the next ones find there
  const int64_t blocks = index.block_bytes / index.block_stride();
  const int64_t piece = queries > 1 ? std::max<int64_t>(1, static_cast<int64_t>(kPieceBytes) / index.block_stride()) : blocks;
  for (int64_t block = 0; block < blocks; block += piece) {
    const uint64_t until = static_cast<uint64_t>(block + piece) * kBlock;
    for (size_t i = 0; i < queries; i++)
      scan_until(index, scratch.visits.data, request.allowed, scans[i].end, until, scans[i]);
  }
  const double scanned = now();
  for (size_t i = 0; i < queries; i++) {
    scans[i].best.shrink();
    finish(index, request, first + static_cast<int64_t>(i), scans[i], scratch);
  }
  seconds[1] += scanned - listing;
  seconds[2] += now() - scanned;
  return static_cast<int64_t>(queries);
}

void search(const Index& index, const Request& request, Tiles& tiles, double* seconds) {
  // What a single query needs stays for the next one of its thread: to ask the system for it takes as long as a scan
  thread_local Scratch kept;
  Scratch made;
  Scratch& scratch = request.queries == 1 ? kept : made;
  for (int64_t first, last; next_tile(tiles, first, last);)
    while (first < last) first += search_together(index, request, first, last, scratch, seconds);
}

// -- encoding ---------------------------------------------------------------------------------------------------------

// The nearest of 16 words (width, 16), the first of them if there are several. Compared side by side: one after the
// other would take five times as long as the distances do.
#if SEMID_ISA == 2
inline int32_t nearest_word(const float* point, const float* words, int32_t width) {
  __m512 distances = _mm512_setzero_ps();
  for (int32_t w = 0; w < width; w++) {
    const __m512 away = _mm512_sub_ps(_mm512_set1_ps(point[w]), _mm512_loadu_ps(words + w * 16));
    distances = _mm512_fmadd_ps(away, away, distances);
  }
  const __m512 least = _mm512_set1_ps(_mm512_reduce_min_ps(distances));
  const uint32_t nearest = _mm512_cmp_ps_mask(distances, least, _CMP_EQ_OQ);
  return nearest ? __builtin_ctz(nearest) : 0;  // none is least if one is not a number
}
#elif SEMID_ISA == 1
inline int32_t nearest_word(const float* point, const float* words, int32_t width) {
  __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
  for (int32_t w = 0; w < width; w++) {
    const __m256 x = _mm256_set1_ps(point[w]);
    const __m256 a = _mm256_sub_ps(x, _mm256_loadu_ps(words + w * 16));
    const __m256 b = _mm256_sub_ps(x, _mm256_loadu_ps(words + w * 16 + 8));
    low = _mm256_fmadd_ps(a, a, low);
    high = _mm256_fmadd_ps(b, b, high);
  }
  __m256 least = _mm256_min_ps(low, high);
  least = _mm256_min_ps(least, _mm256_permute2f128_ps(least, least, 1));
  least = _mm256_min_ps(least, _mm256_permute_ps(least, 0x4E));
  least = _mm256_min_ps(least, _mm256_permute_ps(least, 0xB1));
  const int below = _mm256_movemask_ps(_mm256_cmp_ps(low, least, _CMP_EQ_OQ));
  const int above = _mm256_movemask_ps(_mm256_cmp_ps(high, least, _CMP_EQ_OQ));
  const uint32_t nearest = static_cast<uint32_t>(below | above << 8);
  return nearest ? __builtin_ctz(nearest) : 0;  // none is least if one is not a number
}
#else
inline int32_t nearest_word(const float* point, const float* words, int32_t width) {
  float distances[16] = {0};
  for (int32_t w = 0; w < width; w++) {
    for (int32_t c = 0; c < 16; c++) {
      const float away = point[w] - words[w * 16 + c];
      distances[c] += away * away;
    }
  }
  int32_t nearest = 0;
  for (int32_t c = 1; c < 16; c++) nearest = distances[c] < distances[nearest] ? c : nearest;
  return nearest;
}
#endif

void train(const Training& from, int64_t first, int64_t last) {
  const int32_t width = from.width;
  Buffer<double> room;
  double* sums = room.room(static_cast<size_t>(width) * 16);
  for (int64_t part = first; part < last; part++) {
    float* words = from.codebooks + part * width * 16;
    for (int32_t iteration = 0; iteration < from.iterations; iteration++) {
      int64_t sizes[16] = {0};
      for (int32_t i = 0; i < width * 16; i++) sums[i] = 0;
      for (int64_t i = 0; i < from.items; i++) {
        const float* point = from.points + (i * from.parts + part) * width;
        const int32_t word = nearest_word(point, words, width);
        sizes[word]++;
        for (int32_t w = 0; w < width; w++) sums[w * 16 + word] += static_cast<double>(point[w]);
      }
      for (int32_t i = 0; i < width * 16; i++)
        if (sizes[i % 16]) words[i] = static_cast<float>(sums[i] / static_cast<double>(sizes[i % 16]));
    }
  }
}

void encode(const Encoding& from, int64_t first, int64_t last) {
  const int32_t width = from.width, all = from.parts * width, bytes = (from.parts + 1) / 2;
  Buffer<float> room;
  float* decoded = room.room(2 * static_cast<size_t>(all));
  float* left = decoded + all;
  for (int64_t i = first; i < last; i++) {
    const float* rotated = from.rotated + i * all;
    for (int32_t d = 0; d < all; d++) decoded[d] = -from.centre[d];
    for (int32_t l = 0; l < from.levels; l++) {
      const float* word = from.words + static_cast<int64_t>(from.columns[i * from.levels + l]) * all;
      for (int32_t d = 0; d < all; d++) decoded[d] += word[d];
    }
    float constant = from.lengths[i];
    for (int32_t d = 0; d < all; d++) {
      left[d] = rotated[d] - decoded[d];
      constant += decoded[d] * decoded[d] + left[d] * left[d] - rotated[d] * rotated[d];
    }
    uint8_t* codes = from.codes + i * bytes;
    std::memset(codes, 0, static_cast<size_t>(bytes));
    for (int32_t p = 0; p < from.parts; p++) {
      const float* words = from.codebooks + static_cast<int64_t>(p) * width * 16;
      const float* mine = left + p * width;
      const int32_t code = nearest_word(mine, words, width);
      codes[p / 2] |= static_cast<uint8_t>(code << 4 * (p & 1));
      for (int32_t w = 0; w < width; w++) {
        const float word = words[w * 16 + code];
        constant += 2 * word * (decoded[p * width + w] - mine[w] + word);
      }
    }
    from.scalars[i] = constant;
  }
}

}  // namespace

#if SEMID_ISA == 2
const Kernel kernel_avx512 = {search, encode, train, multiply};
#elif SEMID_ISA == 1
const Kernel kernel_avx2 = {search, encode, train, multiply};
#else
const Kernel kernel_plain = {search, encode, train, multiply};
#endif

}  // namespace semid
