"""The settings of where adapters are fetched from, as flags; see docs/adapter-sources.md.

It must not know how anything is fetched.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import urlsplit

from lory_router.flags import flag, size_flag
from lory_router.sources.hosts import HostList
from lory_router.sources.reference import SourceKind
from lory_router.sources.settings import HubSettings, S3Settings, SourceSettings
from lory_router.values import comma_list

TENANTS_SHARE = 4
"""Of the cache, one tenant's uploads may take one part in so many."""
WAITING_SHARE = 4
"""Of all requests that may be inside, one in so many may wait for one source."""
LISTED: frozenset[SourceKind] = frozenset(("s3", "web"))
"""Of these an operator lists what may be named."""
STRANGERS: tuple[SourceKind, ...] = ("hub", "upload")
"""Where whoever likes may put an adapter."""


@dataclass(frozen=True)
class SourceConfig:
    """Where adapters may be fetched from."""

    adapter_cache: str = flag(
        "", "Folder that adapters are fetched into; empty: none are, the local ones are served."
    )
    adapter_cache_size: int = size_flag(
        20 * 2**30, "Most bytes in it; the adapters used least recently go."
    )
    max_adapter_size: int = size_flag(4 * 2**30, "Largest adapter that is fetched or uploaded.")
    adapter_hosts: str = flag(
        "",
        "Hosts that adapters may be fetched from by URL, comma-separated: HOST, *.HOST, HOST:PORT"
        " or http://HOST:PORT.",
    )
    adapter_uploads: bool = flag(False, "Take adapters that callers send.")
    trust_templates: str = flag(
        "",
        "Of hub and upload, comma-separated: sources whose adapters' own chat templates are run.",
    )
    tenant_uploads_size: int = size_flag(
        0, "Most bytes of one tenant's uploads; 0: a quarter of the cache."
    )
    adapter_offline: bool = flag(
        False, "Ask no source; serve what was fetched before and is public."
    )
    adapter_recheck: float = flag(
        30.0,
        "Seconds for which a caller's right to an adapter, and a branch's commit, are remembered.",
        at_least=0,
        at_most=3600,
    )
    source_timeout: float = flag(
        20.0, "Seconds without a byte after which a source has stalled.", at_least=0
    )
    download_timeout: float = flag(3600.0, "Seconds a download may take.", at_least=0)
    hub_endpoint: str = flag("https://huggingface.co", "The hub, or a mirror of it.")
    hub_token: str = flag(
        "", "Token for callers who send none: all may read what it may.", secret=True
    )
    hub_hosts: str = flag(
        "*.huggingface.co,*.hf.co",
        "Hosts that the hub may send a download to, beside itself; written as --adapter-hosts.",
    )
    s3_buckets: str = flag(
        "", "BUCKET or BUCKET/PREFIX that callers may name, comma-separated; empty: no S3."
    )
    s3_endpoint: str = flag("", "URL of an S3-compatible store; empty: AWS.")
    s3_region: str = flag("us-east-1", "Its region.")
    s3_access_key_id: str = flag("", "Key to sign with; empty: requests are not signed.")
    s3_secret_access_key: str = flag("", "The key's secret.", secret=True)
    s3_session_token: str = flag("", "The key's session, if it has one.", secret=True)

    def settings(self, wait_timeout_s: float, max_requests: int) -> SourceSettings | None:
        """What sources are built from; None without a folder."""
        if not self.adapter_cache:
            return None
        return SourceSettings(
            folder=Path(self.adapter_cache),
            budget_bytes=self.adapter_cache_size,
            max_adapter_bytes=self.max_adapter_size,
            hub=HubSettings(self.hub_endpoint, self.hub_token, _hosts("hub_hosts", self.hub_hosts)),
            s3=S3Settings(
                endpoint=self.s3_endpoint,
                region=self.s3_region,
                access_key_id=self.s3_access_key_id,
                secret_access_key=self.s3_secret_access_key,
                session_token=self.s3_session_token,
                buckets=comma_list(self.s3_buckets),
            ),
            web_hosts=_hosts("adapter_hosts", self.adapter_hosts),
            allows_upload=self.adapter_uploads,
            tenant_bytes=self.tenant_uploads_size or self.adapter_cache_size // TENANTS_SHARE,
            is_offline=self.adapter_offline,
            recheck_s=self.adapter_recheck,
            stall_s=self.source_timeout,
            download_timeout_s=self.download_timeout,
            wait_timeout_s=wait_timeout_s,
            max_waiting=max(1, max_requests // WAITING_SHARE),
        )

    @property
    def trusted(self) -> frozenset[SourceKind]:
        """Whose chat templates are run."""
        named = comma_list(self.trust_templates)
        return LISTED.union(kind for kind in STRANGERS if kind in named)

    def check(self, adapters: str) -> None:
        """Raises ValueError naming the flag; `adapters` is the local folder."""
        self._check_needs()
        self._check_numbers()
        for name in comma_list(self.trust_templates):
            if name not in STRANGERS:
                raise ValueError(f"--trust-templates: {name!r} is none of {', '.join(STRANGERS)}")
        for name in ("hub_endpoint", "s3_endpoint"):
            _check_url(name, getattr(self, name))
        _hosts("hub_hosts", self.hub_hosts)
        _hosts("adapter_hosts", self.adapter_hosts)
        if bool(self.s3_access_key_id) != bool(self.s3_secret_access_key):
            raise ValueError("--s3-access-key-id: needs --s3-secret-access-key, and the other way")
        if self.adapter_cache and adapters and _overlap(Path(self.adapter_cache), Path(adapters)):
            raise ValueError("--adapter-cache: must not lie in --adapters, nor the other way")

    def _check_needs(self) -> None:
        """What says something about fetching says nothing without a folder to fetch into."""
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if changed and not self.adapter_cache:
            raise ValueError(f"{_flag(changed[0])}: needs --adapter-cache FOLDER")

    def _check_numbers(self) -> None:
        for name in (
            "adapter_cache_size",
            "max_adapter_size",
            "source_timeout",
            "download_timeout",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{_flag(name)}: must be more than 0")


def _hosts(name: str, text: str) -> HostList:
    try:
        return HostList(comma_list(text))
    except ValueError as error:
        raise ValueError(f"{_flag(name)}: {error}") from error


def _check_url(name: str, url: str) -> None:
    parts = urlsplit(url)
    is_url = parts.scheme in ("http", "https") and parts.hostname and not parts.query
    if url and (not is_url or parts.username is not None):
        raise ValueError(f"{_flag(name)}: {url!r} is not a URL such as https://host:port")


def _overlap(one: Path, other: Path) -> bool:
    first, second = one.resolve(), other.resolve()
    return first == second or first in second.parents or second in first.parents


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
