# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The metrics of the server, for Prometheus."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily


if TYPE_CHECKING:
    from visualchat.serving.answers import AnswerService


RATE_SECONDS = 10


class TokenCounter:
    """Counts generated tokens, from several threads."""

    def __init__(self):
        self.total = 0
        self._recent: deque[float] = deque()
        self._lock = threading.Lock()

    def add(self) -> None:
        now = time.monotonic()
        with self._lock:
            self.total += 1
            self._recent.append(now)
            self._drop_times_before(now - RATE_SECONDS)

    @property
    def per_second(self) -> float:
        """The mean over the last `RATE_SECONDS`."""
        with self._lock:
            self._drop_times_before(time.monotonic() - RATE_SECONDS)
            return len(self._recent) / RATE_SECONDS

    def _drop_times_before(self, moment: float) -> None:
        while self._recent and self._recent[0] < moment:
            self._recent.popleft()


class Metrics:
    """What the server reports of a service and its process."""

    def __init__(self, service: "AnswerService"):
        self.service = service
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def to_text(self) -> bytes:
        """The metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yields the metrics. `prometheus_client` calls this method of a collector."""
        service, store = self.service, self.service.store
        requests = CounterMetricFamily("visualchat_requests", "Chat completion requests by HTTP status", labels=["status"])
        for status, count in service.requests.items():
            requests.add_metric([str(status)], count)
        yield requests
        for name, text, value in (
            ("disconnects", "Answers cancelled because the client had disconnected", service.disconnects),
            ("prompt_tokens", "Prompt tokens, including those of images", service.prompt_tokens),
            ("generated_tokens", "Generated tokens", service.generated_tokens),
            ("image_memory_hits", "Images found in the image memory", store.hits),
            ("image_memory_misses", "Images not found in the image memory, which were encoded", store.misses),
            ("image_memory_evictions", "Images removed from the image memory to make room", store.evictions),
        ):
            yield CounterMetricFamily(f"visualchat_{name}", text, value)
        rate = service.tokens.per_second
        for name, text, value in (
            ("tokens_per_second", f"Generated tokens per second, over the last {RATE_SECONDS} seconds", rate),
            ("running", "Answers being generated", service.running),
            ("queue_length", "Requests that wait for a thread", service.used_slots - service.running),
            ("image_memory_bytes", "Size of the image memory in RAM", store.nbytes),
        ):
            yield GaugeMetricFamily(f"visualchat_{name}", text, value)
