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

#include "scan.h"

#if SEMID_ISA > 0
#include <immintrin.h>
#endif

namespace semid {
namespace {

// -- memory and selection ---------------------------------------------------------------------------------------------

template <typename T>
struct Buffer {  // grows, never shrinks, aligned for any register
  T* data = nullptr;
  size_t capacity = 0;
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  T* room(size_t count) {
    if (count > capacity) {
      size_t grown = count + count / 2 + 64;
      void* moved = nullptr;
      if (posix_memalign(&moved, 64, grown * sizeof(T))) std::abort();
      if (capacity) std::memcpy(moved, static_cast<void*>(data), capacity * sizeof(T));
      std::free(data);
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
  Buffer<Found> buffer;
  size_t count = 0, keep = 0, limit = 0;
  int64_t threshold = INT64_MAX;  // only sums below it are wanted

  void start(size_t wanted) {
    keep = wanted;
    limit = 2 * wanted + 64;
    count = 0;
    threshold = INT64_MAX;
    buffer.room(limit + kBlock);
  }
  void add(uint32_t sum, uint32_t position) { buffer.data[count++] = {static_cast<uint64_t>(sum) << 32 | position}; }
  void shrink() {
    if (count <= keep) return;
    std::nth_element(buffer.data, buffer.data + keep, buffer.data + count, Less{});
    Found worst = *std::max_element(buffer.data, buffer.data + keep, Less{});
    count = keep;
    threshold = static_cast<int64_t>(worst.value >> 32) + 1;  // an equal sum may still win by position
  }
};

struct Scratch {
  Buffer<float> scores, firsts, tables, partial;
  Buffer<Scored> leaves, sorted, hits;
  Buffer<uint8_t> lut, wide_lut, heads;
  Best best;
};

// -- leaves -----------------------------------------------------------------------------------------------------------

// Leaves that share their first word are neighbours; nearly all have a second word, few a third.
void score_leaves(const Index& index, const float* products, Scratch& scratch) {
  const int32_t n = index.leaves;
  float* scores = scratch.scores.room(n + 16);
  float* seconds = scratch.partial.room(index.second_count + 64);
  for (int32_t w = 0; w < index.second_count; w++) seconds[w] = products[index.second_columns[w]];
  // What the leaves of a group share is written past its end, where the next group overwrites it
  float* firsts = scratch.firsts.room(n + 32);
  for (int32_t g = 0; g < index.group_count; g++) {
    const float product = products[index.groups[g].column];
    const int32_t end = index.groups[g + 1].start;
#if SEMID_ISA == 2
    for (int32_t j = index.groups[g].start; j < end; j += 16) _mm512_storeu_ps(firsts + j, _mm512_set1_ps(product));
#else
    for (int32_t j = index.groups[g].start; j < end; j++) firsts[j] = product;
#endif
  }
  int32_t i = 0;
#if SEMID_ISA == 2
  if (index.second_count <= 512) {
    const int32_t pairs = (index.second_count + 31) / 32;
    for (; i < n; i += 16) {  // the arrays are padded to whole registers
      const __m512i word = _mm512_cvtepu16_epi32(_mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(index.second_words + i)));
      __m512 found = _mm512_permutex2var_ps(_mm512_load_ps(seconds), word, _mm512_load_ps(seconds + 16));
      for (int32_t p = 1; p < pairs; p++) {
        const __m512 other =
            _mm512_permutex2var_ps(_mm512_load_ps(seconds + 32 * p), word, _mm512_load_ps(seconds + 32 * p + 16));
        found = _mm512_mask_mov_ps(found, _mm512_cmpge_epi32_mask(word, _mm512_set1_epi32(32 * p)), other);
      }
      const __m512 rest = _mm512_add_ps(_mm512_load_ps(firsts + i), _mm512_loadu_ps(index.leaf_constants + i));
      _mm512_store_ps(scores + i, _mm512_add_ps(found, rest));
    }
  }
#endif
  for (; i < n; i++) scores[i] = firsts[i] + index.leaf_constants[i] + seconds[index.second_words[i]];
  for (int32_t t = 0; t < index.further_count; t++) scores[index.further[t].start] += products[index.further[t].column];
}

// All leaves that count with a score of at most `limit`, in order; how many items they hold.
int64_t leaves_within(const Index& index, const int32_t* counts, const float* scores, float limit, Buffer<Scored>& found, size_t& count) {
  Scored* out = found.room(index.leaves + 16);
  size_t filled = 0;
  int64_t items = 0;
  int32_t i = 0;
#if SEMID_ISA == 2
  const __m512 bound = _mm512_set1_ps(limit);
  for (; i + 16 <= index.leaves; i += 16) {
    uint32_t inside = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + i), bound, _CMP_LE_OQ);
    for (; inside; inside &= inside - 1) {
      const int32_t leaf = i + __builtin_ctz(inside);
      out[filled] = {scores[leaf], leaf};
      items += counts[leaf];
      filled += counts[leaf] > 0;
    }
  }
#endif
  for (; i < index.leaves; i++) {
    if (scores[i] > limit || !counts[i]) continue;
    out[filled++] = {scores[i], i};
    items += counts[i];
  }
  count = filled;
  return items;
}

constexpr size_t kFirst = 8;  // leaves to scan before all others, so that the threshold of the scan falls quickly

// The leaves to open: the best until they hold `goal` items and are `least` many. The very best come first, the others
// in the order of memory. Returns how many items they hold.
int64_t choose_leaves(const Index& index, const int32_t* counts, int64_t goal, int64_t least, Scratch& scratch, size_t& count) {
  const int32_t n = index.leaves;
  const float* scores = scratch.scores.data;
  goal = std::min(goal, index.items);
  least = std::min<int64_t>(std::max<int64_t>(least, 1), n);
  // 1. A limit that lets a little more than enough through, from a sample of the scores
  const double share = std::max(static_cast<double>(goal) / index.items, static_cast<double>(least) / n);
  constexpr int32_t kSample = 256;
  int64_t items = 0;
  if (n > kSample && share < 0.5) {
    float sample[kSample];
    for (int32_t i = 0; i < kSample; i++) sample[i] = scores[static_cast<int64_t>(n) * i / kSample];
    double rank = 1.25 * share * kSample + 3;
    for (int32_t tries = 0;; tries++) {
      float limit = INFINITY;
      if (rank < kSample && tries < 4) {
        std::nth_element(sample, sample + static_cast<int32_t>(rank), sample + kSample, Less{});
        limit = sample[static_cast<int32_t>(rank)];
      }
      items = leaves_within(index, counts, scores, limit, scratch.leaves, count);
      if (limit == INFINITY || (items >= goal && static_cast<int64_t>(count) >= least)) break;
      rank = 2 * rank + 4;
    }
  } else {
    items = leaves_within(index, counts, scores, INFINITY, scratch.leaves, count);
  }
  // 2. Cut the range of their scores into slices, and find the one with the last leaf that is needed: no comparisons
  const Scored* leaves = scratch.leaves.data;
  Scored* chosen = scratch.sorted.room(count + kFirst + 1);
  if (!count) return 0;
  float least_score = leaves[0].score, most = leaves[0].score;
  for (size_t i = 1; i < count; i++) {
    least_score = leaves[i].score < least_score ? leaves[i].score : least_score;
    most = leaves[i].score > most ? leaves[i].score : most;
  }
  constexpr int32_t kSlices = 128;
  const float scale = most > least_score ? (kSlices - 1) / (most - least_score) : 0;
  auto slice_of = [&](const Scored& leaf) {
    const float place = (leaf.score - least_score) * scale;
    return place > 0 ? static_cast<int32_t>(std::min(place, kSlices - 1.0f)) : 0;
  };
  int64_t held_by[kSlices] = {0};
  int32_t size_of[kSlices] = {0};
  for (size_t i = 0; i < count; i++) {
    const int32_t slice = slice_of(leaves[i]);
    held_by[slice] += counts[leaves[i].number];
    size_of[slice]++;
  }
  int64_t held = 0, number = 0;
  int32_t cut = 0;
  while (cut < kSlices - 1 && (held + held_by[cut] < goal || number + size_of[cut] < least)) {
    held += held_by[cut];
    number += size_of[cut++];
  }
  size_t inside = 0;
  for (size_t i = 0; i < count; i++) {
    chosen[inside] = leaves[i];
    inside += slice_of(leaves[i]) == cut;
  }
  std::sort(chosen, chosen + inside, Less{});
  size_t needed = 0;
  while (needed < inside && (held < goal || number < least)) {
    held += counts[chosen[needed++].number];
    number++;
  }
  const Scored last = needed ? chosen[needed - 1] : Scored{-INFINITY, 0};
  // 3. The very best of these first
  const size_t first = std::min(kFirst, static_cast<size_t>(number));
  int32_t first_cut = 0;
  for (size_t sum = 0; first_cut < cut; first_cut++)
    if ((sum += static_cast<size_t>(size_of[first_cut])) >= first) break;
  inside = 0;
  for (size_t i = 0; i < count; i++) {
    chosen[inside] = leaves[i];
    inside += slice_of(leaves[i]) <= first_cut;
  }
  std::sort(chosen, chosen + inside, Less{});
  const Scored near = chosen[first - 1];
  size_t filled = first;
  for (size_t i = 0; i < count; i++) {
    const int32_t slice = slice_of(leaves[i]);
    const bool wanted = slice < cut || (slice == cut && !(last < leaves[i]));
    chosen[filled] = leaves[i];
    filled += wanted && near < leaves[i];
  }
  count = filled;
  return held;
}

// -- tables -----------------------------------------------------------------------------------------------------------

struct Tables {
  float unit;         // what one step of the sums is worth
  float low;          // the sum of the least entries of all tables
  uint16_t multiplier;  // of scalars, times 2^-16
  const uint8_t* lut;   // (parts padded, 16)
  const uint8_t* wide;  // the same as whole registers, for AVX-512
  const uint8_t* heads;  // (heads, 256)
};

Tables make_tables(const Index& index, const float* rotated, const float* products, Scratch& scratch) {
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
    float least = head[0], most = head[0];
    for (int32_t c = 1; c < index.head_sizes[h]; c++) {
      least = head[c] < least ? head[c] : least;
      most = head[c] > most ? head[c] : most;
    }
    lows[index.parts + h] = least;
    low += least;
    unit = std::max(unit, (most - least) / 255);
  }
  unit = std::max(unit, index.scalar_step * 65535 / 32768);  // scalars must leave room in 16 bits
  if (!(unit > 0)) unit = 1;
  const float inverse = 1 / unit;

