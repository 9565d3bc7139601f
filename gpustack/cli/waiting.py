"""Waiting until a model answers."""

from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from gpustack.errors import EngineFailed, NotFound
from gpustack.schemas.instances import Instance, InstanceState
from gpustack.schemas.models import Model
from gpustack.schemas.watch import EventType
from gpustack.schemas.wire import INSTANCES, MODELS

if TYPE_CHECKING:
    from gpustack.client import Client


async def until_running(client: "Client", model: Model, tell: Callable[[str], None]) -> None:
    """Return once all instances that `model` should have are running.

    Args:
        tell: hears of every step, one sentence each.

    Raises:
        EngineFailed: an engine ended instead; the message has its last words.
        NotFound: the model was deleted meanwhile.
    """
    seen: dict[int, Instance] = {}
    told: dict[int, str] = {}
    async with aclosing(client.follow([INSTANCES, MODELS])) as events:
        async for event in events:
            if event.type is EventType.RESYNC:
                seen.clear()
            elif event.type is EventType.DELETE and event.id is not None:
                if event.kind == MODELS and event.id == model.id:
                    raise NotFound(f"model {model.name} was deleted")
                if event.kind == INSTANCES:
                    seen.pop(event.id, None)
            elif event.type is EventType.PUT and event.kind == INSTANCES:
                instance = Instance.model_validate(event.data)
                if instance.model_id != model.id or instance.deleting:
                    seen.pop(instance.id, None)
                    continue
                seen[instance.id] = instance
                if (words := sentence(instance)) != told.get(instance.id):
                    told[instance.id] = words
                    tell(words)
                if instance.state is InstanceState.ERROR:
                    raise EngineFailed(words)
            running = [i for i in seen.values() if i.state is InstanceState.RUNNING]
            if len(running) >= model.replicas:
                return


def sentence(instance: Instance) -> str:
    """What an instance does now, and why not more."""
    words = f"{instance.name} is {instance.state}"
    if instance.state is InstanceState.DOWNLOADING and instance.download_progress is not None:
        words += f", {instance.download_progress:.0f} %"
    if instance.state is InstanceState.PENDING:
        why = [f"{r.worker}: {r.message}" if r.worker else r.message for r in instance.reasons]
    else:
        why = [instance.state_message] if instance.state_message else []
    return f"{words} ({'; '.join(why)})" if why else words
