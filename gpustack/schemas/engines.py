"""The record that an agent keeps on disk of each engine that it runs."""

from pydantic import RootModel

from gpustack.schemas.base import Schema


class EngineRecord(Schema):
    """`<data-dir>/engines/<uid>.json`, mode 0600, replaced atomically.

    Written before the engine is spawned, completed after: a record without a pid is one whose
    engine may or may not exist, and is found by `GPUSTACK_ENGINE_UID` in its environment.

    Attributes:
        uid: random; adoption needs it, the pid and the start time.
        start_ticks: `lib.platform.start_ticks` of the pid.
        secret_file: what requests to the engine must show, in a file of its own (0600).
        argv: the command; it holds no secret.
        busy_gauges: its metrics whose sum is the number of requests that it has.
    """

    uid: str
    instance_id: int
    instance_name: str
    generation: int
    port: int
    secret_file: str
    log_file: str
    argv: list[str]
    health_path: str
    busy_gauges: list[str] = []
    restart_count: int = 0
    boot_id: str
    pid: int | None = None
    start_ticks: int | None = None


class Engine(Schema):
    """An engine as its agent shows it.

    Attributes:
        phase: of `worker.reconcile.Phase`; a word to read, not to branch on.
        restart_count: starts after the first.
        age_s: seconds since its process was started; None: it has none.
        log_bytes: of its present run's log, without what was cut from it.
    """

    instance_id: int
    instance_name: str
    phase: str
    pid: int | None = None
    port: int | None = None
    restart_count: int = 0
    age_s: float | None = None
    log_bytes: int = 0


class Engines(RootModel[list[Engine]]):
    """What runs on a worker, by instance."""