  uint8_t* lut = scratch.lut.room(static_cast<size_t>(index.rows) * 32);
  for (int32_t p = 0; p < index.parts; p++)
    for (int32_t c = 0; c < 16; c++)
      lut[p * 16 + c] = static_cast<uint8_t>((tables[p * 16 + c] - lows[p]) * inverse + 0.5f);
  std::memset(lut + index.parts * 16, 0, static_cast<size_t>(2 * index.rows - index.parts) * 16);
  uint8_t* wide = nullptr;
#if SEMID_ISA == 2
  wide = scratch.wide_lut.room(static_cast<size_t>(index.rows) * 64);
  for (int32_t r = 0; r < index.rows; r += 2) {  // low nibbles of both rows, then high ones; each table twice
    for (int32_t lane = 0; lane < 8; lane++) {
      const int32_t part = 2 * (r + (lane % 4) / 2) + lane / 4;
      std::memcpy(wide + r * 64 + lane * 16, lut + part * 16, 16);
    }
  }
#endif
  uint8_t* heads = scratch.heads.room(static_cast<size_t>(index.heads) * 256);
  for (int32_t h = 0; h < index.heads; h++) {
    const float* head = products + index.head_columns[h];
    const float least = lows[index.parts + h];
    const int32_t size = index.head_sizes[h];
    for (int32_t c = 0; c < size; c++) heads[h * 256 + c] = static_cast<uint8_t>((head[c] - least) * inverse + 0.5f);
    std::memset(heads + h * 256 + size, 0, 256 - size);
  }
  const float scaled = index.scalar_step * inverse * 65536;
  return {unit, low, static_cast<uint16_t>(std::min(scaled + 0.5f, 65535.0f)), lut, wide, heads};
}

