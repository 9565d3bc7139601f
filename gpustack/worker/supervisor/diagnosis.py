"""What the end of an engine's log means, and the way out, in one sentence. PURE.

It only explains. A log may quote a prompt, so nothing is decided by it, and nothing of it is
repeated here but names of arguments, libraries, packages and architectures.

Sources of the words are in tests/worker/supervisor/test_diagnosis.py, with the logs they stood in.
"""

import re
from typing import Final, NamedTuple

from gpustack.lib import platform

#: Enough of a log's end for a Python traceback of several processes to be in it whole.
TAIL_BYTES: Final = 65536


class _Sign(NamedTuple):
    pattern: re.Pattern[str]
    meaning: str


def _sign(pattern: str, meaning: str) -> _Sign:
    return _Sign(re.compile(pattern, re.MULTILINE), meaning)


_PARAMETERS: Final = "correct the model's backend parameters"
_ARGUMENT: Final = r"(--?[A-Za-z0-9][\w-]{0,60})"
_GPU: Final = r"(?:CUDA|ROCm|HIP|CANN|MUSA|Vulkan|SYCL|Metal|NPU|XPU|MLU)"
_LIBRARY: Final = r"(?:\S*/)?([\w.+-]{1,80}\.so[\w.]{0,20})"

#: The first that is found counts: what ends an engine for certain stands before what it may only
#: have warned of. llama-box, for one, goes on after an argument that it does not know.
SIGNS: Final = (
    # --- arguments
    _sign(
        rf"error: (?:invalid|unknown) argument: {_ARGUMENT}"
        rf"|error: unrecognized arguments: {_ARGUMENT}"
        rf"|error: ambiguous option: {_ARGUMENT}"
        rf"|error: the built-in engine does not know {_ARGUMENT}",
        f"it does not know the argument {{}}; {_PARAMETERS}",
    ),
    _sign(
        rf"error: argument {_ARGUMENT}[/\w-]*: "
        rf"|error while handling argument \"{_ARGUMENT}\"",
        f"it does not take the value of {{}}; {_PARAMETERS}",
    ),
    # --- memory of devices
    _sign(
        r"Free memory on device[^\n]{0,80} is less than desired GPU memory utilization",
        "others hold memory of its GPU; end them, or lower --gpu-memory-utilization",
    ),
    _sign(
        r"No available memory for the cache blocks"
        r"|larger than the maximum number of tokens that can be stored in KV cache"
        r"|larger than the available KV cache memory",
        "its context does not fit into the GPU memory that the weights leave; lower "
        "--max-model-len, raise --gpu-memory-utilization, or give it more GPUs",
    ),
    _sign(
        rf"cudaMalloc failed: out of memory|{_GPU} error: out of memory"
        rf"|{_GPU} out of memory\. Tried to allocate|driver error:out of memory"
        rf"|(?:failed|unable) to allocate {_GPU}\d* buffer"
        r"|model inference out of memory when",
        "its device ran out of memory; lower the context length or the batch, or give it a device "
        "with more free memory, or several",
    ),
    # --- devices and drivers
    _sign(
        r"CUDA driver version is insufficient for CUDA runtime version"
        r"|unsupported display driver / cuda driver combination"
        r"|The NVIDIA driver on your system is too old",
        "the GPU's driver does not go with the engine's CUDA; update the driver, or use an engine "
        "built for the CUDA that it knows",
    ),
    _sign(
        r"no kernel image is available for execution on the device",
        "the engine was not built for this kind of GPU; use a build that was",
    ),
    _sign(
        r"Bfloat16 is only supported on GPUs with compute capability",
        "this GPU has no bfloat16; add the backend parameter --dtype=half",
    ),
    _sign(
        r"invalid device ordinal|Set visible device failed, invalid device=|Invalid device ID\.",
        "it cannot see the device that it is to use; look whether the driver shows it and whether "
        "the model's variables hide it (CUDA_VISIBLE_DEVICES, ASCEND_RT_VISIBLE_DEVICES)",
    ),
    _sign(
        r"uncorrectable ECC error encountered|GPU is lost",
        "its GPU has failed; look for Xid errors in dmesg, and reset or replace it",
    ),
    # --- libraries
    _sign(
        r"(?:error while loading shared libraries|ImportError|OSError): (?:\S*/)?"
        r"((?:libcuda|libnvidia-ml|libascend_hal|libdrvdsmi_host)\.so[\w.]{0,20}): cannot open",
        "{} is missing, which comes with the device's driver; install the driver, or let the "
        "container see it",
    ),
    _sign(
        rf"(?:error while loading shared libraries|ImportError|OSError): {_LIBRARY}: cannot open",
        "the library {} is missing; install what has it, or name its folder in LD_LIBRARY_PATH",
    ),
    _sign(
        r"version `(GLIBC(?:XX)?_[\d.]{1,12})' not found",
        "this system lacks {}, which the engine was built for; use a newer system or image, "
        "or an engine built for this system",
    ),
    _sign(
        r"ModuleNotFoundError: No module named '([\w.]{1,60})'",
        "the Python package {} is missing; install it where the engine is installed",
    ),
    _sign(
        r"undefined symbol: \w",
        "its libraries are of versions that do not go together; install the engine anew",
    ),
    # --- the model
    _sign(
        r"unknown model architecture: '([\w.-]{1,60})'"
        r"|Model architectures \['(\w{1,60})'\] are not supported",
        "this version of the engine does not know the architecture {}; use a newer one",
    ),
    _sign(
        r"does not recognize this architecture",
        "this version of the engine does not know the model's architecture; use a newer one",
    ),
    _sign(
        r"model is corrupted or incomplete|invalid magic (?:characters|number)"
        r"|wrong number of tensors; expected \d+, got \d+"
        r"|MetadataIncompleteBuffer|Error while deserializing header",
        "the model's file is broken, or is none of this engine's; remove it and have it fetched "
        "again",
    ),
    _sign(
        r"`?trust_remote_code=True`? to",
        "the model brings code of its own; if you trust it, add the backend parameter "
        "--trust-remote-code",
    ),
    _sign(
        r"does not support logits computation",
        "this model ranks or embeds; give it the category reranker or embedding",
    ),
    _sign(
        r"attention heads \(\d+\) must be divisible by tensor parallel size",
        "the model's attention heads cannot be shared evenly by so many GPUs; take 1, 2, 4 or 8",
    ),
    # --- the machine
    _sign(
        r"insufficient memory \(attempted to allocate"
        r"|ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate"
        r"|failed to allocate CPU buffer|std::bad_alloc|^MemoryError|DefaultCPUAllocator: "
        r"|Cannot allocate memory",
        "the worker's memory does not suffice; lower the context length or the parallel requests, "
        "or give it a worker with more memory",
    ),
    _sign(
        r"No space left on device",
        "a disk of the worker, or its /dev/shm, is full; make room there",
    ),
    _sign(
        r"Too many open files",
        "it may not open so many files; raise the limit (LimitNOFILE, ulimit -n)",
    ),
    # --- what other failures may have beside them
    _sign(
        r"no (?:CUDA|ROCm)-capable device is detected|No (?:CUDA|HIP) GPUs are available"
        r"|Found no NVIDIA driver on your system|Failed to infer device type",
        "it found no GPU; look whether the driver works (nvidia-smi, rocm-smi, npu-smi) and "
        "whether this user or container may use the device",
    ),
    _sign(
        rf"^(?:Invalid|Unknown) argument: {_ARGUMENT}",
        f"it does not know the argument {{}}; {_PARAMETERS}",
    ),
)

