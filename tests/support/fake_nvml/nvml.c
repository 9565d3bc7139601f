/* A library that looks like NVML, for tests of who calls it. One card; it does what the file that
 * the variable FAKE_NVML names says: "ok", "lost", "crash", "hang" or "mismatch". An Xid error 79 is
 * reported once, at the second look. Signatures and structures: nvml.h of the CUDA toolkit. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, NOT_SUPPORTED = 3, TIMEOUT = 10, LOST = 15, MISMATCH = 18 };

typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_t;
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

int nvmlInitWithFlags(unsigned flags) { return mode() == 'm' ? MISMATCH : OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) {
    return code == LOST ? "GPU is lost" : code == MISMATCH ? "Driver/library version mismatch"
         : code == NOT_SUPPORTED ? "Not Supported" : "Some error";
}
int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "1.2.3"); return OK; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12040; return OK; }
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
int nvmlDeviceGetName(void *device, char *text, unsigned size) { snprintf(text, size, "Fake card"); return OK; }
int nvmlDeviceGetMemoryInfo_v2(void *device, memory_t *memory) {
    memory->total = 80ull << 30; memory->reserved = 1 << 20; memory->used = 3ull << 30;
    return OK;
}
int nvmlDeviceGetUtilizationRates(void *device, utilization_t *rates) { rates->gpu = 42; rates->memory = 7; return OK; }
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) { *celsius = 55; return OK; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { *milliwatts = 123456; return OK; }
int nvmlDeviceGetArchitecture(void *device, unsigned *architecture) { *architecture = 9; return OK; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return OK; }
int nvmlDeviceGetTotalEccErrors(void *device, int type, int counter, unsigned long long *count) { return NOT_SUPPORTED; }
int nvmlDeviceGetSupportedEventTypes(void *device, unsigned long long *types) { *types = 8; return OK; }
int nvmlEventSetCreate(void **set) { *set = &events; return OK; }
int nvmlEventSetFree(void *set) { return OK; }
int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set) { heard = 1; return OK; }
int nvmlEventSetWait_v2(void *set, event_t *event, unsigned timeout_ms) {
    if (!heard || looks != 2) return TIMEOUT;
    heard = 0;
    memset(event, 0, sizeof *event);
    event->device = &card; event->type = 8; event->data = 79; event->gi = event->ci = 0xffffffff;
    return OK;
}
