// Rows by the span of ranks that they have: the rows of one adapter lie one behind the other in `order`.
#include <vector>

#include "dropout.inl.h"

namespace fastlora {
namespace FASTLORA_ISA {

// The rows at positions [first, first + count) have the ranks [rank, rank + r). `id` counts the different spans.
struct Span {
  int64_t first, count, rank, r;
  int id;
};

struct Row {
  int64_t index;
};

struct Rows {
  int64_t m;
  std::vector<Span> spans;
  std::vector<Row> order;  // rows by span, ascending within one; empty: as they lie

  Rows(const fastlora_lora& lora, int64_t rows) : m(rows) {
    if (!lora.spans) {
      spans = {{0, m, 0, lora.r, 0}};
      return;
    }
    std::vector<Row> ids(m);
    for (int64_t i = 0; i < m; ++i) {
      ids[i].index = find(lora.spans[2 * i], lora.spans[2 * i + 1] - lora.spans[2 * i]);
      ++spans[ids[i].index].count;
    }
    int64_t next = 0;
    for (Span& s : spans) {
      s.first = next;
      next += s.count;
      s.count = 0;
    }
    order.resize(m);
    for (int64_t i = 0; i < m; ++i) {
      Span& s = spans[ids[i].index];
      order[s.first + s.count++] = {i};
    }
  }

  // The row at a position.
  int64_t at(int64_t position) const { return order.empty() ? position : order[position].index; }
  // Whether the rows at `count` positions lie one behind the other.
  bool adjoin(int64_t position, int64_t count) const { return at(position + count - 1) - at(position) == count - 1; }

 private:
  int last = 0;  // most rows have the span of the row before

  int find(int64_t rank, int64_t r) {
    if (!spans.empty() && spans[last].rank == rank && spans[last].r == r) return last;
    for (const Span& s : spans)
      if (s.rank == rank && s.r == r) return last = s.id;
    spans.push_back({0, 0, rank, r, static_cast<int>(spans.size())});
    return last = spans.back().id;
  }
};

}  // namespace FASTLORA_ISA
}  // namespace fastlora
