"""A model has as many instances as its spec says, of the wanted version, and goes with its last."""

import random
import string
from collections.abc import Mapping

from gpustack.server.controllers.copies import facts_of
from gpustack.server.controllers.rolling import (
    Add,
    Copy,
    Forget,
    GiveUp,
    Keep,
    Phase,
    Plan,
    Remove,
    plan_roll,
)
from gpustack.server.controllers.world import World
from gpustack.server.db.database import Database, WriteSession, touch
from gpustack.server.db.instances import because, begin_end, touch_draining
from gpustack.server.db.tables import Instance, Model

#: A roll that waits for what nobody tells of looks again so often.
LOOK_AGAIN_S = 10.0
#: Characters that the model's row has room for.
MESSAGE_LIMIT = 1000
_REPLACES = "it takes the place of one of another version"


class Models:
    """Waits for nobody: what takes time is the work of `Profiles` and of the workers.

    What to do is `rolling.plan_roll`'s to say. Each step changes what the model shows, so the next
    look comes by itself.
    """

    def __init__(self, db: Database, world: World) -> None:
        self._db = db
        self._world = world

    async def reconcile(self, key: int) -> float | None:
        async with self._db.write() as session:
            model = await session.get(Model, key, with_for_update=True)
            if model is None:
                return None
            rows, facts = await facts_of(session, model, self._world)
            plan = plan_roll(facts)
            copies = {copy.id: copy for copy in facts.copies}
            why = "" if model.deleting else plan.why[:MESSAGE_LIMIT]
            if plan.steps or model.rollout_message != why:
                leaving = [copy.id for copy in facts.copies if copy.leaving]
                # They show how far the drain is. Of what is forgotten, only now is it known where.
                await touch_draining(session, leaving)
            await _carry_out(session, model, rows, plan, copies)
            if model.rollout_message != why:
                model.rollout_message = why
            if model.deleting and not rows:
                await session.flush()
                await session.delete(model)
        return LOOK_AGAIN_S if plan.look_again else None


async def _carry_out(
    session: WriteSession,
    model: Model,
    rows: dict[int, Instance],
    plan: Plan,
    copies: Mapping[int, Copy],
) -> None:
    why_new = _why(model, copies)
    for step in plan.steps:
        match step:
            case Add(version, fallback, replaces):
                made = _instance(model, version, fallback)
                session.add(made)
                why = why_new if fallback is None else _REPLACES
                if replaces is not None:
                    lost = rows[replaces]
                    await session.flush()
                    lost.replaced_by = made.key()[1]
                    why = f"it takes the place of {lost.name}, which is out of reach"
                because(session, made, why)
            case Keep(id):
                rows[id].replaced_by = None
            case Forget(id):
                await session.delete(rows.pop(id))
            case GiveUp(id):
                rows[id].fallback_version_id = None
            case Remove(id) if rows[id].worker_id is None:  # nobody has anything of it
                await session.delete(rows.pop(id))
            case Remove(id, rival):
                why = _why_not(model, copies.get(id))
                if rival is not None:
                    why = f"{rows[rival].name} has its place"
                begin_end(session, rows[id], model, why)
    if plan.steps:
        touch(session, model)


def _wanted(model: Model) -> str:
    return f"the model wants {model.replicas} instance{'' if model.replicas == 1 else 's'}"


def _why(model: Model, copies: Mapping[int, Copy]) -> str:
    """Why an instance is made, if not in the place of one that is gone."""
    present = (copy for copy in copies.values() if copy.phase is not Phase.STOPPING)
    live = [copy for copy in present if not copy.lost]
    leaving = next((copy for copy in live if copy.leaving), None)
    if leaving is None or len(live) < model.replicas:
        return _wanted(model)
    return f"{leaving.name} is to leave {leaving.leaving}, which is being drained"


def _why_not(model: Model, copy: Copy | None) -> str:
    """Why an instance is stopped."""
    if model.deleting:
        return "its model is being deleted"
    if copy and copy.leaving and model.replicas:
        return f"it leaves {copy.leaving}, which is being drained"
    return _wanted(model) if copy and copy.wanted else "it is of another version than wanted"


def _instance(model: Model, version: int, fallback: int | None) -> Instance:
    letters = "".join(random.choices(string.ascii_lowercase + string.digits, k=5))  # noqa: S311
    return Instance(
        name=f"{model.name}-{letters}",
        model_id=model.key()[1],
        version_id=version,
        fallback_version_id=fallback,
    )
