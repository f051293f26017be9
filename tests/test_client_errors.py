"""The SDK's errors: which class for which reply, what they carry, and which are tried again."""

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lory_client
from lory_client import errors
from lory_client.replies import Head, status_error, stream_error
from lory_client.retry import RetryPolicy, parse_retry_after
from lory_router.errors import ApiError, Dialect

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def error_of(status: int, body: Any, **headers: str) -> errors.StatusError:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return status_error(Head(status, named), data, NOW)


def native(code: str, message: str = "no") -> dict[str, str]:
    return {"error": message, "error_type": code}


def openai(code: str | None, message: str = "no") -> dict[str, Any]:
    return {"error": {"message": message, "type": "kind", "param": None, "code": code}}


@pytest.mark.parametrize(
    ("status", "code", "wanted"),
    [
        (400, "bad_request", errors.BadRequestError),
        (401, "unauthorized", errors.AuthenticationError),
        (403, "forbidden", errors.PermissionDeniedError),
        (404, "not_found", errors.NotFoundError),
        (404, "adapter_not_found", errors.AdapterNotFoundError),
        (404, "model_not_found", errors.AdapterNotFoundError),
        (413, "too_large", errors.PayloadTooLargeError),
        (422, "validation", errors.ValidationError),
        (424, "generation", errors.GenerationError),
        (429, "overloaded", errors.OverloadedError),
        (500, "internal", errors.ServerError),
        (500, "generation", errors.GenerationError),
        (502, "proxy", errors.ServerError),
        (503, "unavailable", errors.UnavailableError),
        (504, "timeout", errors.RequestTimeoutError),
        (418, "teapot", errors.StatusError),
        (302, "moved", errors.StatusError),
    ],
)
@pytest.mark.parametrize("shape", [native, openai])
def test_each_status_has_its_class_in_both_shapes(status: int, code: str, wanted: type, shape: Any):
    error = error_of(status, shape(code, "the reason"), x_request_id="r9")
    assert type(error) is wanted
    assert (error.status, error.code, error.message) == (status, code, "the reason")
    assert error.request_id == "r9"
    assert str(error) == f"the reason (status {status}, code {code}, request r9)"


def test_the_kind_stands_in_for_a_missing_code():
    assert error_of(400, openai(None)).code == "kind"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the server answered 502 without a reason"),
        (b"<h1>Bad gateway</h1>", "<h1>Bad gateway</h1>"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"[1]", "[1]"),
        (b"x" * 9999, "x" * 200),
        (b'{"detail": "Not Found"}', "Not Found"),
    ],
)
def test_a_proxys_reply_still_makes_an_error(body: bytes, message: str):
    error = error_of(502, body)
    assert type(error) is errors.ServerError
    assert error.message == message


@settings(deadline=None)
@given(st.integers(300, 599), st.binary(max_size=40) | st.from_regex(rb'\{"error":.{0,9}\}'))
def test_no_reply_breaks_the_error_parser(status: int, body: bytes):
    assert isinstance(error_of(status, body, retry_after="soon"), errors.StatusError)


@pytest.mark.parametrize(
    ("code", "wanted", "status"),
    [
        ("generation", errors.GenerationError, 424),
        ("validation", errors.ValidationError, 422),
        ("overloaded", errors.OverloadedError, 429),
        ("adapter_not_found", errors.AdapterNotFoundError, 404),
        ("unavailable", errors.UnavailableError, 503),
        ("timeout", errors.RequestTimeoutError, 504),
        ("internal", errors.ServerError, 500),
        ("context_length_exceeded", errors.BadRequestError, 400),
        ("never heard of", errors.GenerationError, 424),
    ],
)
@pytest.mark.parametrize("shape", [native, openai])
def test_an_error_inside_a_stream_has_its_own_class(
    code: str, wanted: type, status: int, shape: Any
):
    error = stream_error(Head(200, {}), shape(code))
    assert (type(error), error.status, error.code) == (wanted, status, code)
    assert not error.retryable


def kinds_of(root: type[ApiError]) -> list[type[ApiError]]:
    below = root.__subclasses__()
    return [root, *(kind for child in below for kind in kinds_of(child))]


