// Runs lalic_jpeg_cut over a file of cases, each in memory of exactly its size, so that the sanitizers see every byte
// read or written beyond. A case: five int32 (bytes, left, top, right, bottom), then the bytes.

#include <cstdint>
#include <cstdio>
#include <memory>

extern "C" int64_t lalic_jpeg_cut(
    const uint8_t* data, int64_t size, int left, int top, int right, int bottom, uint8_t* out, int64_t room, int* origin);

int main(int count, char** arguments) {
  std::FILE* file = count > 1 ? std::fopen(arguments[1], "rb") : nullptr;
  if (!file) return 1;
  int32_t head[5];
  long cases = 0, cut = 0;
  while (std::fread(head, sizeof(int32_t), 5, file) == 5) {
    const std::unique_ptr<uint8_t[]> data(new uint8_t[size_t(head[0])]);
    if (std::fread(data.get(), 1, size_t(head[0]), file) != size_t(head[0])) return 1;
    // Every third case has too little room.
    const int64_t room = ++cases % 3 ? head[0] + 1024 : head[0] / 4;
    const std::unique_ptr<uint8_t[]> out(new uint8_t[size_t(room)]);
    const std::unique_ptr<int[]> origin(new int[2]);
    const int64_t size =
        lalic_jpeg_cut(data.get(), head[0], head[1], head[2], head[3], head[4], out.get(), room, origin.get());
    if (size < 0 || size > room) return 1;
    cut += size > 0;
  }
  std::printf("%ld %ld\n", cases, cut);
  std::fclose(file);
  return 0;
}
