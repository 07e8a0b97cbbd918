"""doctor.py's checks of a site's startup kit: certificate, server, permissions, and who may do what at this site."""

import json
import socket
import ssl
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from federation.errors import UserError

FEW_DAYS = 30  # until a certificate expires
RENEW = "renew it as step 7 of deploy/README.md says"
TIMEOUT_S = 10  # for an answer of the server

Result = tuple[str, str, str, str]  # status, check, what was found, what to do


def check_kit(kit: Path) -> Iterator[Result]:
    """Check a kit, and connect to its server for a TLS handshake.

    Raises:
        UserError: it is not a complete startup kit of a site.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    startup = kit / "startup"
    try:
        config = json.loads((startup / "fed_client.json").read_text(encoding="utf-8"))
        files = [startup / config["client"][f"ssl_{part}"] for part in ("root_cert", "cert", "private_key")]
        root, own = (x509.load_pem_x509_certificate(file.read_bytes()) for file in files[:2])
        own.verify_directly_issued_by(root)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(files[0])
        context.load_cert_chain(*files[1:])
        server = config["servers"][0]
        host, _, port = server["service"]["target"].rpartition(":")
        place = (host, int(port))
    except (OSError, ValueError, KeyError, TypeError, InvalidSignature) as error:
        raise UserError(f"{kit} is not a complete startup kit of a site ({error!r}): unpack it again") from None
    # The clock can be compared with these dates alone: TLS does not tell the time, and others would need to be trusted.
    now, name = datetime.now(timezone.utc), own.subject.rfc4514_string()
    days = (min(own.not_valid_after_utc, root.not_valid_after_utc) - now).days
    if now < own.not_valid_before_utc:
        found = f"{name} is not valid before {own.not_valid_before_utc:%F %T} UTC, and it is {now:%F %T}"
        yield "failed", "certificate", found, "set the clock of this machine"
    elif days < 0:
        yield "failed", "certificate", f"{name} has expired", RENEW
    else:
        soon = RENEW if days < FEW_DAYS else ""
        yield "warning" if soon else "ok", "certificate", f"{name}, valid for {days} more days", soon
    yield check_server(context, place, server.get("identity", host))
    yield check_permissions(kit)
    [org] = own.subject.get_attributes_for_oid(x509.NameOID.ORGANIZATION_NAME)
    yield from check_rights(kit, str(org.value))


def check_server(context: ssl.SSLContext, place: tuple[str, int], identity: str) -> Result:
    """Whether the kit's server, and no other, answers there, and accepts this kit."""
    target = f"{place[0]}:{place[1]}"
    context.set_alpn_protocols(["h2"])  # that of gRPC, which greets each client that it accepts
    try:
        with (
            socket.create_connection(place, TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=identity) as encrypted,
        ):
            if not encrypted.recv(1):
                raise ConnectionResetError("closed without a greeting")
    except ssl.SSLCertVerificationError as error:
        todo = "check the address with the operator; a proxy must not inspect this traffic"
        return "failed", "server", f"{target} is not the server of this kit ({error.verify_message})", todo
    except (ssl.SSLError, ConnectionError, TimeoutError) as error:
        if isinstance(error, ConnectionRefusedError):
            return "failed", "server", f"nothing listens on {target}", "ask the operator to start the server"
        todo = "open this port for outgoing TCP connections; ask the operator whether this kit is valid"
        return "failed", "server", f"{target} does not accept a connection ({error})", todo
    except OSError as error:
        return "failed", "server", f"{target} cannot be reached ({error})", "check the name, the network, and firewalls"
    return "ok", "server", f"{target} is {identity} and accepts this kit", ""


def check_permissions(kit: Path) -> Result:
    def others(path: Path) -> int:
        return path.stat().st_mode & (0o077 if path.suffix == ".key" else 0o022)

    exposed = [path for path in kit.rglob("*") if others(path)] if kit.stat().st_mode & 0o077 else []
    if exposed:
        return "failed", "permissions", f"other users can read or change {exposed[0]}", f"chmod -R go= {kit}"
    return "ok", "permissions", "no other user can read the kit's key, or change the kit", ""


def check_rights(kit: Path, org: str) -> Iterator[Result]:
    """Which roles may run code and read files at this site, according to NVFlare."""
    from nvflare.fuel.sec.authz import AuthzContext, Person
    from nvflare.security.security import FLAuthorizer

    own = kit / "local" / "authorization.json"
    file = own if own.exists() else own.with_suffix(".json.default")
    try:
        policy = json.loads(file.read_text(encoding="utf-8"))
        site = FLAuthorizer(org, policy)
        roles = sorted(policy["permissions"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be used ({error!r}): copy authorization.json.default") from None

    def who(right: str) -> str:
        allowed = {
            role: [site.authorize(AuthzContext(right, Person("?", of, role)))[0] for of in (org, "another")]
            for role in roles
        }
        return ", ".join(f"{role}{'' if any_ else f' of {org}'}" for role, (own, any_) in allowed.items() if own)

    yield "ok", "code", f"may be submitted by: {who('byoc') or 'nobody'}. Review a job before you allow it", ""
    readers = {"files and logs": who("shell_commands"), "errors of running jobs": who("show_errors")}
    found = "; ".join(f"{what} may be read by {names}" for what, names in readers.items() if names)
    if found:
        yield "warning", "logs", found, f"forbid it: cp deploy/authorization.json {own.parent}"
    else:
        yield "ok", "logs", "nobody elsewhere may read files, logs, or errors of this site", ""
