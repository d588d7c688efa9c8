// libcuda.so.1 of the emulated GPU: the driver calls that src/device/cuda makes, and the fibers
// that kernels run on (device.h).
//
// Work is done when it is submitted, on the calling thread, so that every stream is in order and
// every event complete; while a stream is captured it is written down instead. Device memory is
// filled with 0xff (NaN) at first, and ends at a page that nobody may touch.
#include <cuda.h>

#include "device.h"
#undef cuEventElapsedTime  // the crate asks for the first version

#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "abi/params.h"

namespace emulator {

thread_local Index cta, ctas, threads;
thread_local unsigned thread;
alignas(1024) thread_local unsigned char dynamic_bytes[kSharedBytes];
thread_local unsigned char* dynamic_shared = dynamic_bytes;

namespace {

struct Copy {
  uint32_t shared;
  const void* from;
  unsigned bytes;
  bool valid;
};

struct Fiber {
  ucontext_t context;  // how it begins
  jmp_buf resume;      // where it waits, once it has begun: without a system call, unlike contexts
  bool begun;
  bool ended;
  std::vector<Copy> open;                // copies since the last commit
  std::deque<std::vector<Copy>> groups;  // committed and not awaited
};

struct Meeting {
  unsigned arrived = 0;
  unsigned phase = 0;
};

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 << 10;

// The CTA that runs on this thread.
struct Cta {
  ucontext_t caller;
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  std::vector<char> stacks = std::vector<char>(kMaxThreads * kStackBytes);
  Meeting all;
  Meeting warps[kMaxThreads / kWarp];
  const void* brought[kMaxThreads];
  unsigned running;  // threads that have not ended
  std::function<void()> kernel;
};
thread_local std::unique_ptr<Cta> current;

unsigned next_fiber() {
  unsigned next = thread;
  do next = next + 1 == threads.x ? 0 : next + 1;
  while (current->fibers[next].ended);
  return next;
}

void resume(unsigned to) {
  Fiber& fiber = current->fibers[thread = to];
  if (fiber.begun) _longjmp(fiber.resume, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

void meet(Meeting& meeting, unsigned of) {
  const unsigned phase = meeting.phase;
  if (++meeting.arrived == of) {
    meeting.arrived = 0;
    ++meeting.phase;
    return;
  }
  for (unsigned turns = 0; meeting.phase == phase; ++turns) {
    const unsigned to = next_fiber();
    if (to == thread || turns > 1u << 20)
      fail("threads wait for one that has ended or waits elsewhere");
    if (_setjmp(current->fibers[thread].resume) == 0) resume(to);
  }
}

void run_fiber() {
  current->kernel();
  Fiber& fiber = current->fibers[thread];
  if (!fiber.open.empty()) fail("copies that are never committed");
  fiber.ended = true;
  if (--current->running == 0) setcontext(&current->caller);
  resume(next_fiber());
}

void run_cta(unsigned count) {
  Cta& cta = *current;
  memset(dynamic_bytes, 0xff, sizeof(dynamic_bytes));
  cta.all = {};
  for (Meeting& warp : cta.warps) warp = {};
  for (unsigned t = 0; t < count; ++t) {
    Fiber& fiber = cta.fibers[t];
    fiber.begun = fiber.ended = false;
    fiber.groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = cta.stacks.data() + t * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  cta.running = count;
  thread = 0;
  cta.fibers[0].begun = true;
  swapcontext(&cta.caller, &cta.fibers[0].context);
}

}  // namespace

void meet_warp() {
  // What is left over makes a last, smaller warp.
  const unsigned first = thread / kWarp * kWarp;
  meet(current->warps[thread / kWarp], min(threads.x - first, kWarp));
}
void meet_cta() { meet(current->all, threads.x); }
const void*& brought(unsigned lane) { return current->brought[thread / kWarp * kWarp + lane]; }

void copy_later(uint32_t shared, const void* from, unsigned bytes, bool valid) {
  current->fibers[thread].open.push_back({shared, from, bytes, valid});
}
void commit_copies() {
  Fiber& fiber = current->fibers[thread];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
void await_copies(unsigned pending) {
  auto& groups = current->fibers[thread].groups;
  for (; groups.size() > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      unsigned char* to = shared_pointer(copy.shared);
      if (copy.valid)
        memcpy(to, copy.from, copy.bytes);
      else
        memset(to, 0, copy.bytes);
    }
  }
}

namespace {

// Parameter blocks by the beginning of a kernel's name: kernels take theirs by value.
struct Parameters {
  const char* name;
  size_t bytes;
  void (*call)(void* kernel, const void* params);
};
template <typename P>
constexpr Parameters parameters(const char* name) {
  return {name, sizeof(P), [](void* kernel, const void* params) {
            reinterpret_cast<void (*)(P)>(kernel)(*static_cast<const P*>(params));
          }};
}
const Parameters kParameters[] = {
    parameters<hkv_append_params>("hkv_append"),
    parameters<hkv_attention_params>("hkv_attention"),
    parameters<hkv_codec_params>("hkv_decode"),
    parameters<hkv_codec_params>("hkv_encode"),
    parameters<hkv_merge_params>("hkv_merge"),
    parameters<hkv_move_params>("hkv_move"),
    parameters<hkv_plan_params>("hkv_plan"),
    parameters<hkv_read_blocks_params>("hkv_read_blocks"),
    parameters<hkv_read_params>("hkv_read_memory"),
    parameters<hkv_synthetic_params>("hkv_synthetic"),
};

struct Kernel {
  void* address;
  const Parameters* parameters;
};

void launch(const Kernel& kernel, Index grid, Index block, const void* params) {
  if (current == nullptr) current = std::make_unique<Cta>();
  if (block.x > kMaxThreads || block.y * block.z * grid.y * grid.z != 1) fail("a shape of launch");
  current->kernel = [&] { kernel.parameters->call(kernel.address, params); };
  ctas = grid;
  threads = block;
  for (cta = {}; cta.x < grid.x; ++cta.x) run_cta(block.x);
}

using Work = std::function<void()>;
struct Graph {
  std::vector<Work> works;
};
struct Stream {
  std::shared_ptr<Graph> capture;  // what it is captured into
};
struct Event {
  std::chrono::steady_clock::time_point time;
  std::shared_ptr<Graph> capture;  // where it was recorded last
};

std::mutex mutex;  // of all that follows
Stream null_stream;
std::map<uint64_t, std::pair<void*, size_t>> allocations;  // mappings by the address given out
std::map<std::string, Kernel> kernels;

Stream& of(CUstream stream) {
  return stream == nullptr ? null_stream : *reinterpret_cast<Stream*>(stream);
}

template <typename F>
CUresult submit(CUstream stream, F work) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (auto& capture = of(stream).capture)
    capture->works.push_back(work);
  else
    work();
  return CUDA_SUCCESS;
}

void copy(CUdeviceptr dst, CUdeviceptr src, size_t bytes) {
  memcpy(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), bytes);
}

}  // namespace
}  // namespace emulator

using namespace emulator;

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult, const char** text) { return *text = "an error", CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult, const char** text) {
  return *text = "of the emulated GPU", CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetName(char* name, int length, CUdevice) {
  return snprintf(name, length, "emulated GPU"), CUDA_SUCCESS;
}
CUresult cuDeviceGetPCIBusId(char*, int, CUdevice) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuDeviceTotalMem(size_t* bytes, CUdevice) { return *bytes = 8ull << 30, CUDA_SUCCESS; }
CUresult cuMemGetInfo(size_t* free, size_t* total) {
  return *free = *total = 8ull << 30, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = 9;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = 0;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 6;
      break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
      *value = 50 << 20;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = kSharedBytes;
      break;
    default:
      *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  return *context = reinterpret_cast<CUcontext>(&null_stream), CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) {
  return *context = reinterpret_cast<CUcontext>(&null_stream), CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext*) { return CUDA_SUCCESS; }
CUresult cuCtxSynchronize() { return CUDA_SUCCESS; }

CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) {
  constexpr size_t kPage = 4096, kAlign = 256;
  const size_t given = (bytes + kAlign - 1) / kAlign * kAlign;
  const size_t whole = (given + kPage - 1) / kPage * kPage;
  void* mapping = mmap(nullptr, whole + kPage, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  char* const end = static_cast<char*>(mapping) + whole;
  mprotect(end, kPage, PROT_NONE);
  memset(end - given, 0xff, given);
  *address = reinterpret_cast<CUdeviceptr>(end - given);
  const std::lock_guard<std::mutex> lock(mutex);
  allocations[*address] = {mapping, whole + kPage};
  return CUDA_SUCCESS;
}
CUresult cuMemFree(CUdeviceptr address) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = allocations.find(address);
  if (found == allocations.end()) return CUDA_ERROR_INVALID_VALUE;
  munmap(found->second.first, found->second.second);
  allocations.erase(found);
  return CUDA_SUCCESS;
}
CUresult cuMemHostRegister(void*, size_t, unsigned) { return CUDA_SUCCESS; }
CUresult cuMemHostUnregister(void*) { return CUDA_SUCCESS; }
CUresult cuMemHostGetDevicePointer(CUdeviceptr* alias, void* host, unsigned) {
  return *alias = reinterpret_cast<CUdeviceptr>(host), CUDA_SUCCESS;
}

CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream) {
  return submit(stream, [=] { copy(dst, src, bytes); });
}
CUresult cuMemcpyBatchAsync_v2(CUdeviceptr* dsts, CUdeviceptr* srcs, size_t* sizes, size_t count,
                               CUmemcpyAttributes*, size_t*, size_t, CUstream stream) {
  for (size_t i = 0; i < count; ++i) cuMemcpyAsync(dsts[i], srcs[i], sizes[i], stream);
  return CUDA_SUCCESS;
}
CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D* given, CUstream stream) {
  return submit(stream, [move = *given] {
    for (size_t row = 0; row < move.Height; ++row) {
      copy(move.dstDevice + row * move.dstPitch, move.srcDevice + row * move.srcPitch,
           move.WidthInBytes);
    }
  });
}
CUresult cuMemsetD8Async(CUdeviceptr dst, unsigned char byte, size_t bytes, CUstream stream) {
  return submit(stream, [=] { memset(reinterpret_cast<void*>(dst), byte, bytes); });
}

CUresult cuStreamCreate(CUstream* stream, unsigned) {
  return *stream = reinterpret_cast<CUstream>(new Stream), CUDA_SUCCESS;
}
CUresult cuStreamDestroy(CUstream stream) {
  return delete reinterpret_cast<Stream*>(stream), CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream stream) {
  return of(stream).capture == nullptr ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
  // Waiting for what is being captured joins the capture.
  if (auto& capture = reinterpret_cast<Event*>(event)->capture) of(stream).capture = capture;
  return CUDA_SUCCESS;
}
CUresult cuEventCreate(CUevent* event, unsigned) {
  return *event = reinterpret_cast<CUevent>(new Event), CUDA_SUCCESS;
}
CUresult cuEventDestroy(CUevent event) {
  return delete reinterpret_cast<Event*>(event), CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
  auto* const recorded = reinterpret_cast<Event*>(event);
  recorded->capture = of(stream).capture;
  recorded->time = std::chrono::steady_clock::now();
  return CUDA_SUCCESS;
}
CUresult cuEventQuery(CUevent) { return CUDA_SUCCESS; }
CUresult cuEventSynchronize(CUevent) { return CUDA_SUCCESS; }
CUresult cuEventElapsedTime(float* ms, CUevent start, CUevent end) {
  const std::chrono::duration<float, std::milli> passed =
      reinterpret_cast<Event*>(end)->time - reinterpret_cast<Event*>(start)->time;
  return *ms = passed.count(), CUDA_SUCCESS;
}

CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode) {
  return of(stream).capture = std::make_shared<Graph>(), CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  *graph = reinterpret_cast<CUgraph>(new Graph(*of(stream).capture));
  of(stream).capture = nullptr;
  return CUDA_SUCCESS;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long) {
  *exec = reinterpret_cast<CUgraphExec>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec exec, CUstream) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Work& work : reinterpret_cast<Graph*>(exec)->works) work();
  return CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec exec) {
  return delete reinterpret_cast<Graph*>(exec), CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) {
  return delete reinterpret_cast<Graph*>(graph), CUDA_SUCCESS;
}

// Kernels are those linked into this library, whatever the image.
CUresult cuLibraryLoadData(CUlibrary* library, const void*, CUjit_option*, void**, unsigned,
                           CUlibraryOption*, void**, unsigned) {
  return *library = reinterpret_cast<CUlibrary>(&null_stream), CUDA_SUCCESS;
}
CUresult cuLibraryUnload(CUlibrary) { return CUDA_SUCCESS; }
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary, const char* name) {
  Dl_info own;
  dladdr(reinterpret_cast<void*>(&cuInit), &own);
  void* const address = dlsym(dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD), name);
  if (address == nullptr) return CUDA_ERROR_NOT_FOUND;
  for (const Parameters& parameters : kParameters) {
    if (strncmp(name, parameters.name, strlen(parameters.name)) != 0) continue;
    const std::lock_guard<std::mutex> lock(mutex);
    Kernel& known = kernels[name];
    known = {address, &parameters};
    return *kernel = reinterpret_cast<CUkernel>(&known), CUDA_SUCCESS;
  }
  return CUDA_ERROR_NOT_FOUND;
}
CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  return *function = reinterpret_cast<CUfunction>(kernel), CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params,
                          void**) {
  const Kernel kernel = *reinterpret_cast<Kernel*>(function);
  if (config->sharedMemBytes > kSharedBytes) return CUDA_ERROR_INVALID_VALUE;
  const Index grid{config->gridDimX, config->gridDimY, config->gridDimZ};
  const Index block{config->blockDimX, config->blockDimY, config->blockDimZ};
  const char* const first = static_cast<const char*>(params[0]);
  const std::vector<char> bytes(first, first + kernel.parameters->bytes);
  return submit(config->hStream, [=] { launch(kernel, grid, block, bytes.data()); });
}

}  // extern "C"
