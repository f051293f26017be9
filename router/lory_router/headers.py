"""Reply headers that tell what a request took, under the names LoRAX's users script against.

It must not know bodies or dialects.
"""

import time
from urllib.parse import quote

from lory_router.exchange import Exchange


def header_text(name: str) -> str:
    """A name as a header may hold it; others than printable ASCII are percent-encoded."""
    return quote(name, safe="!#$&'()*+,/:;=?@[]~ ")


def measured_headers(exchange: Exchange) -> dict[str, str]:
    """Counts, and times in milliseconds."""
    now = time.perf_counter()
    ready_at = exchange.ready_at or exchange.started_at
    usages = exchange.usages
    num_prompt = sum(u.prompt_tokens for u in usages[:: exchange.sequences_per_prompt])
    num_generated = sum(usage.generated_tokens for usage in usages)
    total_s, validation_s = now - exchange.started_at, ready_at - exchange.started_at
    queue_s = max(usage.queue_seconds for usage in usages)
    inference_s = max(0.0, total_s - validation_s - queue_s)
    first_s = (exchange.first_token_at or now) - exchange.started_at
    return {
        "x-prompt-tokens": str(num_prompt),
        "x-generated-tokens": str(num_generated),
        "x-skipped-tokens": "0",
        "x-total-tokens": str(num_prompt + num_generated),
        "x-compute-time": _ms(total_s),
        "x-total-time": _ms(total_s),
        "x-validation-time": _ms(validation_s),
        "x-queue-time": _ms(queue_s),
        "x-inference-time": _ms(inference_s),
        "x-time-per-token": _ms(inference_s / max(1, num_generated)),
        "x-time-to-first-token": _ms(first_s),
        "x-time-per-output-token": _ms(exchange.time_per_token_s or 0.0),
    }


def _ms(seconds: float) -> str:
    return str(round(seconds * 1000))
