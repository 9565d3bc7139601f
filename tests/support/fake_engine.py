"""A program that takes llama-server's place on a worker of a test: a real process, and quick.

What it does is told by FAKE in its environment (`VersionSpec.env`), words separated by spaces:

    exit=CODE        print last words and exit with CODE
    exit-if=PATH     the same while PATH exists
    deaf-if=PATH     answer 503 while PATH exists
    busy-if=PATH     its metrics tell of a request while PATH exists; each look at them is logged
    mute             its metrics say nothing
    delay=SECONDS    wait before listening
    post=STATUS      answer requests for work with STATUS and a sentence
    later-if=PATH    while PATH exists requests for work get 503
    held-if=PATH     while PATH exists requests for work are never answered
    still-if=PATH    while PATH exists its count of work done stays as it is
    uncounted        its metrics do not say how many requests it has
    stubborn         it and a child of it ignore SIGTERM; the child's pid is in the log
    away             the child has left the engine's process group
    say=TEXT         print TEXT first
    child            start a child in the same process group, and fail when that ends
    child-apart      the same, in a session of the child's own
    pace=SECONDS     wait between two tokens of a stream
    hurry-if=PATH    do not, while PATH exists

A chat is answered with `max_tokens` words made from its last message (`words`), the engine's pid as
`system_fingerprint`.
"""

import os
import sys
from pathlib import Path

from gpustack.schemas.models import Source, VersionSpec

SCRIPT = """
import _thread, os, signal, socket, sys, time

argv = sys.argv[1:]
port = int(argv[argv.index("--port") + 1])
secret = open(argv[argv.index("--api-key-file") + 1]).read().strip()
told = dict((w.split("=", 1) + [""])[:2] for w in os.environ.get("FAKE", "").split(" ") if w)
def say(*words):
    print(*words, flush=True)
def fail(code):
    say("\\x1b[31merror\\x1b[0m: cannot load model: magic mismatch")
    sys.exit(code)
say("started", os.getpid(), "with", *argv)
if "say" in told: say(told["say"])
if "exit" in told: fail(int(told["exit"]))
if "exit-if" in told and os.path.exists(told["exit-if"]): fail(1)
if "stubborn" in told:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        if "away" in told: os.setsid()
        say("grandchild", os.getpid())
        while True: time.sleep(60)
if "child" in told or "child-apart" in told:
    signal.signal(signal.SIGCHLD, lambda *_: (say("the child has ended"), os._exit(1)))
    if os.fork() == 0:
        if "child-apart" in told: os.setsid()
        while True: time.sleep(60)
time.sleep(float(told.get("delay", 0)))
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
try:
    listener.bind(("127.0.0.1", port))
except OSError as error:
    say(error)
    sys.exit(1)
listener.listen(256)
held, work = [], 0
def there(word):
    return word in told and os.path.exists(told[word])
def chat(peer, body):
    import json
    asked = json.loads(body)
    prompt = (asked["messages"] or [{"content": ""}])[-1]["content"]
    texts = [f"{prompt}/{n} " for n in range(asked.get("max_tokens", 1))]
    facts = {"id": f"{os.getpid()}-{peer.fileno()}", "system_fingerprint": str(os.getpid()),
             "object": "chat.completion", "created": 0, "model": asked["model"]}
    def choice(**more): return [{"index": 0, "finish_reason": None, **more}]
    if not asked.get("stream"):
        said = choice(message={"role": "assistant", "content": "".join(texts)})
        return json.dumps(facts | {"choices": said})
    peer.sendall(b"HTTP/1.1 200 OK\\r\\ncontent-type: text/event-stream\\r\\n"
                 b"connection: close\\r\\ntransfer-encoding: chunked\\r\\n\\r\\n")
    def chunk(data): peer.sendall(b"%x\\r\\n%b\\r\\n" % (len(data), data))
    facts["object"] = "chat.completion.chunk"
    events = [choice(delta={"content": text}) for text in texts]
    for choices in (*events, choice(delta={}, finish_reason="stop")):
        chunk(b"data: " + json.dumps(facts | {"choices": choices}).encode() + b"\\n\\n")
        if not os.path.exists(told.get("hurry-if", "")): time.sleep(float(told.get("pace", 0)))
    chunk(b"data: [DONE]\\n\\n")
    chunk(b"")
def answer(peer):
    global work
    head = b""
    while b"\\r\\n\\r\\n" not in head:
        more = peer.recv(4096)
        if not more: break
        head += more
    rest = head.partition(b"\\r\\n\\r\\n")[2]
    sized = head.lower().partition(b"content-length: ")[2].split(b"\\r")[0]
    while sized and len(rest) < int(sized): rest += peer.recv(4096)
    status = "200 OK"
    if f"authorization: bearer {secret}".encode() not in head.lower(): status = "401 No"
    elif there("deaf-if"): status = "503 Busy"
    body = ""
    if head.startswith(b"GET /metrics "):
        say("metrics")
        work += not there("still-if")
        body = f"# gauge\\nllamacpp:requests_processing {there('busy-if'):d}\\n"
        if "uncounted" in told: body = ""
        body += f"llamacpp:n_decode_total {work}\\n"
        if "mute" in told: body = ""
    elif head.startswith(b"POST "):
        say("asked", head.split()[1].decode(), rest.decode())
        if there("held-if"):
            held.append(peer)
            return
        if there("later-if"): status = "503 Later"
        if "post" in told:
            status = told["post"] + " X"
            body = '{"error": {"message": "head_dim=16 is not supported"}}'
        elif head.startswith(b"POST /v1/chat/completions ") and status == "200 OK":
            body = chat(peer, rest)
            if body is None: return
    kind = "application/json" if body.startswith("{") else "text/plain"
    peer.sendall(f"HTTP/1.1 {status}\\r\\ncontent-type: {kind}\\r\\nconnection: close\\r\\n"
                 f"content-length: {len(body)}\\r\\n\\r\\n{body}".encode())
def serve(peer):
    try: answer(peer)
    except OSError: pass  # it has left
    finally:
        if peer not in held: peer.close()
while True:
    _thread.start_new_thread(serve, (listener.accept()[0],))
"""


def install(bin_dir: Path, name: str = "llama-server") -> Path:
    """Put the program into `bin_dir`, where agents look for engines."""
    bin_dir.mkdir(parents=True, exist_ok=True)
    path = bin_dir / name
    # Without site: a start in 15 ms instead of 50.
    path.write_text(f"#!{sys.executable} -IS\n{SCRIPT}")
    path.chmod(0o755)
    return path


def spec(folder: Path, fake: str = "", **more: object) -> VersionSpec:
    """A version that runs it; the model's file is there."""
    file = folder / "m.gguf"
    if not file.exists():
        file.write_bytes(b"GGUF")
    facts = {"source": Source.LOCAL_PATH, "local_path": os.fspath(file), "env": {"FAKE": fake}}
    return VersionSpec.model_validate({**facts, **more})


def words(prompt: str, count: int) -> str:
    """What it answers."""
    return "".join(f"{prompt}/{number} " for number in range(count))
