"""Objects of an S3-compatible store: where they lie, and requests signed with AWS Signature V4.

Signed here because two requests, HEAD and GET, are all that is asked of a store, and an SDK for
them would bring thousands of modules and threads of its own. The server's credentials ask, so the
operator lists what callers may name. It must not know files' contents or disks.
"""

import hashlib
import hmac
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from urllib.parse import quote, urlsplit

from lory_router.errors import HostForbidden
from lory_router.sources.client import Ask
from lory_router.sources.hosts import HostList
from lory_router.sources.reference import Reference
from lory_router.sources.settings import S3Settings

NO_BODY_SHA256 = hashlib.sha256(b"").hexdigest()
_ALGORITHM = "AWS4-HMAC-SHA256"


def _now() -> datetime:
    return datetime.now(UTC)


class S3Place:
    """`folder.Place` for a store, whose buckets are parts of the path."""

    def __init__(self, settings: S3Settings, clock: Callable[[], datetime] = _now) -> None:
        aws = f"https://s3.{settings.region}.amazonaws.com"
        self._endpoint = (settings.endpoint or aws).rstrip("/")
        self._settings = settings
        self._clock = clock

    @property
    def scope(self) -> str:
        return self._endpoint

    def lane(self, reference: Reference) -> str:
        places = [f"{bucket.strip('/')}/" for bucket in self._settings.buckets]
        if not f"{reference.place}/".startswith(tuple(places)):
            raise HostForbidden(
                f"adapters may not be fetched from {reference.name}; --s3-buckets lists what is"
                " allowed",
                param="model",
            )
        return "s3"

    def ask(self, reference: Reference, name: str, token: str) -> Ask:
        """Callers have no say in credentials: `token` is not for a store."""
        return Ask(
            url=f"{self._endpoint}/{quote(reference.place)}/{name}",
            sign=self._sign,
            hosts=HostList(),
            flag="--s3-endpoint",
            explain=self._explain,
        )

    def _explain(self, headers: Mapping[str, str]) -> str:
        """AWS tells where a bucket is to who asks in another region, and sends nobody there."""
        region = headers.get("x-amz-bucket-region", self._settings.region)
        return (
            "" if region == self._settings.region else f"the bucket is in {region}; set --s3-region"
        )

    def _sign(self, method: str, url: str) -> Mapping[str, str]:
        settings, parts = self._settings, urlsplit(url)
        headers = {"x-amz-checksum-mode": "ENABLED"}
        if not settings.access_key_id:
            return headers
        headers |= {
            "host": parts.netloc,
            "x-amz-content-sha256": NO_BODY_SHA256,
            "x-amz-date": self._clock().strftime("%Y%m%dT%H%M%SZ"),
        }
        if settings.session_token:
            headers["x-amz-security-token"] = settings.session_token
        return {**headers, "authorization": authorization(settings, method, parts.path, headers)}


def authorization(settings: S3Settings, method: str, path: str, headers: Mapping[str, str]) -> str:
    """The header that signs a request without query and body; `headers` in lower case."""
    moment = headers["x-amz-date"]
    names = ";".join(sorted(headers))
    lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    canonical = f"{method}\n{path}\n\n{lines}\n{names}\n{headers['x-amz-content-sha256']}"
    scope = f"{moment[:8]}/{settings.region}/s3/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    key = f"AWS4{settings.secret_access_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    told = f"{_ALGORITHM}\n{moment}\n{scope}\n{digest}"
    signature = hmac.digest(key, told.encode(), "sha256").hex()
    credential = f"{settings.access_key_id}/{scope}"
    return f"{_ALGORITHM} Credential={credential}, SignedHeaders={names}, Signature={signature}"
