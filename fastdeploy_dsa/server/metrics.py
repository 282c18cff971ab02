"""The engine's numbers in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fastdeploy_dsa.server.engine_thread import EngineStatistics

MEDIA_TYPE = CONTENT_TYPE_LATEST
_PREFIX = "fastdeploy_dsa_"
# One number per combination of labels.
Samples = dict[tuple[str, ...], float]


def exposition(statistics: EngineStatistics) -> bytes:
    """What GET /metrics answers."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(statistics))
    return generate_latest(registry)


class _Snapshot:
    """One state of the engine; the counting is done there."""

    def __init__(self, statistics: EngineStatistics) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client's Collector says."""
        now = self._statistics
        cache, scheduler = now.cache.cache, now.cache.scheduler
        yield _gauge("requests_running", "Requests that hold blocks on the device", {(): now.num_running})
        yield _gauge("requests_waiting", "Requests that do not", {(): now.num_waiting})
        blocks: Samples = {
            (tier, state): getattr(counts, f"num_{state}")
            for tier, counts in (("device", cache.device), ("host", cache.host))
            for state in ("owned", "evictable", "free")
        }
        yield _gauge("cache_blocks", "Blocks by tier and state", blocks, labels=("tier", "state"))
        hits: Samples = {("device",): cache.num_device_hit_tokens, ("host",): cache.num_host_hit_tokens}
        yield _counter("prefix_queried_tokens", "Tokens looked up in the cache", {(): cache.num_queried_tokens})
        yield _counter("prefix_hit_tokens", "Those that were found, by tier", hits, labels=("tier",))
        yield _counter("evicted_blocks", "Cached blocks that left the device", {(): cache.num_evicted_blocks})
        yield _counter("computed_tokens", "Tokens the model computed", {(): scheduler.num_computed_tokens})
        yield _counter("preemptions", "Requests that had to give way", {(): scheduler.num_preemptions})
        yield _counter("generated_tokens", "Tokens generated", {(): now.num_generated_tokens})
        finished: Samples = {(reason,): count for reason, count in sorted(now.num_finished.items())}
        yield _counter("sequences_finished", "Sequences by finish reason", finished, labels=("reason",))
        parts = ("model", "draft", "schedule", "sample", "detokenize")
        seconds: Samples = {(part,): getattr(now.times, part) for part in parts}
        yield _counter("steps", "Steps of the engine", {(): now.times.num_steps})
        yield _counter("step_seconds", "Time of all steps, by what it was spent on", seconds, labels=("part",))


def _gauge(name: str, text: str, values: Samples, labels: tuple[str, ...] = ()) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, text, labels=labels)
    for place, value in values.items():
        family.add_metric(place, value)
    return family


def _counter(name: str, text: str, values: Samples, labels: tuple[str, ...] = ()) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, text, labels=labels)
    for place, value in values.items():
        family.add_metric(place, value)
    return family
