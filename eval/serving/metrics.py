"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server. Tokens a second are rate(mini_deepseek_generated_tokens_total[1m])."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def made(kind: type, name: str, text: str, labels: tuple[str, ...] = ("model",), **options: object):
            return kind(f"mini_deepseek_{name}", text, labels, registry=self.registry, **options)

        self.requests = made(Counter, "requests", "Requests, by route and HTTP status", ("route", "status"))
        self.prompt = made(Counter, "prompt_tokens", "Tokens of prompts")
        self.made = made(Counter, "generated_tokens", "Tokens generated")
        self.drafts = made(Counter, "draft_tokens", "Tokens drafted by MTP, in inspected requests")
        self.accepted = made(Counter, "accepted_draft_tokens", "Drafts that were the token chosen")
        self.first = made(Histogram, "time_to_first_token_seconds", "From request to first token", buckets=SECONDS)
        self.batch = made(Histogram, "batch_size", "Sequences in a step", buckets=SIZES)
        self.running = made(Gauge, "running_requests", "Replies being generated", ())
        self.waiting = made(Gauge, "waiting_requests", "Replies waiting for a slot", ())
