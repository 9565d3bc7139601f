"""The built-in engine: llama.cpp's own HTTP server, from the `xllamacpp` wheel.

    python -m gpustack.worker.llama_server --model F --port P --api-key-file K [options]

Takes llama-server's option names. Exits 0 when told to end (SIGTERM, SIGINT), 1 when the model
cannot be served, 2 when an option is wrong; the last line on stderr then says why.

Imports nothing of gpustack but its options: an engine starts in the time that llama.cpp takes.
"""

import os
import signal
import stat
import sys
import time
from collections.abc import Sequence
from typing import Any, BinaryIO

from gpustack.worker.llama_options import OPTIONS, Choice, Refused, parsed

#: How much of a model file is searched for its pooling type. It stands in the header, whose size
#: is the vocabulary's: 10 MB for 262,144 tokens, the largest in use.
HEADER_BYTES = 64 * 2**20

#: How long llama.cpp's log may lag behind a failure, in seconds: its thread may have to wait for a
#: busy machine, and nothing else depends on it.
LOG_S = 3.0

#: Options that mean more than setting the attribute of their name.
_OWN = {"host", "port", "rerank", "chat_template_file"}


def apply(given: dict[str, Any], x: Any, params: Any) -> None:
    """Put what was given into llama.cpp's parameters.

    Raises:
        OSError: a file that an option names cannot be read.
        Refused: a value that no parser could judge is wrong.
    """
    params.n_parallel = -1  # llama-server's default: 4 slots that share the context
    for _, attribute, kind in OPTIONS:
        if attribute not in given or attribute in _OWN:
            continue
        value = given[attribute]
        target, _, last = attribute.rpartition(".")
        owner = params
        for part in filter(None, target.split(".")):
            owner = getattr(owner, part)
        setattr(owner, last, kind.value(x, value) if isinstance(kind, Choice) else value)
    params.model.path = given["model"]
    params.hostnames = [given.get("host", "127.0.0.1")]
    params.port = given.get("port", 8080)
    if "alias" in given:
        params.model_alias = set(given["alias"].split(","))
    if "api_key_file" in given:
        params.api_keys = _keys(given["api_key_file"])
    _apply_weights(given, x, params)
    _apply_requests(given, x, params)


def _apply_weights(given: dict[str, Any], x: Any, params: Any) -> None:
    """How the model's files are loaded."""
    if "tensor_split" in given:
        try:
            shares = [float(share) for share in given["tensor_split"].split(",")]
        except ValueError:
            raise Refused("argument --tensor-split: want shares such as 3,1") from None
        room = len(params.tensor_split)  # xllamacpp wants all of llama.cpp's array
        params.tensor_split = (shares + [0.0] * room)[:room]
    if "rope_scale" in given:
        params.rope_freq_scale = 1 / given["rope_scale"] if given["rope_scale"] else 0.0
    if "fit" in given:
        params.fit_params = given["fit"] == "on"
    if "mmap" in given or "mlock" in given:
        mode = ("MMAP_" if given.get("mmap", True) else "") + ("MLOCK" if "mlock" in given else "")
        params.load_mode = x.llama_load_mode["LLAMA_LOAD_MODE_" + (mode.strip("_") or "NONE")]
    adapters = [(path, "1") for path in given.get("lora", [])] + given.get("lora_scaled", [])
    found = []
    for path, scale in adapters:
        adapter = x.CommonAdapterLoraInfo()
        adapter.path = path
        try:
            adapter.scale = float(scale)
        except ValueError:
            raise Refused(
                f"argument --lora-scaled: want FILE and a number, got {scale!r}"
            ) from None
        found.append(adapter)
    params.lora_adapters = found


