"""PURE: from what changed of a row to what the audit log says of it.

The one place that makes entries, so no handler can forget one; and the one place that says which
columns may be shown, so no secret gets into the log.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from gpustack.backends.parameters import flat
from gpustack.schemas import wire
from gpustack.schemas.audit import Action
from gpustack.schemas.credentials import CredentialKind
from gpustack.server.db import tables
from gpustack.server.db.diffs import Diff

STARS: Final = "********"
#: A longer value is cut: a description may be a book.
VALUE_LIMIT: Final = 4000


@dataclass(frozen=True)
class Subject:
    """What of a table's rows is audited. Nothing else of them ever reaches the log.

    Attributes:
        name: the column that people know a row by.
        columns: shown as they are.
        secret: shown as stars: column -> what to call it.
        omitted: the server's or a worker's, or nobody's business.
    """

    kind: str
    name: str
    columns: frozenset[str]
    omitted: frozenset[str]
    secret: Mapping[str, str] = field(default_factory=dict)

    def values(self, diff: Diff, *, before: bool) -> dict[str, Any]:
        """What is audited of the row, as it was or as it is."""
        if (diff.made and before) or (diff.gone and not before):
            return {}
        values = {name: _read(diff, name, before=before) for name in self.columns}
        return values | {
            shown: _Hidden(_read(diff, name, before=before)) for name, shown in self.secret.items()
        }


def _read(diff: Diff, column: str, *, before: bool) -> Any:
    return diff.was(column) if before else getattr(diff.row, column)


@dataclass(frozen=True)
class _Hidden:
    """Something secret: compared, never shown."""

    value: Any


AUDITED: Final[Mapping[type, Subject]] = {
    tables.Model: Subject(
        wire.MODELS,
        "name",
        frozenset(
            {"name", "description", "replicas", "placement_strategy", "worker_selector",
             "restart_on_error", "access_policy"}
        ),
        frozenset(
            {"id", "revision", "generation", "rollout_message", "deleting", "created_at",
             "updated_at"}
        ),
    ),
    tables.Instance: Subject(
        wire.INSTANCES,
        "name",
        frozenset({"name", "model_id", "worker_id"}),
        frozenset(
            {"id", "revision", "version_id", "generation", "claim", "secret", "reported_state",
             "state_message", "observed_generation", "port", "pid", "restart_count",
             "download_progress", "reasons", "deleting", "lost", "replaced_by",
             "fallback_version_id", "created_at", "updated_at"}
        ),
    ),
    tables.Worker: Subject(
        wire.WORKERS,
        "name",
        frozenset(
            {"name", "ip", "port", "admin_labels", "scheduling", "scheduling_reason"}
        ),
        frozenset(
            {"id", "revision", "generation", "hostname", "machine_id", "boot_id", "run_id",
             "labels", "system_reserved_ram_bytes", "system_reserved_vram_bytes", "version",
             "certificate", "proxy_mode", "unreached", "facts", "cpu_percent",
             "memory_used_bytes", "host_used", "devices_used", "gpu_percent", "vram_used_bytes",
             "heartbeat_at", "agent_secret", "silent", "lost", "grace_ends_at", "created_at",
             "updated_at"}
        ),
    ),
    tables.ModelFile: Subject(
        wire.MODEL_FILES,
        "name",
        frozenset(
            {"worker_id", "source", "huggingface_repo_id", "huggingface_filename", "local_path"}
        ),
        frozenset(
            {"id", "revision", "source_digest", "generation", "reported_state", "state_message",
             "observed_generation", "size", "download_progress", "resolved_paths", "deleting",
             "created_at", "updated_at"}
        ),
    ),
    tables.User: Subject(
        "users",
        "username",
        frozenset(
            {"username", "full_name", "avatar_url", "source", "is_admin", "is_active",
             "require_password_change"}
        ),
        frozenset({"id", "generation", "created_at"}),
        {"password_hash": "password"},
    ),
    tables.Group: Subject(
        "groups",
        "name",
        frozenset({"name", "description"}),
        frozenset({"id", "generation", "created_at"}),
    ),
    tables.Credential: Subject(
        wire.API_KEYS,
        "name",
        frozenset(
            {"name", "description", "prefix", "user_id", "scopes", "allowed_model_names",
             "expires_at"}
        ),
        frozenset(
            {"id", "revision", "generation", "kind", "digest", "worker_id", "reusable",
             "provider_session", "last_used_at", "created_at"}
        ),
    ),
    tables.Cluster: Subject(
        "cluster",
        "cluster_id",
        frozenset({"cluster_id"}),
        frozenset({"id", "epoch"}),
        {"token_digest": "token"},
    ),
}  # fmt: skip

#: What is audited of those credentials that let workers register.
JOIN_TOKEN: Final = Subject(
    "join-tokens",
    "prefix",
    frozenset({"prefix", "description", "reusable", "expires_at"}),
    frozenset(
        {"id", "revision", "generation", "kind", "digest", "name", "user_id", "worker_id",
         "scopes", "allowed_model_names", "provider_session", "last_used_at", "created_at"}
    ),
)  # fmt: skip

#: Tables without changes by people, each with whose they are.
NOT_AUDITED: Final[Mapping[type, str]] = {
    tables.AuditChain: "the audit log's",
    tables.AuditEntry: "the audit log's",
    tables.Change: "the history of all changes",
    tables.Counter: "the history's",
    tables.Device: "the workers'",
    tables.Event: "what happened",
    tables.GroupMember: "audited as its group",
    tables.Identity: "made with its user",
    tables.Lease: "the servers'",
    tables.LoadSample: "what was measured",
    tables.Member: "the scheduler's and the workers'",
    tables.ModelGroup: "audited as its model",
    tables.ModelUser: "audited as its model",
    tables.ModelVersion: "audited as its model",
    tables.SamlMessage: "identity providers'",
    tables.Usage: "the gateways'",
    tables.UsageHour: "the gateways'",
    tables.UsageSpool: "the gateways'",
}


@dataclass
class Entry:
    """One change that is to be written."""

    action: Action
    kind: str
    object_id: int | None
    name: str
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)

    def changed(self) -> dict[str, dict[str, Any]]:
        names = sorted({*self.before, *self.after})
        return {
            name: {"before": _shown(self.before.get(name)), "after": _shown(self.after.get(name))}
            for name in names
            if self.before.get(name) != self.after.get(name)
        }


def entries(
    diffs: Iterable[Diff], specs_before: Mapping[int, Mapping[str, Any]]
) -> Iterator[Entry]:
    """What people are told of a transaction's changes, one entry per object.

    Args:
        specs_before: by model, of those that got a version: the spec of the one before.
    """
    made: dict[tuple[str, int], Entry] = {}
    versions: list[tables.ModelVersion] = []
    for diff in diffs:
        if isinstance(diff.row, tables.ModelVersion):
            versions += [diff.row] if diff.made else []
        elif (entry := _entry(diff)) is not None:
            made[entry.kind, entry.object_id or 0] = entry
    for version in versions:
        if (entry := made.get((wire.MODELS, version.model_id))) is not None:
            entry.before |= _spec(specs_before.get(version.model_id, {}))
            entry.after |= _spec(version.spec)
    yield from made.values()


def _entry(diff: Diff) -> Entry | None:
    row, subject = diff.row, _subject(diff.row)
    action = _action(diff, subject) if subject is not None else None
    if subject is None or action is None:
        return None
    before = subject.values(diff, before=True)
    after = {} if action is Action.DELETE else subject.values(diff, before=False)
    return Entry(action, subject.kind, row.id, getattr(row, subject.name), before, after)


def _subject(row: object) -> Subject | None:
    if isinstance(row, tables.Credential) and row.kind != CredentialKind.KEY:
        return JOIN_TOKEN if row.kind == CredentialKind.JOIN else None
    return AUDITED.get(type(row))


def _action(diff: Diff, subject: Subject) -> Action | None:
    if diff.made:
        return Action.CREATE
    if diff.gone or ("deleting" in subject.omitted and diff.changed("deleting")):
        return Action.DELETE
    if isinstance(diff.row, tables.Instance | tables.ModelFile) and diff.changed("generation"):
        return Action.RETRY
    # A generation moves for what stands elsewhere too: in a model's versions.
    named = {*subject.columns, *subject.secret, *(subject.omitted & {"generation"})}
    return Action.UPDATE if diff.changed(*named) else None


# --- values ----------------------------------------------------------------------------------


def _spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A version's spec, without what may be secret in it."""
    shown = dict(spec)
    if "env" in shown:
        shown["env"] = {name: _Hidden(value) for name, value in shown["env"].items()}
    if "backend_parameters" in shown:
        shown["backend_parameters"] = list(_parameters(shown["backend_parameters"]))
    return shown


