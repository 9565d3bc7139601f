"""`gpustack models`: list, deploy, roll back, grant, delete."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpustack.cli.connection import Connection, connected
from gpustack.cli.tables import as_json, show
from gpustack.cli.words import line, typed
from gpustack.errors import Invalid

if TYPE_CHECKING:
    from gpustack.client import Client
    from gpustack.schemas.access import ModelAccess
    from gpustack.schemas.models import Model, ModelCreate, ModelVersion

CATEGORIES = ("llm", "embedding", "reranker")


@click.group()
def models() -> None:
    """List, deploy, roll back, grant and delete models."""


@models.command("list")
@as_json
@connected
def list_models(server: Connection, as_json: bool) -> None:
    """List models: what was deployed, and how much of it answers."""

    async def act(client: "Client") -> "list[Model]":
        return await client.models.list()

    show(
        server.run(act),
        ("ID", "NAME", "READY", "SOURCE", "STATE"),
        lambda m: (m.id, m.name, f"{m.ready_replicas}/{m.replicas}", m.location, _state(m)),
        as_json=as_json,
    )


def _state(model: "Model") -> str:
    if model.deleting:
        return "deleting"
    if model.state_message:
        return model.state_message
    if len(model.rollout.versions) > 1:
        return "rolling"
    return "running" if model.ready_replicas >= model.replicas else "starting"


@models.command()
@click.argument("name")
@click.argument("source", required=False)
@click.option("--local-path", metavar="FILE", help="A file or folder on the workers.")
@click.option("--huggingface-repo-id", metavar="ORG/REPO", help="A repository of the Hub.")
@click.option("--huggingface-filename", metavar="FILE", help="One of its files, or a pattern.")
@click.option("--replicas", type=click.IntRange(0, 1000), default=1, show_default=True)
@click.option("--category", "categories", multiple=True, type=click.Choice(CATEGORIES))
@click.option("--backend", metavar="NAME", help="Engine; by default by the model's files.")
@click.option("--backend-parameter", "backend_parameters", multiple=True, metavar="--NAME=VALUE",
              help="For the engine; repeatable.")  # fmt: skip
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE",
              help="For the engine's environment; repeatable.")  # fmt: skip
@click.option("--wait", is_flag=True, help="Return once every replica answers.")
@connected
def deploy(
    server: Connection, name: str, source: str | None, wait: bool, variables: tuple[str, ...],
    **spec: Any,
) -> None:  # fmt: skip
    """Deploy a model under NAME.

    SOURCE is a path such as /models/m.gguf or a repository such as org/repo:*Q4_K_M.gguf.
    """
    made = creation(name, source, variables, **spec)

    async def act(client: "Client") -> None:
        model = await client.models.create(made)
        click.echo(f"model {line(model.name)} is deployed", err=True)
        if wait:
            from gpustack.cli.waiting import until_running

            await until_running(client, model, lambda words: click.echo(line(words), err=True))

    server.run(act)


def creation(
    name: str, source: str | None, variables: tuple[str, ...] = (), **spec: Any
) -> "ModelCreate":
    """The request that the command line means.

    Raises:
        Invalid: it contradicts itself, or lacks something.
        ValidationError: a value is impossible.
    """
    from gpustack.schemas.models import ModelCreate, Source

    places = ("local_path", "huggingface_repo_id", "huggingface_filename")
    given = {key: value for key in places if (value := spec.pop(key, None)) is not None}
    if source is not None and given:
        raise Invalid("give either SOURCE or --local-path or --huggingface-…, not both")
    if source is not None:
        given = _source_fields(source)
    if given.keys() >= {"local_path", "huggingface_repo_id"}:
        raise Invalid("give either --local-path or --huggingface-repo-id, not both")
    if not given.keys() & {"local_path", "huggingface_repo_id"}:
        raise Invalid("say which model: SOURCE, --local-path or --huggingface-repo-id")
    env = dict(item.split("=", 1) for item in variables if "=" in item)
    if wrong := next((item for item in variables if "=" not in item), None):
        raise Invalid(f"--env: want NAME=VALUE, got {wrong!r}")
    if "local_path" in given:
        given["local_path"] = _whole(given["local_path"])
    kind = Source.LOCAL_PATH if "local_path" in given else Source.HUGGING_FACE
    # What may be given several times comes as tuples, and a body has lists.
    more: dict[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value for key, value in spec.items()
    }
    return ModelCreate(name=name, source=kind, env=env, **given, **more)


def _whole(path: str) -> str:
    """`path` from the root, as text: the folder that we are in may be named in any bytes."""
    try:
        return str(typed(str(Path(path).expanduser().absolute())))
    except RuntimeError:
        raise Invalid(f"{path}: nobody here is called so") from None


def _is_here(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # too long for a name
        return False


def _source_fields(source: str) -> dict[str, str]:
    """Which fields of a model's spec a SOURCE means.

    Paths begin with a slash, a dot or a tilde, or name a file that is here; the rest are
    repositories, with a file after a colon.
    """
    if source.startswith(("/", ".", "~")) or _is_here(source):
        return {"local_path": source}
    repo, colon, file = source.partition(":")
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise Invalid(f"SOURCE: want /a/path.gguf or org/repo[:file], got {source!r}")
    return {"huggingface_repo_id": repo} | ({"huggingface_filename": file} if colon else {})


@models.command()
@click.argument("name")
@as_json
@connected
def versions(server: Connection, name: str, as_json: bool) -> None:
    """List what instances of NAME were started from, the newest first."""

    async def act(client: "Client") -> "list[ModelVersion]":
        return await client.models.versions((await client.models.by_name(name)).id)

    show(
        server.run(act),
        ("GENERATION", "WANTED", "CREATED", "SOURCE", "PARAMETERS"),
        lambda v: (
            v.generation,
            "yes" if v.wanted else "",
            f"{v.created_at:%Y-%m-%d %H:%M:%S}",
            v.spec.location,
            " ".join(v.spec.backend_parameters),
        ),
        as_json=as_json,
    )


@models.command()
@click.argument("name")
@click.option("--to", type=click.IntRange(1, 2**31 - 1), metavar="GENERATION",
              help="Which version; by default the newest that says something else.")  # fmt: skip
@connected
def rollback(server: Connection, name: str, to: int | None) -> None:
    """Run an earlier version of NAME again; `models versions` lists them.

    Instances of another version are replaced one by one.
    """

    async def act(client: "Client") -> "Model":
        return await client.models.roll_back((await client.models.by_name(name)).id, to)

    model = server.run(act)
    click.echo(f"model {line(model.name)} is at generation {model.generation}", err=True)


@models.command()
@click.argument("name")
@click.option("--all-users", is_flag=True, help="Let every user call it.")
@click.option("--user", "users", multiple=True, metavar="USER", help="Repeatable.")
@click.option("--group", "groups", multiple=True, metavar="GROUP", help="Repeatable.")
@click.option("--nobody", is_flag=True, help="Let administrators alone call it.")
@connected
def access(
    server: Connection, name: str, all_users: bool, users: tuple[str, ...],
    groups: tuple[str, ...], nobody: bool,
) -> None:  # fmt: skip
    """Say who may see and call NAME: these users and groups, and no others.

    Without an option, print who may.
    """
    if all_users + nobody + bool(users or groups) > 1:
        raise Invalid("give one of --all-users, --nobody, and --user or --group")

    async def act(client: "Client") -> "ModelAccess":
        from gpustack.cli.groups import group_ids, user_ids
        from gpustack.schemas.models import AccessPolicy

        model = await client.models.by_name(name)
        if users or groups or nobody:  # first to whom: nobody who may is refused meanwhile
            of_users, of_groups = await user_ids(client, users), await group_ids(client, groups)
            await client.models.grant(model.id, of_users, of_groups)
            await client.models.patch(model.id, {"access_policy": AccessPolicy.ALLOWED_USERS})
        elif all_users:
            await client.models.patch(model.id, {"access_policy": AccessPolicy.AUTHED})
        return await client.models.access(model.id)

    click.echo(_who_may(server.run(act)))


def _who_may(access: "ModelAccess") -> str:
    if access.access_policy == "authed":
        return "every user"
    named = [f"user {line(user.username)}" for user in access.users]
    named += [f"group {line(group.name)}" for group in access.groups]
    return "\n".join(named or ["administrators alone"])


@models.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@connected
def delete(server: Connection, names: tuple[str, ...]) -> None:
    """Delete models; their engines are stopped."""

    async def act(client: "Client") -> None:
        found = [await client.models.by_name(name) for name in names]  # all of them, or none
        for model in found:
            await client.models.delete(model.id)
            click.echo(f"model {line(model.name)} is being deleted", err=True)

    server.run(act)