// -- scan -------------------------------------------------------------------------------------------------------------

// The sums of one block, those of even items first; each fits 16 bits, or is cut off there.
#if SEMID_ISA == 2

struct HeadTables {  // registers with the table of a level
  __m512i a, b, c, d;
};

inline __m512i look_up(const HeadTables& t, int32_t size, __m512i codes) {
  if (size <= 64) return _mm512_permutexvar_epi8(codes, t.a);
  const __m512i lower = _mm512_permutex2var_epi8(t.a, codes, t.b);
  if (size <= 128) return lower;
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), lower, _mm512_permutex2var_epi8(t.c, codes, t.d));
}

inline __m512i sum_block(const Index& index, const Tables& tables, const uint8_t* block) {
  const __m512i nibble = _mm512_set1_epi8(15), byte = _mm512_set1_epi16(255);
  __m512i sums = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
  const uint8_t* lut = tables.wide;
  for (int32_t r = 0; r < index.rows; r += 2, lut += 128) {
    const __m512i codes = _mm512_loadu_si512(block + r * kBlock);
    const __m512i low = _mm512_shuffle_epi8(_mm512_load_si512(lut), _mm512_and_si512(codes, nibble));
    const __m512i high =
        _mm512_shuffle_epi8(_mm512_load_si512(lut + 64), _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble));
    const __m512i both = _mm512_add_epi8(low, high);
    sums = _mm512_add_epi16(sums, both);  // of even items, with those of odd items in the upper byte
    odd = _mm512_add_epi16(odd, _mm512_srli_epi16(both, 8));
  }
  sums = _mm512_sub_epi16(sums, _mm512_slli_epi16(odd, 8));
  const __m256i even_items = _mm256_add_epi16(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
  const __m256i odd_items = _mm256_add_epi16(_mm512_castsi512_si256(odd), _mm512_extracti64x4_epi64(odd, 1));
  __m512i total = _mm512_inserti64x4(_mm512_castsi256_si512(even_items), odd_items, 1);
  const uint8_t* codes = block + index.rows * kBlock;
  for (int32_t h = 0; h < index.heads; h++, codes += kBlock) {
    const uint8_t* table = tables.heads + h * 256;
    const HeadTables loaded{_mm512_load_si512(table), _mm512_load_si512(table + 64), _mm512_load_si512(table + 128),
                            _mm512_load_si512(table + 192)};
    const __m512i packed = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m256i found = _mm512_castsi512_si256(look_up(loaded, index.head_sizes[h], packed));
    const __m256i evens = _mm256_and_si256(found, _mm512_castsi512_si256(byte));
    total = _mm512_add_epi16(total, _mm512_inserti64x4(_mm512_castsi256_si512(evens), _mm256_srli_epi16(found, 8), 1));
  }
  const __m512i scalars = _mm512_mulhi_epu16(_mm512_loadu_si512(codes), _mm512_set1_epi16(tables.multiplier));
  return _mm512_adds_epu16(total, scalars);
}

