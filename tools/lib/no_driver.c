/* A CUDA driver on which nothing ever runs: just enough for torch to load beside it and to count devices.

   gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 no_driver.c -o libcuda.so.1

   Loaded with RTLD_GLOBAL before torch it answers in place of the runtime's functions of the same names. What
   is asked on the way to a fake tensor succeeds; what would make a context or run a kernel is refused. */

#define SUCCEEDS(name) int name() { return 0; }
#define REFUSES(name) int name() { return 3; } /* CUDA_ERROR_NOT_INITIALIZED */

static int devices = 1;
static __thread int current = 0;

void set_devices(int count) { devices = count; }

/* the runtime */
int cudaGetDeviceCount(int *count) { *count = devices; return 0; }
int cudaGetDevice(int *device) { *device = current; return 0; }
int cudaSetDevice(int device) { current = device; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13020; return 0; }
int cudaStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)1; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return 0;
}
SUCCEEDS(cudaEventRecord) SUCCEEDS(cudaEventDestroy) SUCCEEDS(cudaEventQuery) SUCCEEDS(cudaEventSynchronize)
SUCCEEDS(cudaStreamWaitEvent) SUCCEEDS(cudaStreamQuery) SUCCEEDS(cudaStreamSynchronize)
SUCCEEDS(cudaDeviceSynchronize) SUCCEEDS(cudaGetLastError) SUCCEEDS(cudaPeekAtLastError)

/* the driver: the names that torch's libraries want to find */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = *active = 0; return 0; }
REFUSES(cuInit) REFUSES(cuCtxGetCurrent) REFUSES(cuCtxSetCurrent) REFUSES(cuDeviceGet)
REFUSES(cuDeviceGetAttribute) REFUSES(cuDevicePrimaryCtxRetain) REFUSES(cuFuncGetAttribute)
REFUSES(cuFuncSetAttribute) REFUSES(cuFuncSetCacheConfig) REFUSES(cuGetErrorString)
REFUSES(cuLaunchCooperativeKernel) REFUSES(cuLaunchKernel) REFUSES(cuLinkAddData_v2) REFUSES(cuLinkComplete)
REFUSES(cuLinkCreate_v2) REFUSES(cuModuleGetFunction) REFUSES(cuModuleLoad) REFUSES(cuModuleLoadData)
REFUSES(cuModuleLoadDataEx) REFUSES(cuModuleUnload) REFUSES(cuOccupancyMaxActiveBlocksPerMultiprocessor)
REFUSES(cuPointerGetAttribute) REFUSES(cuTensorMapEncodeTiled)
