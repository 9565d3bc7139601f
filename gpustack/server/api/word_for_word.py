"""`/v2/users/me` is no user whose id is "me"."""

from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import Scope


class WordForWord(APIRoute):
    """A route with parameters in its path that leaves paths to those which have them word for word.

    Else a method that only this one knows would be answered by what is wrong with a parameter.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if self.param_convertors and scope["path"] in scope["app"].state.fixed_paths:
            return Match.NONE, {}
        return super().matches(scope)
