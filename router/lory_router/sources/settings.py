"""What may be fetched, from where and how much of it: one frozen value.

It must not know flags, or how a setting is used.
"""

from dataclasses import dataclass, field
from pathlib import Path

from lory_router.sources.hosts import HostList
from lory_router.sources.reference import SourceKind

HELD = "held"


@dataclass(frozen=True, slots=True)
class HubSettings:
    endpoint: str = "https://huggingface.co"
    token: str = field(default="", repr=False)
    """For callers who bring none; empty: those read what is public."""
    hosts: HostList = HostList(("*.huggingface.co", "*.hf.co"))  # noqa: RUF009 - never changes
    """Where the hub may send a download, beside its own."""


@dataclass(frozen=True, slots=True)
class S3Settings:
    endpoint: str = ""
    """Empty: AWS, of the region."""
    region: str = "us-east-1"
    access_key_id: str = ""
    """Empty: requests are not signed."""
    secret_access_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    buckets: tuple[str, ...] = ()
    """BUCKET or BUCKET/PREFIX: what callers may name."""


@dataclass(frozen=True, slots=True)
class SourceSettings:
    folder: Path
    """The disk cache; nothing else may be kept in it."""
    budget_bytes: int = 20 * 2**30
    max_adapter_bytes: int = 4 * 2**30
    hub: HubSettings = HubSettings()
    s3: S3Settings = S3Settings()
    web_hosts: HostList = HostList()  # noqa: RUF009 - never changes
    allows_upload: bool = False
    tenant_bytes: int = 5 * 2**30
    """Most bytes of one tenant's uploads, which stay until it takes them away."""
    is_offline: bool = False
    recheck_s: float = 30.0
    """How long a caller's right to read, and what a branch stands for, are remembered."""
    stall_s: float = 20.0
    """Longest silence of a source."""
    min_bytes_per_s: float = 1024.0
    """A download slower than this over `stall_s` has stalled."""
    download_timeout_s: float = 3600.0
    wait_timeout_s: float = 600.0
    """How long one request waits for its adapter."""
    max_downloads: int = 4
    """At once from one source, or one host of the web."""
    max_waiting: int = 512
    """Requests that wait for one source; one more is refused."""
    retry_pause_s: float = 0.25
    """Before the second try of a download that broke; later ones pause longer."""

    @property
    def held(self) -> Path:
        """Where whole adapters lie, each in a folder of its own."""
        return self.folder / HELD

    @property
    def kinds(self) -> frozenset[SourceKind]:
        """The sources that callers may name."""
        named: dict[SourceKind, object] = {
            "hub": True,
            "s3": self.s3.buckets,
            "web": self.web_hosts,
            "upload": self.allows_upload,
        }
        return frozenset(kind for kind, is_on in named.items() if is_on)
