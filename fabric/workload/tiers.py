"""Two workloads that compete: short interactive requests, and batch requests that fill an engine.

Together they are three times what an engine can do: interactive `INTERACTIVE_SHARE` of what it can
do of interactive ones alone, batch `BATCH_SHARE` of what it can do of batch.
"""

from __future__ import annotations

from fabric.workload import Lengths, TierShare, Workload

INTERACTIVE = Workload(
    name="interactive",
    prompt=Lengths(median=96, sigma=0.5, low=32, high=384),
    output=Lengths(median=32, sigma=0.5, low=4, high=128),
    tiers=(TierShare(tier="interactive", weight=1.0),),
)
BATCH = Workload(
    name="batch",
    prompt=Lengths(median=192, sigma=0.7, low=32, high=1024),
    output=Lengths(median=96, sigma=0.7, low=8, high=384),
    tiers=(TierShare(tier="batch", weight=1.0),),
)
INTERACTIVE_SHARE = 0.3
BATCH_SHARE = 2.7
