// Cuts the coded units around a box out of a JPEG, without decoding them: a smaller JPEG with the same coefficients.
//
// Huffman codes can only be read from the beginning, and reading them is most of what a region decoder does. Here the
// blocks in front of the box and beside it are passed over: a table lookup takes as many codes with their bits as fit
// into kBits, and no coefficient is formed. Blocks inside are copied bit by bit; only their DC differences are coded
// anew, with a table of our own that has all categories.
//
// Whatever is unusual or damaged makes it give up (return 0); then the whole file goes to the decoder. Nothing is read
// outside `data`, whatever it holds.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

// What reads bits keeps its state in registers only where it is inlined.
#define LALIC_INLINE __attribute__((always_inline)) inline

namespace {

constexpr int kBits = 12;       // of a lookup
constexpr int kEnd = 64;        // added to an entry's advance when an end of block is among its codes
constexpr int kPadding = 512;   // bytes behind the data; a block takes 64 codes of 16 bits with 15 of value at most
constexpr int kCategories = 12; // of a DC difference in 8-bit JPEG: 0 to 11

uint64_t load_big_endian(const uint8_t* p) {
  uint64_t value;
  std::memcpy(&value, p, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  value = __builtin_bswap64(value);
#endif
  return value;
}

struct Entry {
  uint8_t bits;    // that its codes and their values take
  uint8_t advance; // coefficients
};
constexpr Entry kLong = {0, 255}; // the codes must be looked at one by one

// One Huffman table. `definition` is what the DHT segment says of it: 16 counts, then the symbols.
struct Table {
  std::vector<uint8_t> definition;
  std::array<int32_t, 17> last_code{}; // largest code of each length, -1 for none
  std::array<int32_t, 17> offset{};    // symbol's place minus code
  std::array<Entry, 1 << kBits> several{};
  std::array<uint16_t, 1 << kBits> single{}; // length << 8 | symbol, 0 for longer codes

  bool define(const uint8_t* counts, const uint8_t* symbols, int total, bool ac) {
    definition.assign(counts, counts + 16);
    definition.insert(definition.end(), symbols, symbols + total);
    single.fill(0);
    int code = 0, place = 0;
    for (int length = 1; length <= 16; ++length, code <<= 1) {
      offset[length] = place - code;
      last_code[length] = -1;
      if (counts[length - 1] == 0) continue;
      if (code + counts[length - 1] >= 1 << length) return false; // a code of ones alone is not allowed
      for (int i = 0; i < counts[length - 1]; ++i, ++code, ++place) {
        if (!ac && symbols[place] >= kCategories) return false;
        if (length > kBits) continue;
        const int first = code << (kBits - length);
        std::fill_n(single.begin() + first, 1 << (kBits - length), uint16_t(length << 8 | symbols[place]));
      }
      last_code[length] = code - 1;
    }
    if (ac) join();
    return true;
  }

  // As many AC codes, with their values, as lie within kBits; at least the first one, whose value may reach beyond.
  void join() {
    for (int window = 0; window < 1 << kBits; ++window) {
      int bits = 0, advance = 0;
      while (bits < kBits && advance < kEnd) {
        const int code = single[(window << bits) & ((1 << kBits) - 1)];
        const int length = code >> 8, run = (code & 255) >> 4, size = code & 15;
        if (code == 0 || (bits > 0 && bits + length + size > kBits)) break;
        if (bits > 0 && advance + run + 1 >= kEnd) break;
        bits += length + size;
        advance += size > 0 || run == 15 ? run + 1 : kEnd;
      }
      several[window] = bits > 0 ? Entry{uint8_t(bits), uint8_t(advance)} : kLong;
    }
  }
};

// The last tables, since nearly all files have the same ones. `used`: those of this file, which stay.
const Table* find_table(const uint8_t* counts, const uint8_t* symbols, int total, bool ac,
                        const std::array<const Table*, 4>& used) {
  thread_local std::array<Table, 16> kept[2];
  thread_local int next[2] = {0, 0};
  for (Table& table : kept[ac]) {
    if (table.definition.size() == size_t(16 + total) && std::equal(counts, counts + 16, table.definition.begin()) &&
        std::equal(symbols, symbols + total, table.definition.begin() + 16)) {
      return &table;
    }
  }
  // One that was found, rather than made for this file, may be the next to be thrown out.
  while (std::count(used.begin(), used.end(), &kept[ac][next[ac]]) > 0) next[ac] = (next[ac] + 1) % 16;
  Table& table = kept[ac][next[ac]];
  next[ac] = (next[ac] + 1) % 16;
  if (table.define(counts, symbols, total, ac)) return &table;
  table.definition.clear();
  return nullptr;
}

// Bits of data without stuffed zeros. It does not look where they end: kPadding bytes follow, more than the codes of a
// block can take, and whoever reads blocks looks after each.
struct Reader {
  const uint8_t* base;
  const uint8_t* next;
  uint64_t window = 0; // its bits from the highest on are those that come next
  int have = 0;

  explicit Reader(const uint8_t* from) : base(from), next(from) {}
  void refill() { // to 56 bits at least
    window |= load_big_endian(next) >> have;
    next += (63 - have) >> 3;
    have |= 56;
  }
  void drop(int bits) {
    window <<= bits;
    have -= bits;
  }
  int64_t place() const { return 8 * (next - base) - have; }
};

// Reads one code of up to 16 bits that is there; -1 when no code begins like this.
LALIC_INLINE int read_code(Reader& in, const Table& table) {
  const int code = table.single[in.window >> (64 - kBits)];
  if (code != 0) {
    in.drop(code >> 8);
    return code & 255;
  }
  for (int length = kBits + 1; length <= 16; ++length) {
    const int32_t bits = int32_t(in.window >> (64 - length));
    if (table.last_code[length] >= bits && bits + table.offset[length] >= 0) {
      in.drop(length);
      return table.definition[16 + bits + table.offset[length]];
    }
  }
  return -1;
}

// The difference of a DC coefficient; INT32_MIN on an invalid code.
LALIC_INLINE int32_t read_dc(Reader& in, const Table& table) {
  in.refill();
  const int size = read_code(in, table);
  if (size < 0) return INT32_MIN;
  const int32_t value = int32_t(in.window >> 1 >> (63 - size));
  in.drop(size);
  // Values whose first bit is 0 are negative. Without branches, which would be mispredicted half the time.
  return value + ((((value << 1) >> size) - 1) & (1 - (1 << size)));
}

// Passes over the AC codes of one block.
LALIC_INLINE bool pass_ac(Reader& reader, const Table& table) {
  Reader in = reader; // in registers
  int k = 1;
  while (true) {
    in.refill();
    // Twice per refill: an entry takes 27 bits at most, and looks at 12.
    Entry entry = table.several[in.window >> (64 - kBits)];
    if (k + entry.advance < 64) {
      in.drop(entry.bits);
      k += entry.advance;
      entry = table.several[in.window >> (64 - kBits)];
      if (k + entry.advance < 64) {
        in.drop(entry.bits);
        k += entry.advance;
        continue;
      }
    }
    const int after = k + entry.advance;
    if (after == 64 || (entry.advance >= kEnd && after < 64 + kEnd)) {
      in.drop(entry.bits);
      break;
    }
    in.refill();
    const int symbol = read_code(in, table);
    if (symbol < 0) return false;
    const int run = symbol >> 4, size = symbol & 15;
    if (size == 0 && run < 15) break;
    in.drop(size);
    k += run + 1;
    if (k > 64) return false;
    if (k == 64) break;
  }
  reader = in;
  return true;
}

// Bits into a JPEG's scan, with stuffed zeros.
struct Writer {
  uint8_t* next;
  uint8_t* end;
  uint64_t window = 0;
  int have = 0;
  bool full = false;

  void put(uint64_t bits, int count) { // count <= 32
    window |= bits << (64 - have - count);
    have += count;
    while (have >= 8) {
      const uint8_t byte = uint8_t(window >> 56);
      if (end - next < 2) {
        full = true;
        next = end - 2;
      }
      *next++ = byte;
      if (byte == 0xFF) *next++ = 0;
      window <<= 8;
      have -= 8;
    }
  }
  void copy(const uint8_t* base, int64_t from, int64_t to) {
    for (; to - from >= 32; from += 32) put(load_big_endian(base + (from >> 3)) << (from & 7) >> 32, 32);
    const int rest = int(to - from);
    if (rest > 0) put(load_big_endian(base + (from >> 3)) << (from & 7) >> (64 - rest), rest);
  }
  void put_dc(int32_t difference) {
    int32_t size = 0, magnitude = difference < 0 ? -difference : difference;
    while (magnitude >> size) ++size;
    if (size >= kCategories) {
      full = true;
      return;
    }
    put(uint64_t(size), 4); // the codes of our table are the categories, in four bits
    if (size > 0) put(uint64_t(difference < 0 ? difference + (1 << size) - 1 : difference), size);
  }
};

struct Component {
  int id = 0, blocks = 0, dc = 0, ac = 0;
  int32_t read = 0, written = 0; // DC values
};

struct Header {
  int width = 0, height = 0, count = 0, unit_width = 8, unit_height = 8;
  std::array<Component, 3> components;
  std::array<const Table*, 4> tables[2] = {};
  const uint8_t* scan = nullptr;
};

int pair(const uint8_t* p) { return p[0] << 8 | p[1]; }

bool read_tables(const uint8_t* body, const uint8_t* end, Header& header) {
  while (body < end) {
    if (end - body < 17) return false;
    int total = 0;
    for (int i = 1; i <= 16; ++i) total += body[i];
    const int ac = body[0] >> 4, id = body[0] & 15;
    if (ac > 1 || id > 3 || total > 256 || end - body < 17 + total) return false;
    header.tables[ac][id] = find_table(body + 1, body + 17, total, ac == 1, header.tables[ac]);
    if (header.tables[ac][id] == nullptr) return false;
    body += 17 + total;
  }
  return true;
}

bool read_frame(const uint8_t* body, const uint8_t* end, Header& header) {
  if (end - body < 6 || header.count != 0) return false;
  header.height = pair(body + 1), header.width = pair(body + 3), header.count = body[5];
  if (body[0] != 8 || !header.width || !header.height || (header.count != 1 && header.count != 3)) return false;
  if (end - body != 6 + 3 * header.count) return false;
  for (int i = 0; i < header.count; ++i) {
    const int across = body[7 + 3 * i] >> 4, down = body[7 + 3 * i] & 15;
    header.components[i].id = body[6 + 3 * i];
    header.components[i].blocks = header.count == 1 ? 1 : across * down;
    const bool first = i == 0;
    if (first ? across < 1 || across > 4 || down < 1 || down > 2 : across != 1 || down != 1) return false;
    if (first && header.count == 3) header.unit_width = 8 * across, header.unit_height = 8 * down;
  }
  return true;
}

bool read_scan(const uint8_t* body, const uint8_t* end, Header& header) {
  if (header.count == 0 || end - body != 4 + 2 * header.count || body[0] != header.count) return false;
  for (int i = 0; i < header.count; ++i) {
    Component& component = header.components[i];
    component.dc = body[2 + 2 * i] >> 4, component.ac = body[2 + 2 * i] & 15;
    if (body[1 + 2 * i] != component.id || component.dc > 3 || component.ac > 3) return false;
    if (!header.tables[0][component.dc] || !header.tables[1][component.ac]) return false;
  }
  return end[-3] == 0 && end[-2] == 63 && end[-1] == 0;
}

// Reads the header and copies what the decoder needs of it. `resize` is where height and width stand in the copy.
bool copy_header(const uint8_t* data, const uint8_t* end, Header& header, std::vector<uint8_t>& out, size_t& resize) {
  if (end - data < 4 || data[0] != 0xFF || data[1] != 0xD8) return false;
  out.assign(data, data + 2);
  for (const uint8_t* p = data + 2; end - p >= 4;) {
    const int marker = p[1], length = pair(p + 2);
    const uint8_t *body = p + 4, *next = p + 2 + length;
    if (p[0] != 0xFF || length < 2 || length > end - p - 2) return false;
    bool keep = false;
    switch (marker) {
      case 0xC0: // baseline
      case 0xC1: // extended
        if (!read_frame(body, next, header)) return false;
        resize = out.size() + 5;
        keep = true;
        break;
      case 0xC4: // Huffman tables
        if (!read_tables(body, next, header)) return false;
        keep = true;
        break;
      case 0xDA: { // start of scan
        if (!read_scan(body, next, header)) return false;
        for (int i = 0; i < 4; ++i) { // our DC tables, over those of the file: twelve codes of four bits
          const uint8_t head[] = {0xFF, 0xC4, 0, 31, uint8_t(i), 0, 0, 0, kCategories, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
          if (!header.tables[0][i]) continue;
          out.insert(out.end(), head, head + 21);
          for (int category = 0; category < kCategories; ++category) out.push_back(uint8_t(category));
        }
        out.insert(out.end(), p, next);
        header.scan = next;
        return true;
      }
      case 0xDB: // quantisation tables
      case 0xE0: // JFIF
      case 0xEE: // Adobe
        keep = true;
        break;
      case 0xDD: // restart interval
        if (length != 4 || pair(body) != 0) return false;
        break;
      default:
        if (marker != 0xFE && (marker < 0xE1 || marker > 0xEF)) return false;
    }
    if (keep) out.insert(out.end(), p, next);
    p = next;
  }
  return false;
}

// Takes the stuffed zeros out of a scan up to the end of the image; false when another marker stands before it.
bool unstuff(const uint8_t* p, const uint8_t* end, std::vector<uint8_t>& out, size_t& size) {
  out.resize(size_t(end - p) + kPadding);
  uint8_t* to = out.data();
  while (true) {
    const auto* mark = static_cast<const uint8_t*>(std::memchr(p, 0xFF, size_t(end - p)));
    if (mark == nullptr || end - mark < 2) return false;
    const size_t count = size_t(mark - p);
    std::memcpy(to, p, count);
    to += count;
    if (mark[1] != 0) {
      size = size_t(to - out.data());
      std::memset(to, 0, kPadding);
      return mark[1] == 0xD9;
    }
    *to++ = 0xFF;
    p = mark + 2;
  }
}

struct Units {
  int first, last, all;
};

// The coded units that hold [from, to) of `length` pixels and one more on each side: colours are interpolated.
Units units_around(int from, int to, int length, int unit) {
  const int all = (length + unit - 1) / unit;
  return {std::max(0, from - 1) / unit, std::min(all, to / unit + 1), all};
}

// Reads `count` coded units, and copies them when kCopy.
template <bool kCopy>
bool pass_units(Reader& reader, Header& header, int count, const uint8_t* data, const uint8_t* end, Writer& out) {
  Reader in = reader;
  for (int unit = 0; unit < count; ++unit) {
    for (int i = 0; i < header.count; ++i) {
      Component& component = header.components[i];
      const Table &dc = *header.tables[0][component.dc], &ac = *header.tables[1][component.ac];
      int32_t value = component.read;
      for (int block = 0; block < component.blocks; ++block) {
        const int32_t difference = read_dc(in, dc);
        if (difference == INT32_MIN) return false;
        value += difference;
        const int64_t start = in.place();
        if (!pass_ac(in, ac) || in.next > end) return false;
        if (kCopy) {
          out.put_dc(value - component.written);
          component.written = value;
          out.copy(data, start, in.place());
        }
      }
      component.read = value;
    }
  }
  reader = in;
  return true;
}

bool cut_scan(Header& header, const Units& columns, const Units& rows, const uint8_t* data, size_t size, Writer& out) {
  Reader in(data);
  const uint8_t* const end = data + size + 8;
  for (int row = 0; row < rows.last; ++row) {
    if (row < rows.first) {
      if (!pass_units<false>(in, header, columns.all, data, end, out)) return false;
    } else if (!pass_units<false>(in, header, columns.first, data, end, out) ||
               !pass_units<true>(in, header, columns.last - columns.first, data, end, out) ||
               !pass_units<false>(in, header, columns.all - columns.last, data, end, out)) {
      return false;
    }
    if (in.place() > int64_t(8 * size) || out.full) return false;
    for (const Component& component : header.components) {
      if (std::abs(component.read) > 1 << 16) return false; // no sum of damaged differences may overflow
    }
  }
  return true;
}

} // namespace

// Writes the smaller JPEG to `out` and returns its size, 0 when it cannot. `origin` gets the place, in pixels, of its
// left and upper edge in the whole image.
extern "C" __attribute__((visibility("default"))) int64_t lalic_jpeg_cut(
    const uint8_t* data, int64_t size, int left, int top, int right, int bottom, uint8_t* out, int64_t room, int* origin) {
  thread_local std::vector<uint8_t> head, plain;
  Header header;
  size_t resize = 0, plain_size = 0;
  if (size < 4 || !copy_header(data, data + size, header, head, resize)) return 0;
  if (left < 0 || top < 0 || right <= left || bottom <= top || right > header.width || bottom > header.height) return 0;
  if (!unstuff(header.scan, data + size, plain, plain_size)) return 0;
  const Units columns = units_around(left, right, header.width, header.unit_width);
  const Units rows = units_around(top, bottom, header.height, header.unit_height);
  const int x = columns.first * header.unit_width, y = rows.first * header.unit_height;
  const int width = std::min(header.width, columns.last * header.unit_width) - x;
  const int height = std::min(header.height, rows.last * header.unit_height) - y;
  const uint8_t dimensions[] = {uint8_t(height >> 8), uint8_t(height), uint8_t(width >> 8), uint8_t(width)};
  std::copy(dimensions, dimensions + 4, head.begin() + int64_t(resize));
  if (room < int64_t(head.size()) + 16) return 0;
  std::copy(head.begin(), head.end(), out);
  Writer writer{out + head.size(), out + room - 4};
  if (!cut_scan(header, columns, rows, plain.data(), plain_size, writer)) return 0;
  writer.put(0x7F, 7); // ones to the end of the last byte
  if (writer.full) return 0;
  *writer.next++ = 0xFF;
  *writer.next++ = 0xD9;
  origin[0] = x, origin[1] = y;
  return writer.next - out;
}
