"""PURE: what an inference request asks for, and the body that goes to the engine."""

from typing import Final, NamedTuple

import msgspec

from gpustack.errors import BadRequest
from gpustack.lib.decode import UNREADABLE

_Fields = dict[str, msgspec.Raw]
_fields = msgspec.json.Decoder(_Fields)
_text = msgspec.json.Decoder(str)
_encoder = msgspec.json.Encoder()

_TRUE: Final = msgspec.Raw(b"true")  # compares with other Raw values alone
_NULL: Final = msgspec.Raw(b"null")
_INCLUDE_USAGE: Final = "include_usage"


class Asked(NamedTuple):
    """What a body says.

    Attributes:
        body: for the engine; the client's own bytes unless `injected`.
        injected: we, not the client, asked the stream to end with its usage.
    """

    model: str
    body: bytes
    injected: bool


def understand(body: bytes, *, has_stream: bool) -> Asked:
    """Read the top level of a request; nested values stay bytes, unknown ones survive.

    Args:
        has_stream: the operation can answer as a stream that ends with its usage.

    Raises:
        BadRequest: it is no JSON object, or names no model.
    """
    try:
        fields = _fields.decode(body)
    except UNREADABLE as error:
        raise BadRequest(f"The body is not a JSON object: {error}") from None
    model = _model(fields)
    if not has_stream or fields.get("stream") != _TRUE:
        return Asked(model, body, injected=False)
    options = _options(fields.get("stream_options"))
    if options is None or options.get(_INCLUDE_USAGE) == _TRUE:
        return Asked(model, body, injected=False)
    options[_INCLUDE_USAGE] = _TRUE
    fields["stream_options"] = msgspec.Raw(_encoder.encode(options))
    return Asked(model, _encoder.encode(fields), injected=True)


def _model(fields: _Fields) -> str:
    raw = fields.get("model")
    if raw is None:
        raise BadRequest("The body names no model.", param="model")
    try:
        return _text.decode(raw)
    except UNREADABLE:
        raise BadRequest("The model's name must be a string.", param="model") from None


def _options(raw: msgspec.Raw | None) -> _Fields | None:
    """The stream options; None if they are not what the API says: the engine will complain."""
    if raw is None or raw == _NULL:
        return {}
    try:
        return _fields.decode(raw)
    except UNREADABLE:
        return None
