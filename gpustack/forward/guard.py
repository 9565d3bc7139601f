"""Where an application's mistakes end: with its own request."""

import logging
from collections.abc import Callable
from typing import ParamSpec

from gpustack.errors import GPUStackError
from gpustack.forward.exchange import IGNORED, Exchange, Receiver

logger = logging.getLogger(__name__)

P = ParamSpec("P")


def ask(app: Callable[[Exchange], Receiver], exchange: Exchange) -> Receiver:
    """The receiver that `app` gives; what it raises is a 500, or breaks a started answer off."""
    try:
        return app(exchange)
    except Exception as mistake:  # noqa: BLE001 - one request's mistake must not end others
        _answer(exchange, mistake)
        return IGNORED


def tell(exchange: Exchange, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call a method of the exchange's receiver; after one that raises it hears nothing more."""
    try:
        call(*args, **kwargs)
    except Exception as mistake:  # noqa: BLE001 - one request's mistake must not end others
        receiver, exchange.receiver = exchange.receiver, IGNORED
        if receiver is not None and call != receiver.client_left:
            try:
                receiver.client_left()  # so that it lets go of its upstream
            except Exception:
                logger.exception("%s %s cannot be let go", exchange.method, exchange.path)
        _answer(exchange, mistake)


def _answer(exchange: Exchange, mistake: Exception) -> None:
    logger.error("%s %s failed", exchange.method, exchange.path, exc_info=mistake)
    if not exchange.finished:
        exchange.respond_error(GPUStackError())
