"""What `/metrics` says of sources. It must not know how anything is fetched."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lory_router.sources.service import Sources


class SourceMetrics(Collector):
    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        sources, downloads = self._sources, self._sources.downloads()
        yield GaugeMetricFamily(
            "lory_adapter_downloads", "Under way, or waiting for their turn.", len(downloads)
        )
        yield GaugeMetricFamily(
            "lory_adapter_download_bytes",
            "Bytes that have come, of the downloads under way.",
            sum(progress.num_bytes for progress in downloads),
        )
        yield GaugeMetricFamily(
            "lory_adapter_download_expected_bytes",
            "Bytes that the downloads under way will have, as far as their sources told.",
            sum(progress.total_bytes or 0 for progress in downloads),
        )
        yield GaugeMetricFamily(
            "lory_adapter_cache_bytes", "Of adapters in the disk cache.", sources.disk.num_bytes
        )
        yield GaugeMetricFamily(
            "lory_adapter_cache_entries", "In the disk cache.", len(sources.disk.entries())
        )
        fetched = CounterMetricFamily(
            "lory_adapter_fetches", "Adapters fetched, or not.", labels=("outcome",)
        )
        fetched.add_metric(("fetched",), sources.counts.fetched)
        fetched.add_metric(("failed",), sources.counts.failed)
        yield fetched
        yield CounterMetricFamily(
            "lory_adapter_fetched_bytes", "Bytes of adapters fetched.", sources.counts.num_bytes
        )
