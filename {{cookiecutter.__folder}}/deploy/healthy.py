"""Container health check: the server listens on its port, or the site is connected to the server.

Usage: healthy.py [KIT]; exit code 0 means healthy. It opens no connection.
"""

import json
import sys
from pathlib import Path

import psutil


def main(kit: Path) -> int:
    is_server = (kit / "startup" / "fed_server.json").exists()
    config = json.loads((kit / "startup" / f"fed_{'server' if is_server else 'client'}.json").read_text("utf-8"))
    target = config["servers"][0]["service"]["target"]
    port = int(target.rpartition(":")[2])
    sockets = psutil.net_connections("tcp")  # on Linux, the whole container's, for any user
    if is_server and any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in sockets):
        return 0
    if not is_server and any(each.status == psutil.CONN_ESTABLISHED and each.raddr.port == port for each in sockets):
        return 0
    print(f"nothing is listening on port {port}" if is_server else f"not connected to {target}")
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "/kit")))