#else

void sum_block(const Index& index, const Tables& tables, const uint8_t* block, uint16_t* total) {
#if SEMID_ISA == 1
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i even = _mm256_setzero_si256(), odd = _mm256_setzero_si256();
  for (int32_t r = 0; r < index.rows; r++) {
    const __m128i* lut = reinterpret_cast<const __m128i*>(tables.lut + r * 32);
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + r * kBlock));
    const __m256i low =
        _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(lut)), _mm256_and_si256(codes, nibble));
    const __m256i high = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(lut + 1)),
                                             _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble));
    const __m256i both = _mm256_add_epi8(low, high);
    even = _mm256_add_epi16(even, both);
    odd = _mm256_add_epi16(odd, _mm256_srli_epi16(both, 8));
  }
  even = _mm256_sub_epi16(even, _mm256_slli_epi16(odd, 8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(total), even);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(total + 16), odd);
#else
  std::memset(total, 0, 2 * kBlock);
  for (int32_t r = 0; r < index.rows; r++) {
    const uint8_t *low = tables.lut + r * 32, *high = low + 16, *codes = block + r * kBlock;
    for (int32_t j = 0; j < kBlock; j++)
      total[(j & 1) * 16 + j / 2] += static_cast<uint16_t>(low[codes[j] & 15] + high[codes[j] >> 4]);
  }
#endif
  const uint8_t* codes = block + index.rows * kBlock;
  for (int32_t h = 0; h < index.heads; h++, codes += kBlock) {
    const uint8_t* table = tables.heads + h * 256;
    for (int32_t j = 0; j < 16; j++) {
      total[j] += table[codes[2 * j]];
      total[16 + j] += table[codes[2 * j + 1]];
    }
  }
#if SEMID_ISA == 1
  const __m256i multiplier = _mm256_set1_epi16(static_cast<int16_t>(tables.multiplier));
  for (int32_t half = 0; half < 2; half++) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + half);
    __m256i* sums = reinterpret_cast<__m256i*>(total) + half;
    _mm256_storeu_si256(sums, _mm256_adds_epu16(_mm256_loadu_si256(sums), _mm256_mulhi_epu16(raw, multiplier)));
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

#endif

// Which of the sums are of the first so many items.
inline uint32_t valid_items(int32_t items) {
  if (items >= kBlock) return 0xFFFFFFFFu;
  const uint32_t even = (1u << ((items + 1) / 2)) - 1, odd = (1u << (items / 2)) - 1;
  return even | odd << 16;
}

