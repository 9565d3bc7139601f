import json

import pytest

from gpustack import errors
from gpustack.client.failures import BY_CODE, error_of


@pytest.mark.parametrize("cls", list(BY_CODE.values()))
def test_every_error_of_the_server_comes_back_as_itself(cls: type[errors.GPUStackError]) -> None:
    body = {"code": cls.code, "message": "what happened", "detail": {"kind": "models"}}
    error = error_of(cls.status, json.dumps(body).encode())
    assert type(error) is cls
    assert str(error) == "what happened"
    assert error.detail == {"kind": "models"}


@pytest.mark.parametrize(
    ("status", "cls"),
    [
        (400, errors.BadRequest),
        (401, errors.Unauthorized),
        (403, errors.Forbidden),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (413, errors.TooLarge),
        (422, errors.Invalid),
        (502, errors.EngineFailed),
        (503, errors.Unavailable),
        (500, errors.GPUStackError),
        (418, errors.GPUStackError),
    ],
)
def test_an_answer_without_a_code_is_known_by_its_status(
    status: int, cls: type[errors.GPUStackError]
) -> None:
    error = error_of(status, b"<html>something in between</html>")
    assert type(error) is cls
    assert "something in between" in str(error)


def test_the_shape_of_openai_is_understood_too() -> None:
    body = {"error": {"message": "no such model", "code": "not_found", "type": "invalid"}}
    error = error_of(404, json.dumps(body).encode())
    assert (type(error), str(error)) == (errors.NotFound, "no such model")


def test_how_long_to_wait_is_kept() -> None:
    body = {"code": "no_ready_instance", "message": "none", "detail": {"retry_after_s": 3}}
    error = error_of(503, json.dumps(body).encode(), "7")
    assert isinstance(error, errors.NoReadyInstance)
    assert error.retry_after_s == 7


@pytest.mark.parametrize("body", [b"", b"[]", b'"text"', b"\xff\xfe", b'{"detail": "text"}'])
def test_no_body_however_odd_hides_the_status(body: bytes) -> None:
    assert type(error_of(409, body)) is errors.Conflict
