// How cpu.cpp walks over fragments of tensors: its tables, and the lines that share row and column statistics.
#pragma once
#include <cstdint>

namespace {

enum Kind : int64_t { WHOLE = 0, ROW_CONSTANT = 1, ROW_VARIES = 2 };

// One line of the fragment table. A "line" is a run along the last dimension of the tensor.
struct Fragment {
  int64_t kind;     // WHOLE: second moment kept in full; ROW_CONSTANT: a line has one row statistic;
                    // ROW_VARIES: a line runs along rows and columns at once (a batch dimension is last)
  int64_t tensor;   // index of its numbers in arrays by tensor
  int64_t offset;   // first element, in the flattened tensor
  int64_t length;
  int64_t line;     // elements of a line
  int64_t col_extent, col_inner;  // lines: [outer, col_extent (summed over for column sums), col_inner]
  int64_t row_extent, row_inner;  // ROW_VARIES: the same for row sums
  int64_t row_start, col_start;   // where its statistics begin in the flat arrays
  int64_t row_count, col_count;
  int64_t mean_extent, mean_inner;  // row statistics: [outer, mean_extent (averaged over), mean_inner]
};

struct Chunk {
  int64_t fragment, begin, end;  // elements [begin, end) of the fragment
  int64_t partial;               // where its column sums go in `partials`; -1: straight into the result
};

// Chunks [first_chunk, last_chunk) hold partial sums of `columns` column statistics from `start` on.
struct Group {
  int64_t first_chunk, last_chunk, start, columns;
};

constexpr int64_t BLOCK = 4096;  // elements summed in fp32 before they are added in fp64

struct Line {  // elements [from, from + count) of the fragment, all in one line and at most BLOCK
  int64_t from, count, row, column, inside;  // inside: index of `column` within the chunk's partial sums
};

template <class F>
void for_each_block(int64_t begin, int64_t end, F&& body) {
  for (int64_t at = begin; at < end; at += BLOCK) body(at, end - at < BLOCK ? end - at : BLOCK);
}

// One core that reads one stream waits for memory half of the time (12 GB/s of 23 measured); so the loops below read
// several places at once: the quarters of a block, g and θ together, and full lines four at a time.
constexpr int64_t LINES = 4;

// Σx², in fp32 within a block.
double sum_of_squares(const float* x, int64_t count) {
  double total = 0;
  for_each_block(0, count, [&](int64_t at, int64_t n) {
    const int64_t quarter = n / 4;
    const float *x0 = x + at, *x1 = x0 + quarter, *x2 = x1 + quarter, *x3 = x2 + quarter;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < quarter; ++k) sum += (x0[k] * x0[k] + x1[k] * x1[k]) + (x2[k] * x2[k] + x3[k] * x3[k]);
    for (int64_t k = 4 * quarter; k < n; ++k) sum += x0[k] * x0[k];
    total += sum;
  });
  return total;
}

// Whether LINES full lines begin here that share their column statistics. (Not more than BLOCK elements a sum.)
inline bool lines_at_once(const Fragment& f, int64_t at, int64_t end) {
  const int64_t absolute = f.offset + at, index = absolute / f.line;
  return f.kind == ROW_CONSTANT && f.col_inner == 1 && f.line <= BLOCK && absolute % f.line == 0 &&
         at + LINES * f.line <= end && index % f.col_extent + LINES <= f.col_extent;
}

// Elements [begin, end) of a fragment: `lines` gets the first of LINES full lines, `body` one line or less.
template <class F, class G>
void for_each_line(const Fragment& f, int64_t begin, int64_t end, F&& body, G&& lines) {
  for (int64_t at = begin; at < end;) {
    const bool several = lines_at_once(f, at, end);
    const int64_t absolute = f.offset + at, index = absolute / f.line, k = absolute % f.line;
    const int64_t rest = f.line - k < end - at ? f.line - k : end - at, count = rest < BLOCK ? rest : BLOCK;
    const int64_t inside = index % f.col_inner * f.line + k;
    const int64_t slab = index / (f.col_extent * f.col_inner) * f.col_inner * f.line;
    const int64_t row = f.kind == ROW_CONSTANT
                            ? index
                            : (index / (f.row_extent * f.row_inner) * f.row_inner + index % f.row_inner) * f.line + k;
    const Line line{at, count, f.row_start + row, f.col_start + slab + inside, inside};
    several ? lines(line) : body(line);
    at += several ? LINES * f.line : count;
  }
}

// Σ over the chunks of every fragment, in order; sums is [chunks, columns], result [fragments, columns].
void add_up(const Chunk* chunks, int64_t count, int columns, const double* sums, double* result) {
  for (int64_t c = 0; c < count; ++c)
    for (int i = 0; i < columns; ++i) result[chunks[c].fragment * columns + i] += sums[c * columns + i];
}

inline float limited(float scale, float limit) { return scale < limit ? scale : limit; }

// Calls body(k, scale) for elements k of a line; scale is 1/√V there. One loop a kind, so that each vectorises.
#define OVER_LINE(f, l, row_factor, column_factor, limit, STATEMENTS)             \
  {                                                                               \
    const float* column = column_factor + l.column;                               \
    if (f.kind == ROW_CONSTANT) {                                                 \
      const float row = row_factor[l.row];                                        \
      _Pragma(SIMD) for (int64_t k = 0; k < l.count; ++k) {                       \
        const float scale = limited(row * column[k], limit);                      \
        STATEMENTS                                                                \
      }                                                                           \
    } else {                                                                      \
      const float* row = row_factor + l.row;                                      \
      _Pragma(SIMD) for (int64_t k = 0; k < l.count; ++k) {                       \
        const float scale = limited(row[k] * column[k], limit);                   \
        STATEMENTS                                                                \
      }                                                                           \
    }                                                                             \
  }

}  // namespace
