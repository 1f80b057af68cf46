// A CUDA driver without a GPU: the functions of libcuda.so.1 that the worker calls, and the PTX that it loads run by
// ptx.h. It is for tests, which build it as `libcuda.so` and show it to the real program in LD_LIBRARY_PATH.
//
// What a GPU would do later is done as late as it can be: copies and kernels wait in their stream until somebody
// synchronises. So a result that is read too early, or page-locked memory that is reused too early, shows. Device memory
// holds garbage at first, and every access of a kernel is checked.
//
// Told by environment variables:
//
//   EMULATED_ORDER=backward       which thread of a block is next, see ptx.h
//   EMULATED_COPIES=late          when asynchronous copies to shared memory happen
//   EMULATED_PROCESSORS=4         multiprocessors, on which the choice between kernels depends
//   EMULATED_CAPABILITY=80        compute capability
//   EMULATED_MEMORY=268435456     bytes of device memory
//   EMULATED_VERSION=12000        version of CUDA that the driver offers
//   EMULATED_INIT=0               what cuInit returns
//   EMULATED_FAIL_LAUNCH=0        the launch, counted from 1, that fails
//   EMULATED_LOG                  a file that gets the name of each kernel that ran

#include "ptx.h"

#include <deque>
#include <memory>
#include <mutex>
#include <utility>

namespace {

enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_FOUND = 500,
    LAUNCH_FAILED = 719,
};

using Work = std::function<void()>;
using Device = unsigned long long;

std::recursive_mutex all;
using Locked = std::lock_guard<std::recursive_mutex>;

unsigned long setting(const char *name, unsigned long otherwise) {
    const char *text = std::getenv(name);
    return text ? std::strtoul(text, nullptr, 10) : otherwise;
}

bool chosen(const char *name, const char *value) {
    const char *text = std::getenv(name);
    return text && std::string(text) == value;
}

struct Stream {
    std::deque<Work> waiting;
    unsigned long queued = 0;
    unsigned long done = 0;

    void queue(Work work) {
        waiting.push_back(std::move(work));
        queued++;
    }

    void run_to(unsigned long which) {
        while (done < which && !waiting.empty()) {
            const Work work = std::move(waiting.front());
            waiting.pop_front();
            work();
            done++;
        }
    }
};

struct Event {
    Stream *stream = nullptr;
    unsigned long which = 0;
};

std::map<Stream *, std::unique_ptr<Stream>> streams;
thread_local void *current;
int context;
unsigned long launches;

void run_all() {
    for (auto &[stream, _] : streams) {
        stream->run_to(stream->queued);
    }
}

// Device memory, and page-locked memory.
struct Bytes {
    std::unique_ptr<char, decltype(&std::free)> memory;
    size_t count;
};
std::map<char *, Bytes> on_device;
std::map<char *, Bytes> locked;
size_t taken;

char *take(std::map<char *, Bytes> &into, size_t count) {
    const size_t whole = (count + 255) / 256 * 256;
    char *at = static_cast<char *>(std::aligned_alloc(256, whole));
    std::memset(at, 0xa5, whole);
    into.emplace(at, Bytes{{at, &std::free}, count});
    return at;
}

bool within(const std::map<char *, Bytes> &all, const void *from, size_t bytes) {
    char *at = static_cast<char *>(const_cast<void *>(from));
    auto found = all.upper_bound(at);
    if (found == all.begin()) {
        return false;
    }
    --found;
    return at + bytes <= found->first + found->second.count;
}

using Kernel = std::map<std::string, ptx::Entry>::value_type;

}  // namespace

