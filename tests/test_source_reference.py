"""What a caller may name, and where a fetch may be sent: nothing that could be a path or a trap."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_router.sources.hosts import HostList
from lory_router.sources.reference import BadReferenceError, Reference, read_reference


@pytest.mark.parametrize(
    ("adapter_id", "source", "expected"),
    [
        ("org/name", "hub", Reference("hub", "org/name")),
        ("org/name@v1.2", "hub", Reference("hub", "org/name", "v1.2")),
        ("hub:org/name@refs/pr/1", "hub", Reference("hub", "org/name", "refs/pr/1")),
        ("hub:org/name", None, Reference("hub", "org/name")),
        ("bucket/a/b", "s3", Reference("s3", "bucket/a/b")),
        ("s3://bucket/a/b/", None, Reference("s3", "bucket/a/b")),
        ("s3:bucket/a", "", Reference("s3", "bucket/a")),
        ("https://Host.example:443/a/b/", None, Reference("web", "https://host.example/a/b")),
        ("http://h:8000/a", "http", Reference("web", "http://h:8000/a")),
        ("upload:team/name", None, Reference("upload", "team/name")),
        ("name", "local", None),
        ("team/name", None, None),
        ("team/name", "", None),
    ],
)
def test_a_name_says_where_an_adapter_comes_from(
    adapter_id: str, source: str | None, expected: Reference | None
):
    assert read_reference(adapter_id, source) == expected
    if expected is not None:
        assert read_reference(expected.name) == expected


@pytest.mark.parametrize(
    ("adapter_id", "source"),
    [
        ("../etc/passwd", "hub"),
        ("/etc/passwd", "hub"),
        ("org/../name", "hub"),
        ("org/name@..", "hub"),
        ("org/name@a/../b", "hub"),
        ("org/name@", "hub"),
        ("org/na me", "hub"),
        ("org/name?x=1", "hub"),
        ("a/b/c", "hub"),
        ("org/name\n", "hub"),
        ("bucket", "s3"),
        ("bucket/../other/x", "s3"),
        ("bucket//x", "s3"),
        ("Bucket/x", "s3"),
        ("bucket/a%2e", "s3"),
        ("hub:org/name", "local"),
        ("hub:org/name", "s3"),
        ("https://h/a", "hub"),
        ("https://user@h/a", None),
        ("https://user:pw@h/a", None),
        ("https://h/a?token=x", None),
        ("https://h/a?", None),
        ("https://h/a#b", None),
        ("https://h/../a", None),
        ("https://h/%2e%2e/a", None),
        ("https://h:99999/a", None),
        ("https:///a", None),
        ("https://[::1]/a", None),
        ("https://h\\@evil/a", None),
        ("https://h /a", None),
        ("name", "pbase"),
        ("upload:../x", None),
        ("hub:" + "a" * 600, None),
    ],
)
def test_what_cannot_be_a_name_is_refused(adapter_id: str, source: str | None):
    with pytest.raises(BadReferenceError):
        read_reference(adapter_id, source)


@settings(max_examples=50, deadline=None)
@given(st.text(), st.sampled_from([None, "hub", "s3", "https", "upload"]), st.text())
def test_no_name_is_ever_a_path(text: str, source: str | None, revision: str):
    for name in (text, f"hub:a/{text}", f"s3:bucket/{text}", f"https://h/{text}"):
        try:
            reference = read_reference(name, source)
        except BadReferenceError:
            continue
        if reference is not None:
            folder = reference.folder("scope", revision)
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", folder)
            assert ".." not in reference.place.split("/")
            assert read_reference(reference.name) == reference


def test_other_bytes_have_another_folder():
    reference = Reference("hub", "org/name")
    folders = {
        reference.folder("a", "1"),
        reference.folder("a", "2"),
        reference.folder("b", "1"),
        Reference("hub", "org/name", "v1").folder("a", "1"),
        Reference("s3", "org/name").folder("a", "1"),
    }
    assert len(folders) == 5
    assert all("org-name" in folder for folder in folders)


@pytest.mark.parametrize(
    ("entry", "url", "expected"),
    [
        ("h.example", "https://h.example/a", True),
        ("h.example", "https://h.example:443/a", True),
        ("h.example", "https://H.example/a", True),
        ("h.example", "http://h.example/a", False),
        ("h.example", "https://h.example:8443/a", False),
        ("h.example", "https://h.example.evil/a", False),
        ("h.example", "https://evil/h.example", False),
        ("h.example", "https://h.example@evil/a", False),
        ("h.example", "ftp://h.example/a", False),
        ("h.example", "https://evilh.example/", False),
        ("*.h.example", "https://a.b.h.example/", True),
        ("*.h.example", "https://h.example/", False),
        ("*.h.example", "https://evilh.example/", False),
        ("h.example:8443", "https://h.example:8443/a", True),
        ("http://10.0.0.1:80", "http://10.0.0.1/a", True),
        ("http://10.0.0.1", "http://10.0.0.1:81/a", False),
    ],
)
def test_a_host_is_allowed_with_its_scheme_and_port(entry: str, url: str, expected: bool):
    assert (HostList((entry,)).entry_for(url) == entry) == expected


@pytest.mark.parametrize(
    "entry", ["", "*", "a b", "ftp://h", "h/path", "h:123456", "u@h", "h:99999"]
)
def test_what_is_no_host_is_refused(entry: str):
    with pytest.raises(ValueError, match="HOST"):
        HostList((entry,))
