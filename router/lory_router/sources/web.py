"""Any web server, if its host is on the list. It must not know files or disks."""

from lory_router.errors import HostForbidden
from lory_router.sources.client import Ask
from lory_router.sources.hosts import HostList, origin_of
from lory_router.sources.reference import Reference

FLAG = "--adapter-hosts"


class WebPlace:
    """`folder.Place` for URLs."""

    scope = "web"

    def __init__(self, hosts: HostList) -> None:
        self._hosts = hosts

    def lane(self, reference: Reference) -> str:
        """The entry of the list, so that there are as many lanes as entries."""
        entry = self._hosts.entry_for(reference.place)
        if entry is None:
            scheme, host, port = origin_of(reference.place)
            raise HostForbidden(
                f"adapters may not be fetched from {scheme}://{host}:{port}; {FLAG} lists the"
                " hosts that are allowed",
                param="model",
            )
        return entry

    def ask(self, reference: Reference, name: str, token: str) -> Ask:
        signed = {"authorization": f"Bearer {token}"} if token else {}
        return Ask(
            url=f"{reference.place}/{name}",
            sign=lambda method, url: signed,
            hosts=self._hosts,
            flag=FLAG,
        )