@pytest.mark.parametrize("dialect", ["lorax", "openai"])
def test_the_servers_errors_are_the_same_class_before_and_inside_a_stream(dialect: Dialect):
    before_a_stream_only = {400, 401, 403, 404, 405, 408, 413, 415, 431, 499}
    for kind in kinds_of(ApiError):
        told = kind("the reason")
        status, body = told.status_for(dialect), told.body_for(dialect)
        early = error_of(status, body)
        assert (early.status, early.message.endswith("the reason")) == (status, True)
        if told.status not in before_a_stream_only:
            late = stream_error(Head(200, {}), body)
            assert type(late) is type(early), f"{kind.__name__}: {early!r} / {late!r}"


def test_every_error_is_exported_and_drawn_in_the_header():
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.LoryError)
    }
    assert classes <= set(lory_client.__all__)
    drawn = (errors.__doc__ or "").split()
    assert classes <= set(drawn)


# -- what is tried again ----------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 424, 500, 502, 504])
def test_other_statuses_are_not_tried_again(status: int):
    assert RetryPolicy().delay_s(0, error_of(status, b"")) is None


@pytest.mark.parametrize("status", [429, 503])
def test_overload_is_tried_again_up_to_the_limit(status: int):
    error = error_of(status, b"")
    policy = RetryPolicy(max_retries=2)
    assert [policy.delay_s(n, error) is not None for n in range(4)] == [True, True, False, False]


def test_a_hard_refusal_is_not_tried_again():
    error = error_of(429, openai("insufficient_quota"), x_should_retry="false")
    assert RetryPolicy().delay_s(0, error) is None


@settings(deadline=None)
@given(st.integers(0, 2000))
def test_backoff_doubles_up_to_its_limit_within_its_jitter(attempt: int):
    policy = RetryPolicy(max_retries=3000, first_delay_s=0.5, max_delay_s=8.0)
    delay_s = policy.delay_s(attempt, error_of(503, b""))
    whole_s = min(8.0, 0.5 * 2.0 ** min(attempt, 60))
    assert delay_s is not None
    assert whole_s / 2 <= delay_s <= whole_s


def test_jitter_differs_between_calls():
    error = error_of(503, b"")
    assert len({RetryPolicy().delay_s(0, error) for _ in range(20)}) > 10


@settings(deadline=None)
@given(st.floats(0, 120))
def test_retry_after_is_never_undercut(seconds: float):
    delay_s = RetryPolicy().delay_s(0, error_of(429, b"", retry_after=f"{seconds:f}"))
    assert delay_s is not None
    assert round(seconds, 6) <= delay_s <= seconds + 0.2


def test_a_retry_after_over_two_minutes_is_not_waited_for():
    assert RetryPolicy().delay_s(0, error_of(429, b"", retry_after="121")) is None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        (" 1.5 ", 1.5),
        ("0", 0.0),
        ("-3", None),
        ("", None),
        ("soon", None),
        ("1e3", None),
        ("nan", None),
        ("Sun, 01 Mar 2026 12:00:30 GMT", 30.0),
        ("Sun, 01 Mar 2026 12:00:30 -0000", 30.0),
        ("Sun, 01 Mar 2026 11:00:00 GMT", 0.0),
        ("Sun, 99 Mar 2026 11:00:00 GMT", None),
        ("Sun, 01 Mar 99999999999999999999 11:00:00 GMT", None),
        ("Sun, 01 Mar 2026 12:00:30 +99999999999999", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None):
    assert parse_retry_after(value, NOW) == seconds


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_a_retry_after_date_is_the_time_until_then(seconds: int):
    date = format_datetime(NOW + timedelta(seconds=seconds), usegmt=True)
    assert parse_retry_after(date, NOW) == seconds


@settings(deadline=None)
@given(st.text(max_size=40))
def test_no_retry_after_breaks_the_parser(value: str):
    seconds = parse_retry_after(value, NOW)
    assert seconds is None or seconds >= 0.0


def test_retries_below_zero_are_refused():
    with pytest.raises(ValueError, match="max_retries"):
        RetryPolicy(max_retries=-1)
