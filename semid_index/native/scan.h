// What the dispatcher (scan.cpp) and the kernels (kernel.cpp, compiled once per instruction set) share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace semid {

constexpr int kBlock = 64, kHalf = kBlock / 2;  // items per block: one register of bytes in AVX-512

enum Metric : int32_t { kL2 = 0, kCosine = 1, kInnerProduct = 2 };
enum Dtype : int32_t { kNone = 0, kFloat32 = 1, kFloat16 = 2, kInt8 = 3 };

// Consecutive items of one leaf whose first code is the same: their query-dependent sums share one constant. Blocks
// begin anew where the first code changes, and not where a leaf does, so that leaves side by side are scanned as one.
struct Run {
  uint32_t position;  // of its first item
  uint32_t slot;      // kBlock * block + place in it, of that item
  int32_t items;
  int32_t word;  // column of the products that holds its first codeword; -1 for none
};

struct Term {  // from this leaf on, or of this leaf, this column of the products
  int32_t start, column;
};

struct Index {
  int64_t items = 0;
  int32_t metric = kL2, dim = 0;

  // Leaves: score = constant + product of the group + that of the second word + those of further words
  int32_t leaves = 0;
  float* leaf_constants = nullptr;  // (leaves, padded)
  Term* groups = nullptr;           // where the leaves of a group start; one more at the end
  int32_t group_count = 0;
  float* group_lows = nullptr;      // (group_count) the least constant of a group's leaves
  int32_t* group_sizes = nullptr;   // (group_count) items
  int32_t* group_leaves = nullptr;  // (group_count) leaves
  uint16_t* second_words = nullptr;    // (leaves, padded) numbers of second_columns
  int32_t* second_columns = nullptr;   // (second_count)
  int32_t second_count = 0;
  Term* further = nullptr;             // (further_count) in the order of the leaves
  int32_t* group_further = nullptr;    // (group_count + 1) where those of each group start
  int32_t further_count = 0, further_terms = 0;  // at most so many for one leaf
  int32_t* leaf_sizes = nullptr;          // (leaves)
  int32_t* leaf_runs = nullptr;           // (leaves + 1) runs of each leaf

  Run* runs = nullptr;
  int64_t run_count = 0;
  const float* first_constants = nullptr;  // (columns) what items with a first word share of what no query changes

  // Blocks of kBlock items: rows of nibbles, rows of codes, scalars of 16 bits (those of even items first)
  uint8_t* blocks = nullptr;
  int64_t block_bytes = 0;  // of all
  int32_t rows = 0;         // bytes of 4-bit codes per item, an even number; two parts in each
  int32_t parts = 0, width = 0;
  int32_t heads = 0;                  // levels after the first, one byte each
  const int32_t* head_columns = nullptr;  // (heads) where the products of a level start
  const int32_t* head_sizes = nullptr;    // (heads) codewords
  const float* codebooks = nullptr;       // (parts, width, 16)
  float scalar_step = 0, scalar_low = 0;
  float factor = -2;  // of products, also in the tables of the parts

  int32_t dtype = kNone;
  const void* vectors = nullptr;
  const float* scale = nullptr;  // of int8 rows

  // What queries are multiplied with; matrices are packed as Multiplication wants them
  const float* centre = nullptr;    // (dim) subtracted from queries
  const float* rotation = nullptr;  // (dim, turned); null: queries are padded with zeros instead
  const float* words = nullptr;     // (turned, columns), times factor
  int32_t turned = 0, columns = 0;

  int64_t block_stride() const { return kBlock * static_cast<int64_t>(rows + heads) + 2 * kBlock; }
};

// A leaf that a query opened.
struct Opened {
  float score;
  int32_t leaf;
};

struct Request {
  int64_t queries;
  const float* vectors;  // (queries, dim)
  const float* lengths;  // (queries) that vectors are divided by; null: they are taken as they are
  int64_t goal;          // open leaves until they hold so many items,
  int64_t least_leaves;  // and until there are so many
  const int64_t* given;  // or open these: (queries, given_width), padded with -1
  int64_t given_width;
  const int32_t* counts;   // (leaves) items of a leaf that count towards the goal; null: all
  const uint8_t* allowed;  // (items) nonzero for those that may be found; null: all
  int64_t keep;            // best of the scan
  int64_t k;               // hits; 0: give back what the scan kept, by its own distances
  int64_t* positions;      // (queries, k or keep)
  float* distances;        // the same
  int64_t* candidates;     // (queries)
  int64_t* opened;         // (queries)
  Opened* leaves;          // (queries, leaves) those opened, in no order; null: not wanted. Not with `given`
  double* seconds;         // products and route, scan, rerank: of all threads together
  int32_t threads;
  int32_t isa;  // -1: the best; else 0 plain, 1 AVX2, 2 AVX-512
};

// Throws std::bad_alloc. It is in scan.cpp, for kernels must not contain functions of the standard library.
[[noreturn]] void out_of_memory();

// Queries that threads share among themselves: each takes some, until there are none left.
struct Tiles;
bool next_tile(Tiles& tiles, int64_t& first, int64_t& last);

// Items to be encoded: each is the sum of some words, and of what is left, which gets one 4-bit code per part.
struct Encoding {
  int64_t items;
  int32_t parts, width, levels;
  const float* rotated;     // (items, parts * width)
  const float* lengths;     // (items) squared lengths of the vectors before rotation, which may drop some of it
  const int32_t* columns;   // (items, levels) words of each item
  const float* words;       // (any, parts * width)
  const float* centre;      // (parts * width) subtracted from the sum of words
  const float* codebooks;   // (parts, width, 16)
  uint8_t* codes;           // (items, ceil(parts / 2))
  float* scalars;           // (items) |x'|^2 + |x - x'|^2, x' being what codes stand for
};

// Parts for which 16 codewords are learned, each by k-means.
struct Training {
  int64_t items;
  int32_t parts, width, iterations;
  const float* points;  // (items, parts * width)
  float* codebooks;     // (parts, width, 16): in, where to begin; out, what was learned
};

constexpr int kPanel = 32;  // columns of a matrix that lie side by side when it is packed

// A product of matrices, in the sums of which terms are added in order, whatever their number of rows.
struct Multiplication {
  int64_t count;
  int32_t dim;
  const float* rows;    // (count, dim)
  const float* packed;  // (ceil(columns / kPanel), dim, kPanel), padded with zeros
  int64_t columns;
  float* products;      // (count, columns)
};

struct Kernel {
  // Queries of a request, as long as there are tiles.
  void (*search)(const Index&, const Request&, Tiles&, double* seconds);
  // Items [first, last).
  void (*encode)(const Encoding&, int64_t first, int64_t last);
  // Parts [first, last).
  void (*train)(const Training&, int64_t first, int64_t last);
  void (*multiply)(const Multiplication&);
};

extern const Kernel kernel_plain;
#ifdef SEMID_X86
extern const Kernel kernel_avx2;
extern const Kernel kernel_avx512;
#endif

}  // namespace semid
