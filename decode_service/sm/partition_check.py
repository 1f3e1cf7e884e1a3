"""Whether two partitions are what they claim: apart from one another, and no larger than granted."""

from __future__ import annotations

from decode_service.sm.partition_streams import SmIds


def why_no_partitions(num_sms: int, attention_sm: int, ffn_sm: int, seen: list[SmIds]) -> str:
    """What contradicts the grants of a device with `num_sms`; empty when nothing does.

    `seen` holds where kernels ran, one entry for each way of launching them: a partition has to be the same in all.
    """
    if attention_sm + ffn_sm > num_sms:
        return f"{attention_sm} and {ffn_sm} SMs were granted of {num_sms}"
    attention = frozenset[int]().union(*(ids.attention for ids in seen))
    ffn = frozenset[int]().union(*(ids.ffn for ids in seen))
    if shared := attention & ffn:
        return f"kernels of both partitions ran on SMs {', '.join(map(str, sorted(shared)))}"
    for side, ids, granted in (("attention", attention, attention_sm), ("FFN", ffn, ffn_sm)):
        if not ids or len(ids) > granted:
            return f"kernels of the {side} partition ran on {len(ids)} SMs, not on the {granted} that were granted"
    return ""