inline void prefetch(const void* data, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(data) + b);
}

// `ahead`: the run that comes next, read from memory while this one is scanned, block by block.
void scan_run(const Index& index, const Tables& tables, const Run& run, uint32_t base, const uint8_t* allowed,
              const Run& ahead, Best& best) {
  const uint8_t* block = index.blocks + run.offset;
  const uint8_t* next = index.blocks + ahead.offset;
  const int64_t stride = index.block_stride();
  for (int32_t done = 0; done < run.items; done += kBlock, block += stride, next += stride) {
    if (done < ahead.items) prefetch(next, stride);
    const int64_t left = best.threshold - base;
    if (left <= 0) return;
    alignas(64) uint16_t sums[kBlock];
    uint32_t near = valid_items(run.items - done);
#if SEMID_ISA == 2
    const __m512i total = sum_block(index, tables, block);
    if (left <= 65535) near &= _mm512_cmplt_epu16_mask(total, _mm512_set1_epi16(static_cast<int16_t>(left)));
    if (!near) continue;
    _mm512_store_si512(sums, total);
#else
    sum_block(index, tables, block, sums);
    if (left <= 65535) {
#if SEMID_ISA == 1
      // unsigned a < b as: not max(a, b) == a
      const __m256i bound = _mm256_set1_epi16(static_cast<int16_t>(left));
      const __m256i* all = reinterpret_cast<const __m256i*>(sums);
      const __m256i even = _mm256_load_si256(all), odd = _mm256_load_si256(all + 1);
      const __m256i packed = _mm256_permute4x64_epi64(
          _mm256_packs_epi16(_mm256_cmpeq_epi16(_mm256_max_epu16(even, bound), even),
                             _mm256_cmpeq_epi16(_mm256_max_epu16(odd, bound), odd)),
          0xD8);
      near &= ~static_cast<uint32_t>(_mm256_movemask_epi8(packed));
#else
      uint32_t below = 0;
      for (int32_t j = 0; j < kBlock; j++) below |= static_cast<uint32_t>(sums[j] < left) << j;
      near &= below;
#endif
    }
#endif
    for (; near; near &= near - 1) {
      const int32_t j = __builtin_ctz(near);
      const int32_t item = j < 16 ? 2 * j : 2 * j - 31;
      const int64_t position = run.position + done + item;
      if (!allowed || allowed[position]) best.add(base + sums[j], static_cast<uint32_t>(position));
    }
    if (best.count >= best.limit) best.shrink();
  }
}