def _parameters(parameters: Sequence[str]) -> Iterator[Any]:
    """Values of parameters such as --api-key and --hf-token are hidden, in every spelling."""
    is_value = False
    for word in flat(parameters):
        name, equals, value = word.partition("=")
        is_secret = name.startswith("-") and not _SECRET_WORDS.isdisjoint(
            name.lower().replace("_", "-").split("-")
        )
        if is_value and not name.startswith("-"):
            yield _Hidden(word)
        elif is_secret and equals:
            yield _HiddenValue(value, f"{name}={STARS}")
        else:
            yield word
        is_value = is_secret and not equals


_SECRET_WORDS: Final = {
    "key", "apikey", "token", "hft", "secret", "password", "credential", "credentials"
}  # fmt: skip


@dataclass(frozen=True)
class _HiddenValue(_Hidden):
    """Something secret in a text that is not."""

    shown: str = STARS


def _shown(value: Any) -> Any:
    """As the log keeps it."""
    plain = json.loads(json.dumps(value, default=_unknown))
    text = json.dumps(plain, ensure_ascii=False)
    return plain if len(text) <= VALUE_LIMIT else f"{text[:VALUE_LIMIT]}…"


def _unknown(value: object) -> str | None:
    match value:
        case _HiddenValue():
            return value.shown
        case _Hidden():
            return None if value.value is None else STARS
        case datetime():
            return value.isoformat()
    raise TypeError(f"the audit log has no words for {type(value).__name__}")
