/* A library that looks like NVML, for tests of who calls it. One card; it does what the file that
 * the variable FAKE_NVML names says: "ok", "lost", "crash", "hang" or "mismatch". An Xid error 79 is
 * reported once, at the second look. "recorded" and "busy": what an NVIDIA H200 said, driver 580.159.04,
 * NVML 13, with nobody on it and with a process that took 512 MiB; its UUID is left out, and heat and
 * power, which change all the time, are as nvidia-smi said them, in the units of NVML.
 * Signatures and structures: nvml.h of the CUDA toolkit. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, NOT_SUPPORTED = 3, TOO_SMALL = 7, TIMEOUT = 10, LOST = 15, MISMATCH = 18 };

typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_t;
typedef struct { unsigned long long total, free, used; } memory_v1_t;
typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } process_t;
typedef struct { unsigned gpu, memory; } utilization_t;
typedef struct { void *device; unsigned long long type, data; unsigned gi, ci; } event_t;

static int card, events, looks, heard;

static char mode(void) {
    char first = 'o';
    FILE *file = fopen(getenv("FAKE_NVML"), "r");
    if (file) {
        if (fread(&first, 1, 1, file) != 1) first = 'o';
        fclose(file);
    }
    return first;
}

static int is_h200(void) { return mode() == 'r' || mode() == 'b'; }

/* Of the H200: what the driver keeps for itself, what is used beside it, and what one process has. */
enum { RESERVED = 644939776, USED = 1734213632 - RESERVED, OF_PROCESS = 1080033280 };

int nvmlInitWithFlags(unsigned flags) { return mode() == 'm' ? MISMATCH : OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) {
    return code == LOST ? "GPU is lost" : code == MISMATCH ? "Driver/library version mismatch"
         : code == NOT_SUPPORTED ? "Not Supported" : "Some error";
}
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    snprintf(text, size, is_h200() ? "580.159.04" : "1.2.3");
    return OK;
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = is_h200() ? 13000 : 12040; return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { looks++; *count = 1; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    char now = mode();
    if (now == 'c') raise(SIGSEGV);
    if (now == 'h') for (;;) pause();
    if (now == 'l') return LOST;
    *handle = &card;
    return OK;
}
int nvmlDeviceGetUUID(void *device, char *text, unsigned size) { snprintf(text, size, "GPU-fake"); return OK; }
int nvmlDeviceGetName(void *device, char *text, unsigned size) {
    snprintf(text, size, is_h200() ? "NVIDIA H200" : "Fake card");
    return OK;
}
int nvmlDeviceGetMemoryInfo_v2(void *device, memory_t *memory) {
    memory->total = is_h200() ? 150754820096 : 80ull << 30;
    memory->reserved = is_h200() ? RESERVED : 1 << 20;
    memory->used = is_h200() ? (mode() == 'b' ? USED : 0) : 3ull << 30;
    memory->free = memory->total - memory->reserved - memory->used;
    return OK;
}
/* Its "used" has what is reserved in it. */
int nvmlDeviceGetMemoryInfo(void *device, memory_v1_t *memory) {
    memory_t other;
    nvmlDeviceGetMemoryInfo_v2(device, &other);
    memory->total = other.total; memory->free = other.free; memory->used = other.used + other.reserved;
    return OK;
}
int nvmlDeviceGetUtilizationRates(void *device, utilization_t *rates) {
    rates->gpu = is_h200() ? 0 : 42; rates->memory = is_h200() ? 0 : 7;
    return OK;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) { *celsius = is_h200() ? 37 : 55; return OK; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { *milliwatts = is_h200() ? 119120 : 123456; return OK; }
int nvmlDeviceGetArchitecture(void *device, unsigned *architecture) { *architecture = 9; return OK; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return OK; }
int nvmlDeviceGetTotalEccErrors(void *device, int type, int counter, unsigned long long *count) {
    *count = 0;
    return is_h200() ? OK : NOT_SUPPORTED;
}
int nvmlDeviceGetRemappedRows(void *device, unsigned *corrected, unsigned *not, unsigned *waits, unsigned *failed) {
    *corrected = *not = *waits = *failed = 0;
    return is_h200() ? OK : NOT_SUPPORTED;
}
int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *reasons) {
    *reasons = 1; /* idle */
    return is_h200() ? OK : NOT_SUPPORTED;
}
int nvmlDeviceGetMigMode(void *device, unsigned *now, unsigned *later) {
    *now = *later = 0;
    return is_h200() ? OK : NOT_SUPPORTED;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process_t *processes) {
    if (!is_h200()) return NOT_SUPPORTED;
    if (mode() != 'b') { *count = 0; return OK; }
    if (*count < 1) { *count = 1; return TOO_SMALL; }
    *count = 1;
    processes[0].pid = 446; processes[0].used = OF_PROCESS; processes[0].gi = processes[0].ci = 0xffffffff;
    return OK;
}
int nvmlDeviceGetSupportedEventTypes(void *device, unsigned long long *types) { *types = is_h200() ? 65439 : 8; return OK; }
int nvmlEventSetCreate(void **set) { *set = &events; return OK; }
int nvmlEventSetFree(void *set) { return OK; }
int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set) { heard = 1; return OK; }
int nvmlEventSetWait_v2(void *set, event_t *event, unsigned timeout_ms) {
    if (!heard || looks != 2 || is_h200()) return TIMEOUT;
    heard = 0;
    memset(event, 0, sizeof *event);
    event->device = &card; event->type = 8; event->data = 79; event->gi = event->ci = 0xffffffff;
    return OK;
}