_OUT_OF_MEMORY: Final = (
    "the kernel ended a process because memory ran out; lower the context length or the parallel "
    "requests, or give it a worker or a container with more memory"
)
#: By the signal that ended it. A shell that ran it says 128 more.
_SIGNALS: Final = {
    "SIGKILL": "perhaps the kernel did so because memory ran out: dmesg on the worker says so",
    "SIGILL": "this CPU lacks instructions that the engine was built for (AVX2, perhaps); use "
    "a build for it, or show the virtual machine the host's CPU",
    "SIGBUS": "a file that it had mapped became shorter or cannot be read, or /dev/shm is "
    "full; look at the worker's disks, and fetch the model again",
}


def explain(text: str, *, code: int | None = None, oom_killed: bool | None = None) -> str | None:
    """Why an engine failed, and the way out; None: nobody knows.

    Args:
        text: the end of its log, without control characters.
        code: its exit code; negative for a signal.
        oom_killed: whether the kernel says that it ended a process for lack of memory just then,
            the engine's or another's; None: it says nothing.
    """
    ended_by = "" if code is None else platform.signal_name(-code if code < 0 else code - 128)
    if oom_killed and ended_by == "SIGKILL":
        return _OUT_OF_MEMORY
    for pattern, meaning in SIGNS:
        found = None
        for match in pattern.finditer(text):
            found = match  # the last one is about the end
        if found is not None:
            return meaning.format(next(filter(None, found.groups()), ""))
    if oom_killed:
        return _OUT_OF_MEMORY  # of one of its processes, in all likelihood: the log knows no more
    if ended_by == "SIGKILL" and oom_killed is not None:
        return None  # the kernel counts, and it was not that
    return _SIGNALS.get(ended_by)