def _apply_requests(given: dict[str, Any], x: Any, params: Any) -> None:
    """How requests are answered."""
    if "timeout" in given:
        params.timeout_read = params.timeout_write = given["timeout"]
    if "chat_template_file" in given:
        with open(given["chat_template_file"], encoding="utf-8") as file:
            params.chat_template = file.read()
    if "reasoning" in given:
        params.enable_reasoning = {"on": 1, "off": 0, "auto": -1}[given["reasoning"]]
    if "speculative.draft.mparams.path" in given:
        kinds = x.common_speculative_type
        params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    if "rerank" in given:
        params.embedding = True
        params.pooling_type = x.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    elif params.embedding and "pooling_type" not in given and not names_pooling(given["model"]):
        # Without one, llama.cpp gives a vector per token, which is not OpenAI's answer.
        params.pooling_type = x.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN


def _keys(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        keys = [line.strip() for line in file if line.strip()]
    if not keys:
        # Without a key llama.cpp would answer anyone.
        raise Refused(f"argument --api-key-file: {path} has no key in it")
    return keys


def names_pooling(path: str) -> bool:
    """Whether the model's header says how token vectors become one."""
    key, seen = b".pooling_type", b""
    try:
        with open(path, "rb") as file:
            for _ in range(HEADER_BYTES // 2**20):
                chunk = file.read(2**20)
                if not chunk or key in seen[-len(key) :] + chunk:
                    return bool(chunk)
                seen = chunk
    except OSError:
        pass  # loading it says so better
    return False


def _log_size() -> int | None:
    """How much stands in the file that stderr goes to; None when it goes elsewhere."""
    facts = os.fstat(2)
    return facts.st_size if stat.S_ISREG(facts.st_mode) else None


def _last_words(since: int | None) -> str:
    """The first error that llama.cpp logged after `since`: what follows it is consequence.

    llama.cpp writes straight to stderr, and holds the interpreter's lock while it loads, so
    nothing of ours can stand between; but where stderr is a file it can be read again. A thread of
    llama.cpp's own writes, so its words may come after the failure: they are waited for.
    """
    if since is None:
        return "llama.cpp says why in the lines above"
    deadline = time.monotonic() + LOG_S
    try:
        with open("/dev/fd/2", "rb") as file:
            while not (errors := _errors(file, since)) and time.monotonic() < deadline:
                time.sleep(0.02)
    except OSError:
        return "llama.cpp says why in the lines above"
    return " ".join(errors[0].split()) if errors else "llama.cpp gave no reason"


def _errors(file: BinaryIO, since: int) -> list[str]:
    """The errors in llama.cpp's log after `since`, of lines that are written to their end."""
    file.seek(since)
    text = file.read(2**20).decode(errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [line.split(" E ", 1)[1] for line in lines if " E " in line[:24]]


def _serve(given: dict[str, Any]) -> int:
    try:
        import xllamacpp as x
    except ImportError as error:
        return _failed(1, f"the built-in engine needs the Python package xllamacpp: {error}")
    params = x.CommonParams()
    try:
        apply(given, x, params)
    except Refused as error:
        return _failed(2, str(error))
    except OSError as error:
        return _failed(1, f"cannot read {error.filename}: {error.strerror}")
    except (ValueError, TypeError, OverflowError) as error:
        return _failed(2, f"llama.cpp does not take an option's value: {error}")
    before = _log_size()
    try:
        server = x.Server(params)
    except RuntimeError:
        return _failed(1, f"cannot serve {params.model.path}: {_last_words(before)}")
    # From here on an order to end is a clean end. While llama.cpp loads, no Python code can run:
    # the signals' own defaults end the process at once then.
    for number in (signal.SIGTERM, signal.SIGINT):
        # Not through the destructor: it waits for the main loop, at times for ever.
        signal.signal(number, lambda *_: os._exit(0))
    while server is not None:
        _wait()
    return 0


def _wait() -> None:
    if hasattr(signal, "pause"):
        signal.pause()
    else:
        time.sleep(3600)  # Windows: a signal ends the sleep


def _failed(status: int, sentence: str) -> int:
    sys.stderr.write(f"error: {sentence}\n")
    return status


def main(argv: Sequence[str]) -> int:
    try:
        given = parsed(argv)
    except Refused as error:
        return _failed(2, str(error))
    return _serve(given)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # llama.cpp's threads have nothing left to say