// Scans some leaves, the first ones first; best.buffer then holds the best items, unordered.
void scan_leaves(const Index& index, const Tables& tables, const float* products, const Scored* leaves, size_t count,
                 const uint8_t* allowed, Best& best, float& lowest) {
  // Sums become unsigned by counting from the least that any item in these leaves can have
  float least = INFINITY;
  for (size_t i = 0; i < count; i++) {
    for (int32_t r = index.leaf_runs[leaves[i].number]; r < index.leaf_runs[leaves[i].number + 1]; r++) {
      const Run& run = index.runs[r];
      least = std::min(least, run.constant + (run.word < 0 ? 0 : products[run.word]));
    }
  }
  lowest = least;
  const float inverse = 1 / tables.unit;
  for (size_t i = 0; i < count; i++) {
    const int32_t leaf = leaves[i].number;
    const int32_t last = index.leaf_runs[leaf + 1] - 1;
    const int32_t next_leaf = i + 1 < count ? index.leaf_runs[leaves[i + 1].number] : last;
    for (int32_t r = index.leaf_runs[leaf]; r < index.leaf_runs[leaf + 1]; r++) {
      const Run& run = index.runs[r];
      const float base = (run.constant + (run.word < 0 ? 0 : products[run.word]) - least) * inverse;
      scan_run(index, tables, run, base < 4e9f ? static_cast<uint32_t>(base) : 4000000000u, allowed,
               index.runs[r < last ? r + 1 : next_leaf], best);
    }
  }
  best.shrink();
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
size_t rerank(const Index& index, const float* query, Scratch& scratch) {
  const T* rows = static_cast<const T*>(index.vectors);
  const Best& best = scratch.best;
  Scored* hits = scratch.hits.room(best.count);
  const int64_t bytes = static_cast<int64_t>(index.dim) * sizeof(T);
  constexpr size_t kAhead = 6;
  for (size_t i = 0; i < std::min(kAhead, best.count); i++)
    prefetch(rows + (best.buffer.data[i].value & 0xFFFFFFFF) * index.dim, bytes);
  for (size_t i = 0; i < best.count; i++) {
    if (i + kAhead < best.count)
      prefetch(rows + (best.buffer.data[i + kAhead].value & 0xFFFFFFFF) * index.dim, bytes);
    const int64_t position = static_cast<int64_t>(best.buffer.data[i].value & 0xFFFFFFFF);
    hits[i] = {distance(index, query, rows, position), static_cast<int32_t>(position)};
  }
  return best.count;
}

// -- the whole --------------------------------------------------------------------------------------------------------

void search(const Index& index, const Request& request, int64_t first, int64_t last, double* seconds) {
  Scratch scratch;
  const int64_t width = request.k ? request.k : request.keep;
  const int32_t* counts = request.counts ? request.counts : index.leaf_sizes;
  for (int64_t q = first; q < last; q++) {
    const double started = now();
    const float* products = request.products + q * request.columns;
    int64_t* positions = request.positions + q * width;
    float* distances = request.distances + q * width;
    size_t count = 0;
    int64_t items = 0;
    if (request.given) {
      Scored* leaves = scratch.sorted.room(request.given_width);
      for (int64_t i = 0; i < request.given_width; i++) {
        const int64_t leaf = request.given[q * request.given_width + i];
        if (leaf < 0) continue;
        leaves[count++] = {static_cast<float>(count), static_cast<int32_t>(leaf)};
        items += counts[leaf];
      }
    } else {
      score_leaves(index, products, scratch);
      items = choose_leaves(index, counts, request.goal, request.least_leaves, scratch, count);
      if (request.shown) {
        Scored* leaves = scratch.sorted.data;
        std::sort(leaves, leaves + count, Less{});
        for (int64_t i = 0; i < request.shown; i++) {
          const bool there = i < static_cast<int64_t>(count);
          request.shown_leaves[q * request.shown + i] = there ? leaves[i].number : -1;
          request.shown_scores[q * request.shown + i] = there ? leaves[i].score : INFINITY;
        }
      }
    }
    request.candidates[q] = items;
    request.opened[q] = static_cast<int64_t>(count);
    const double routed = now();

    const Tables tables = make_tables(index, request.rotated + q * index.parts * index.width, products, scratch);
    scratch.best.start(static_cast<size_t>(request.keep));
    float lowest = 0;
    scan_leaves(index, tables, products, scratch.sorted.data, count, request.allowed, scratch.best,
                lowest);
    const double scanned = now();

    int64_t filled = 0;
    if (request.k) {
      const size_t found = index.dtype == kFloat32   ? rerank<float>(index, request.vectors + q * index.dim, scratch)
                           : index.dtype == kFloat16 ? rerank<uint16_t>(index, request.vectors + q * index.dim, scratch)
                                                     : rerank<int8_t>(index, request.vectors + q * index.dim, scratch);
      filled = std::min<int64_t>(request.k, static_cast<int64_t>(found));
      Scored* hits = scratch.hits.data;
      std::partial_sort(hits, hits + filled, hits + found, Less{});
      for (int64_t i = 0; i < filled; i++) {
        positions[i] = hits[i].number;
        distances[i] = hits[i].score;
      }
    } else {
      const Best& best = scratch.best;
      std::sort(best.buffer.data, best.buffer.data + best.count, Less{});
      filled = static_cast<int64_t>(best.count);
      for (int64_t i = 0; i < filled; i++) {
        const uint64_t value = best.buffer.data[i].value;
        positions[i] = static_cast<int64_t>(value & 0xFFFFFFFF);
        distances[i] = lowest + tables.low + index.scalar_low + tables.unit * static_cast<float>(value >> 32);
      }
    }
    for (int64_t i = filled; i < width; i++) {
      positions[i] = -1;
      distances[i] = INFINITY;
    }
    seconds[0] += routed - started;
    seconds[1] += scanned - routed;
    seconds[2] += now() - scanned;
  }
}

// -- encoding ---------------------------------------------------------------------------------------------------------

// The nearest of 16 words (width, 16).
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
const Kernel kernel_avx512 = {search, encode, train};
#elif SEMID_ISA == 1
const Kernel kernel_avx2 = {search, encode, train};
#else
const Kernel kernel_plain = {search, encode, train};
#endif

}  // namespace semid
