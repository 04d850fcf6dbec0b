// What the programs that run files of calls share: guarded memory, the file, a weight.
//
// Every buffer ends where a page that cannot be touched begins, so reading or writing past an end kills the program.
#ifndef PAREDOWN_TESTS_HARNESS_H
#define PAREDOWN_TESTS_HARNESS_H

#include "paredown.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <list>
#include <sstream>
#include <string>
#include <vector>

namespace {

[[noreturn]] void fail(const std::string &what) {
  std::fprintf(stderr, "harness: %s\n", what.c_str());
  std::exit(1);
}

// Memory whose last byte is the last of a page; the next page is forbidden.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    span_ = (bytes + page - 1) / page * page + page;
    base_ = mmap(nullptr, span_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) fail("out of memory");
    char *guard = static_cast<char *>(base_) + span_ - page;
    if (mprotect(guard, page, PROT_NONE) != 0) fail("mprotect refused");
    data_ = guard - bytes;
  }
  explicit Guarded(const std::vector<char> &data) : Guarded(data.size()) { std::copy(data.begin(), data.end(), data_); }
  Guarded(const Guarded &) = delete;
  Guarded &operator=(const Guarded &) = delete;
  ~Guarded() { munmap(base_, span_); }
  char *data() const { return data_; }
  size_t size() const { return bytes_; }
  void *or_null() const { return bytes_ == 0 ? nullptr : data_; }

 private:
  size_t bytes_, span_;
  void *base_;
  char *data_;
};

class Reader {
 public:
  explicit Reader(const char *path) : file_(path, std::ios::binary) {
    if (!file_) fail(std::string("cannot read ") + path);
  }
  bool more() { return file_.peek() != std::ifstream::traits_type::eof(); }
  int64_t integer() { return value<int64_t>(); }
  float number() { return static_cast<float>(value<double>()); }
  Guarded bytes() {
    std::vector<char> data(static_cast<size_t>(integer()));
    file_.read(data.data(), static_cast<std::streamsize>(data.size()));
    if (!file_) fail("the file of calls ends early");
    return Guarded(data);
  }

 private:
  template <class T>
  T value() {
    T out{};
    file_.read(reinterpret_cast<char *>(&out), sizeof out);
    if (!file_) fail("the file of calls ends early");
    return out;
  }
  std::ifstream file_;
};

struct Weight {
  explicit Weight(Reader &in) : value(), codes(numbers(in)), table(in.bytes()), scale(in.bytes()) {
    value.codes = codes.data();
    value.table = table.data();
    value.scale = scale.data();
  }
  paredown_weight value;
  Guarded codes, table, scale;

 private:
  Guarded numbers(Reader &in) {
    value.n = in.integer();
    value.k = in.integer();
    value.group = in.integer();
    value.table_rows = in.integer();
    value.bits = static_cast<int32_t>(in.integer());
    value.table_type = static_cast<int32_t>(in.integer());
    value.scale_type = static_cast<int32_t>(in.integer());
    value.zero = in.number();
    value.unit = in.number();
    return in.bytes();
  }
};

std::vector<std::string> built() {
  std::stringstream list(paredown_isas());
  std::vector<std::string> names;
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

// Run the calls of a file with each instruction set, by `run(call, y)` of the program, and write what they give.
template <class Call>
int run_file(int count, char **arguments) {
  if (count == 1) {  // for the test to see what this processor runs
    std::printf("%s\n", paredown_isas());
    return 0;
  }
  if (count < 3) fail("usage: harness CALLS RESULTS [ISA ...]");
  std::vector<std::string> names(arguments + 3, arguments + count);
  if (names.empty()) names = built();
  Reader in(arguments[1]);
  std::list<Call> calls;  // a call holds pointers into itself
  while (in.more()) calls.emplace_back(in);
  std::ofstream out(arguments[2], std::ios::binary);
  for (const std::string &name : names) {
    if (paredown_use_isa(name.c_str()) != PAREDOWN_OK) fail("no instruction set " + name);
    for (const Call &call : calls) {
      const Guarded y(call.y_bytes);
      std::memset(y.data(), 0xFF, y.size());  // undefined values, which may not stay where a result belongs
      const int32_t status = run(call, y.data());
      out.write(reinterpret_cast<const char *>(&status), sizeof status);
      out.write(y.data(), static_cast<std::streamsize>(y.size()));
    }
  }
  return out ? 0 : 1;
}

}  // namespace

#endif
