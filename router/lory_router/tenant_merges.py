"""How many different merges may a tenant's requests ask for? Those in use or lately used count.

Each is made anew, for some seconds in a lane that all tenants share, and takes room from adapters
in memory. It must not know requests or engines.
"""

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from lory_router.errors import Overloaded

KEPT_S = 60.0
"""How long one counts after its last use: who leaves at once has it made all the same."""


@dataclass(slots=True)
class _Use:
    num: int = 0
    last: float = 0.0


class TenantMerges:
    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._uses: dict[str, dict[Hashable, _Use]] = {}

    def begin(self, tenant: str, merge: Hashable) -> None:
        """Use it until `end`. Raises Overloaded where it is one too many."""
        self._forget(tenant)
        uses = self._uses.setdefault(tenant, {})
        if merge not in uses and len(uses) >= self._most:
            raise Overloaded(
                f"tenant {tenant} has asked for {self._most} different merges in a minute; save"
                " those you come back to (POST /v1/adapters/merge), or raise --max-tenant-merges",
                param="merged_adapters",
                retry_after_s=self._wait_s(uses),
            )
        uses.setdefault(merge, _Use()).num += 1

    def end(self, tenant: str, merge: Hashable) -> None:
        use = self._uses[tenant][merge]
        use.num -= 1
        use.last = self._clock()

    def _forget(self, tenant: str) -> None:
        uses, until = self._uses.get(tenant, {}), self._clock() - KEPT_S
        for merge in [merge for merge, use in uses.items() if not use.num and use.last <= until]:
            del uses[merge]
        if not uses:
            self._uses.pop(tenant, None)

    def _wait_s(self, uses: dict[Hashable, _Use]) -> int:
        idle = [use.last for use in uses.values() if not use.num]
        left_s = KEPT_S - (self._clock() - min(idle, default=self._clock()))
        return min(120, max(1, math.ceil(left_s)))
