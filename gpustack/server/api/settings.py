"""/v2/settings: the start options of this server's node, as they are in effect."""

from fastapi import APIRouter, Request

from gpustack.config import options as start
from gpustack.config.values import setting_shown
from gpustack.schemas.base import Page
from gpustack.schemas.settings import Setting
from gpustack.server.api.lists import Asked, PageQuery, pagination
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth.principals import Admin

router = APIRouter(prefix="/v2/settings", tags=["settings"], route_class=Repeated)


@router.get("")
async def list_settings(request: Request, admin: Admin, asked: Asked[PageQuery]) -> Page[Setting]:
    """Every start option. Secrets are hidden, whether they are set or not."""
    settings: start.Settings = request.app.state.settings
    known = list(start.options())
    part = known[asked.before : asked.before + asked.perPage]
    return Page(
        items=[_view(one, settings) for one in part], pagination=pagination(asked, len(known))
    )


def _view(known: start.Option, settings: start.Settings) -> Setting:
    return Setting(
        key=known.key,
        value=None if known.secret else setting_shown(known, getattr(settings, known.key)),
        hidden=known.secret,
        hot=known.hot,
        group=known.group,
        meaning=known.meaning.en,
    )
