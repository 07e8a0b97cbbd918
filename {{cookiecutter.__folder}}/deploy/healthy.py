"""Health check of a container: the server listens at its port, or the site has a connection to it.

Usage: healthy.py [KIT]; exit code 0 means healthy. It connects to nothing, and needs the standard library alone.
"""

import json
import sys
from pathlib import Path

ESTABLISHED, LISTENING = "01", "0A"  # as Linux writes them in /proc/net/tcp


def main(kit: Path) -> int:
    is_server = (kit / "startup" / "fed_server.json").exists()
    config = json.loads((kit / "startup" / f"fed_{'server' if is_server else 'client'}.json").read_text("utf-8"))
    target = config["servers"][0]["service"]["target"]
    port = int(target.rpartition(":")[2])
    if is_server and ("local", port, LISTENING) in sockets():
        return 0
    if not is_server and ("remote", port, ESTABLISHED) in sockets():
        return 0
    print(f"nothing listens at port {port}" if is_server else f"not connected to {target}")
    return 1


def sockets() -> set[tuple[str, int, str]]:
    """(`local` or `remote`, port, state) of all TCP sockets of this machine or container."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if Path(table).exists():
            for line in Path(table).read_text("ascii").splitlines()[1:]:
                _, local, remote, state, *_ = line.split()
                for end, address in (("local", local), ("remote", remote)):
                    found.add((end, int(address.rpartition(":")[2], 16), state))
    return found


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "/kit")))
