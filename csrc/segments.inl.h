// Rows that share a span of ranks: consecutive rows of x whose adapter is the same.
#include <vector>

#include "dropout.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

// Rows [row, row + rows) have the ranks [rank, rank + r); `span` counts the different spans of a call.
struct Segment {
  int64_t row, rows, rank, r;
  int span;
};

struct Row {
  int64_t index;
};

struct Segments {
  std::vector<Segment> rows;   // in order, all rows of the call
  std::vector<Segment> spans;  // one per different span: its rows are order[row] .. order[row + rows - 1]
  std::vector<Row> order;      // rows by span, ascending within one; empty: as they lie

  Segments(const fastlora_lora& lora, int64_t m) {
    if (!lora.spans) {
      rows = spans = {{0, m, 0, lora.r, 0}};
      return;
    }
    for (int64_t i = 0; i < m; ++i) {
      const int64_t first = lora.spans[2 * i], last = lora.spans[2 * i + 1];
      if (rows.empty() || rows.back().rank != first || rows.back().rank + rows.back().r != last)
        rows.push_back({i, 0, first, last - first, find(first, last - first)});
      ++rows.back().rows;
    }
    sort(m);
  }

  // The i-th row of a span.
  int64_t at(const Segment& span, int64_t i) const { return order.empty() ? span.row + i : order[span.row + i].index; }

 private:
  void sort(int64_t m) {
    for (const Segment& g : rows) spans[g.span].rows += g.rows;
    int64_t next = 0;
    for (Segment& s : spans) {
      s.row = next;
      next += s.rows;
      s.rows = 0;
    }
    order.resize(m);
    for (const Segment& g : rows) {
      Segment& s = spans[g.span];
      for (int64_t i = 0; i < g.rows; ++i) order[s.row + s.rows++] = {g.row + i};
    }
  }

  int find(int64_t rank, int64_t r) {
    for (const Segment& s : spans)
      if (s.rank == rank && s.r == r) return s.span;
    spans.push_back({0, 0, rank, r, static_cast<int>(spans.size())});
    return spans.back().span;
  }
};

}  // namespace FASTLORA_ISA
}  // namespace fastlora