extern "C" {

int cuInit(unsigned) {
    return setting("EMULATED_INIT", SUCCESS);
}

int cuDriverGetVersion(int *version) {
    *version = setting("EMULATED_VERSION", 12000);
    return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? SUCCESS : INVALID_VALUE;
}

int cuDeviceGetName(char *name, int length, int) {
    std::snprintf(name, length, "Emulated GPU");
    return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int) {
    const int capability = setting("EMULATED_CAPABILITY", 80);
    switch (attribute) {
        case 16:
            *value = setting("EMULATED_PROCESSORS", 4);
            return SUCCESS;
        case 75:
            *value = capability / 10;
            return SUCCESS;
        case 76:
            *value = capability % 10;
            return SUCCESS;
        case 115:  // memory pools
            *value = 0;
            return SUCCESS;
        default:
            return INVALID_VALUE;
    }
}

int cuDevicePrimaryCtxRetain(void **to, int) {
    *to = &context;
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int) {
    return SUCCESS;
}

int cuCtxSetCurrent(void *to) {
    current = to;
    return SUCCESS;
}

int cuCtxGetCurrent(void **to) {
    *to = current;
    return SUCCESS;
}

int cuCtxSynchronize() {
    const Locked hold(all);
    run_all();
    return SUCCESS;
}

int cuStreamCreate(Stream **stream, unsigned) {
    const Locked hold(all);
    auto made = std::make_unique<Stream>();
    *stream = made.get();
    streams[made.get()] = std::move(made);
    return SUCCESS;
}

int cuStreamSynchronize(Stream *stream) {
    const Locked hold(all);
    stream->run_to(stream->queued);
    return SUCCESS;
}

int cuStreamDestroy_v2(Stream *stream) {
    const Locked hold(all);
    // A driver lets it finish; events that were recorded in it are done then.
    stream->run_to(stream->queued);
    stream->queued = 0;
    return SUCCESS;
}

int cuEventCreate(Event **event, unsigned) {
    *event = new Event;
    return SUCCESS;
}

int cuEventDestroy_v2(Event *event) {
    delete event;
    return SUCCESS;
}

int cuEventRecord(Event *event, Stream *stream) {
    const Locked hold(all);
    *event = {stream, stream->queued};
    return SUCCESS;
}

int cuEventSynchronize(Event *event) {
    const Locked hold(all);
    if (event->stream) {
        event->stream->run_to(event->which);
    }
    return SUCCESS;
}

int cuStreamWaitEvent(Stream *stream, Event *event, unsigned) {
    const Locked hold(all);
    // As it is recorded now.
    const Event recorded = *event;
    if (recorded.stream && recorded.stream != stream) {
        stream->queue([recorded] { recorded.stream->run_to(recorded.which); });
    }
    return SUCCESS;
}

int cuMemGetInfo_v2(size_t *free, size_t *total) {
    const Locked hold(all);
    *total = setting("EMULATED_MEMORY", 256 << 20);
    *free = *total - taken;
    return SUCCESS;
}

int cuMemAlloc_v2(Device *device, size_t bytes) {
    const Locked hold(all);
    if (bytes == 0) {
        return INVALID_VALUE;
    }
    if (taken + bytes > setting("EMULATED_MEMORY", 256 << 20)) {
        return OUT_OF_MEMORY;
    }
    taken += bytes;
    *device = reinterpret_cast<Device>(take(on_device, bytes));
    return SUCCESS;
}

int cuMemFree_v2(Device device) {
    const Locked hold(all);
    run_all();
    const auto found = on_device.find(reinterpret_cast<char *>(device));
    if (found == on_device.end()) {
        return INVALID_VALUE;
    }
    taken -= found->second.count;
    on_device.erase(found);
    return SUCCESS;
}

int cuMemHostAlloc(void **host, size_t bytes, unsigned) {
    const Locked hold(all);
    *host = take(locked, bytes);
    return SUCCESS;
}

int cuMemFreeHost(void *host) {
    const Locked hold(all);
    return locked.erase(static_cast<char *>(host)) == 1 ? SUCCESS : INVALID_VALUE;
}

int cuMemcpyHtoDAsync_v2(Device to, const void *from, size_t bytes, Stream *stream) {
    const Locked hold(all);
    char *at = reinterpret_cast<char *>(to);
    if (!within(on_device, at, bytes)) {
        return INVALID_VALUE;
    }
    if (within(locked, from, bytes)) {
        stream->queue([=] { std::memcpy(at, from, bytes); });
    } else {
        // Of other memory a driver makes a copy before it returns.
        const char *first = static_cast<const char *>(from);
        const std::vector<char> copied(first, first + bytes);
        stream->queue([at, copied] { std::memcpy(at, copied.data(), copied.size()); });
    }
    return SUCCESS;
}

int cuMemcpyDtoHAsync_v2(void *to, Device from, size_t bytes, Stream *stream) {
    const Locked hold(all);
    const char *at = reinterpret_cast<const char *>(from);
    if (!within(on_device, at, bytes)) {
        return INVALID_VALUE;
    }
    stream->queue([=] { std::memcpy(to, at, bytes); });
    if (!within(locked, to, bytes)) {
        stream->run_to(stream->queued);
    }
    return SUCCESS;
}

int cuModuleLoadData(ptx::Module **module, const void *image) {
    *module = new ptx::Module(static_cast<const char *>(image));
    return SUCCESS;
}

int cuModuleUnload(ptx::Module *module) {
    delete module;
    return SUCCESS;
}

int cuModuleGetFunction(Kernel **function, ptx::Module *module, const char *name) {
    const auto found = module->entries.find(name);
    if (found == module->entries.end()) {
        return NOT_FOUND;
    }
    *function = &*found;
    return SUCCESS;
}

int cuLaunchKernel(Kernel *kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, Stream *stream, void **arguments, void **) {
    const Locked hold(all);
    if (++launches == setting("EMULATED_FAIL_LAUNCH", 0)) {
        return LAUNCH_FAILED;
    }
    if (grid_x == 0 || grid_y == 0 || grid_y > 65535 || grid_z != 1 || block_x > 1024 || shared != 0) {
        return INVALID_VALUE;
    }
    ptx::Block block;
    block.size = {block_x, block_y, block_z};
    block.orders = {chosen("EMULATED_ORDER", "backward"), chosen("EMULATED_COPIES", "late")};
    block.global = [](const void *at, size_t bytes) { return within(on_device, at, bytes); };
    for (size_t i = 0; i < kernel->second.parameters.size(); i++) {
        uint64_t argument = 0;
        std::memcpy(&argument, arguments[i], kernel->second.parameters[i] / 8);
        block.parameters.push_back(argument);
    }
    stream->queue([=] {
        kernel->second.run({grid_x, grid_y, grid_z}, block);
        if (const char *log = std::getenv("EMULATED_LOG")) {
            if (FILE *file = std::fopen(log, "a")) {
                std::fprintf(file, "%s\n", kernel->first.c_str());
                std::fclose(file);
            }
        }
    });
    return SUCCESS;
}

int cuGetErrorName(int error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "an emulated error";
    return SUCCESS;
}

int cuGetErrorString(int error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : "an emulated error";
    return SUCCESS;
}

}  // extern "C"
