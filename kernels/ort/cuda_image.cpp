#include "cuda_image.h"

#include <dlfcn.h>
#include <string.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <vector>

namespace paredown::ort::cuda {

namespace {

#ifndef PAREDOWN_BUILD_CUBINS
#define PAREDOWN_BUILD_CUBINS "build them with python -m paredown.kernels.cuda.cubins"
#endif
constexpr char kBuild[] = PAREDOWN_BUILD_CUBINS;

/* A file that cubins.py made, as its manifest.json describes it; `driver` as cuDriverGetVersion has it. */
struct Made {
  std::string file, unit, architecture, digest;
  int driver = 0;
};

/* Reads what json.dumps wrote of a list of flat objects. Texts in it are names: they hold no quotes or backslashes. */
class Manifest {
 public:
  explicit Manifest(const std::string &text) : text_(text) {}

  std::vector<Made> entries() const {
    std::vector<Made> found;
    for (size_t begin = 0, end = 0; (begin = text_.find('{', end)) != std::string::npos;) {
      end = text_.find('}', begin);
      if (end == std::string::npos) throw Failure{"the manifest of the CUDA kernels is cut off; " + std::string(kBuild)};
      found.push_back(entry(text_.substr(begin, end - begin)));
    }
    return found;
  }

 private:
  static Made entry(const std::string &object) {
    Made made;
    made.file = word(object, "file"), made.unit = word(object, "unit");
    made.architecture = word(object, "architecture"), made.digest = word(object, "digest");
    const size_t begin = after(object, "driver", '['), comma = object.find(',', begin);
    if (comma == std::string::npos) throw Failure{missing("driver")};
    made.driver = 1000 * atoi(object.c_str() + begin) + 10 * atoi(object.c_str() + comma + 1);
    return made;
  }

  static std::string word(const std::string &object, const char *name) {
    const size_t begin = after(object, name, '"');
    return object.substr(begin, object.find('"', begin) - begin);
  }

  /* Where the value of a member goes on after its opening sign. */
  static size_t after(const std::string &object, const char *name, char opening) {
    const std::string quoted = '"' + std::string(name) + "\":";
    const size_t begin = object.find(quoted);
    const size_t opened = begin == std::string::npos ? begin : object.find(opening, begin + quoted.size());
    if (opened == std::string::npos) throw Failure{missing(name)};
    return opened + 1;
  }

  static std::string missing(const char *name) {
    return "the manifest of the CUDA kernels has an entry without " + std::string(name) + "; " + kBuild;
  }

  const std::string &text_;
};

/* cuda/cubin in the folder of this library. */
std::string folder() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void *>(kUnits), &info) || !info.dli_fname) {
    throw Failure{"the folder of this library is not known"};
  }
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return (slash == std::string::npos ? std::string(".") : path.substr(0, slash)) + "/cuda/cubin/";
}

bool read(const std::string &path, std::string *text) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return false;
  text->assign(std::istreambuf_iterator<char>(file), {});
  return !file.bad();
}

/* 90 of "sm_90a"; 0 of what is no cubin's architecture. */
int capability_of(const std::string &architecture) {
  return architecture.compare(0, 3, "sm_") == 0 ? atoi(architecture.c_str() + 3) : 0;
}

bool is_tegra(int capability) { return std::find(std::begin(kTegra), std::end(kTegra), capability) != std::end(kTegra); }

/* As image.runs_on: later devices of a major version run code for earlier ones, but for sm_90a and Tegras. */
bool runs_on(const std::string &architecture, int device) {
  const int made = capability_of(architecture);
  if (architecture.back() == kSingle || is_tegra(made) || is_tegra(device)) return made == device;
  return made / 10 == device / 10 && made <= device;
}

const Made *choose(const std::vector<Made> &built, int capability, int driver) {
  const Made *best = nullptr, *ptx = nullptr;
  for (const Made &made : built) {
    if (made.driver > driver) continue;
    if (made.architecture == kVirtual) {
      if (capability >= 80) ptx = &made;
    } else if (runs_on(made.architecture, capability) &&
               (!best || capability_of(made.architecture) > capability_of(best->architecture))) {
      best = &made;
    }
  }
  return best ? best : ptx;
}

std::string dotted(int number, int ten) { return std::to_string(number / ten) + "." + std::to_string(number % ten); }

}  // namespace

std::string find_image(const Unit &unit, int capability, int driver) {
  const std::string place = folder();
  std::string text;
  if (!read(place + "manifest.json", &text)) {
    throw Failure{"there are no CUDA kernels beside the library; " + std::string(kBuild) +
                  ", or run without the CUDA provider"};
  }
  std::vector<Made> built = Manifest(text).entries();
  const bool any = !built.empty();
  const auto foreign = [&](const Made &made) { return made.unit != unit.file || made.digest != unit.digest; };
  built.erase(std::remove_if(built.begin(), built.end(), foreign), built.end());
  if (built.empty() && any) {
    throw Failure{"the CUDA kernels beside the library were made of other sources than the library; " +
                  std::string(kBuild) + ", after python kernels/build.py if the library is the older one"};
  }
  const Made *chosen = choose(built, capability, driver);
  if (!chosen) {
    throw Failure{"none of the built CUDA kernels suits compute capability " + dotted(capability, 10) +
                  " with a driver of CUDA " + dotted(driver / 10, 100) + "; " + kBuild};
  }
  std::string image;
  if (!read(place + chosen->file, &image)) throw Failure{"cannot read " + chosen->file + "; " + kBuild};
  return image;
}

}  // namespace paredown::ort::cuda
