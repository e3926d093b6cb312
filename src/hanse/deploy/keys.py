"""Certificates and keys of a federation: an authority of its own, the server's certificate, a key pair a node.

All keys are P-384. Certificates and their keys are PEM files; a node's pair is in OpenSSH's format, as Flower reads it. Private
files are readable by their owner alone, and nothing here writes over a file that exists. Times are given by the caller, with a time
zone.

====================  =====================================================  ==========================
file                  what it is                                             who has it
====================  =====================================================  ==========================
``ca.pem``            the authority's certificate                            everybody
``ca.key``            its private key, needed to sign and for nothing else   nobody while training runs
``server.pem``        the server's certificate                               the server
``server.key``        its private key                                        the server
``<node>.key``        a node's private key                                   that node
``<node>.pub``        its public key                                         the server, to register it
====================  =====================================================  ==========================

A node's key has no date on it: Flower takes it until it is unregistered. Needs the extra ``flower``.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from hanse.core.errors import ConfigError, MissingExtraError

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError:
    raise MissingExtraError("a federation's keys", "flower") from None

Key = ec.EllipticCurvePrivateKey
EARLY = timedelta(minutes=5)
"""Certificates hold from so long before they are made: clocks of machines differ."""


def authority(folder: Path, days: float, now: datetime) -> None:
    """Make ``ca.pem`` and ``ca.key`` in ``folder``, good for ``days``; raises ``ConfigError`` if they are there already."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hanse federation")])
    itself = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = _dated(name, name, key, days, now).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs=True), critical=True).add_extension(itself, critical=False)
    _save(folder / "ca", key, builder.sign(key, hashes.SHA384()))


def server(folder: Path, names: Sequence[str], days: float, now: datetime) -> None:
    """Make ``server.pem`` and ``server.key`` in ``folder``, signed by the authority there, for host names and IP addresses.

    The certificate ends with the authority's if that ends sooner. Raises ``ConfigError`` if there are no names, if a file is there
    already, or if the authority cannot sign: missing, not valid now, or with a key that is not its own.
    """
    if not names:
        raise ConfigError("names: [] is not allowed: a server's certificate is for at least one name or address")
    ca, ca_key = certificate(folder / "ca.pem"), private(folder / "ca.key")
    in_time(ca, folder / "ca.pem", now)
    _fits(ca, ca_key, folder / "ca.pem", folder / "ca.key")
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hanse server")])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    itself = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    left = (ca.not_valid_after_utc - now) / timedelta(days=1)
    builder = _dated(subject, ca.subject, key, min(days, left), now)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName([_named(name) for name in names]), critical=False)
    builder = builder.add_extension(issuer, critical=False).add_extension(itself, critical=False)
    _save(folder / "server", key, builder.sign(ca_key, hashes.SHA384()))


def node(folder: Path, name: str) -> None:
    """Make the key pair ``<name>.key`` and ``<name>.pub`` in ``folder``; raises ``ConfigError`` if a file is there already."""
    key = ec.generate_private_key(ec.SECP384R1())
    ours = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    theirs = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(folder / f"{name}.key", ours, private=True)
    _write(folder / f"{name}.pub", theirs + f" {name}\n".encode(), private=False)


def check_server(folder: Path, names: Sequence[str], now: datetime) -> datetime:
    """When the server's certificate in ``folder`` ends.

    Raises ``ConfigError`` if it or the authority's is missing, unreadable, not valid now, not signed by the authority, not for one
    of ``names``, or if a private key does not fit.
    """
    ca, mine = certificate(folder / "ca.pem"), certificate(folder / "server.pem")
    for made, file in ((ca, folder / "ca.pem"), (mine, folder / "server.pem")):
        in_time(made, file, now)
    try:
        mine.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise ConfigError(f"{folder / 'server.pem'}: not signed by {folder / 'ca.pem'}") from None
    _fits(mine, private(folder / "server.key"), folder / "server.pem", folder / "server.key")
    try:
        allowed = list(mine.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        allowed = []
    for name in names:
        if _named(name) not in allowed:
            known = ", ".join(str(entry.value) for entry in allowed)
            raise ConfigError(f"{folder / 'server.pem'}: not for {name!r}; it is for: {known}")
    return min(ca.not_valid_after_utc, mine.not_valid_after_utc)


def check_node(folder: Path, name: str) -> None:
    """Raise ``ConfigError`` unless ``<name>.key`` and ``<name>.pub`` in ``folder`` are a pair that Flower takes."""
    key = private(folder / f"{name}.key")
    file = folder / f"{name}.pub"
    try:
        public = serialization.load_ssh_public_key(_read(file))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{file}: not a public key in OpenSSH's format: {error}") from None
    if public != key.public_key():
        raise ConfigError(f"{file}: not the other half of {folder / f'{name}.key'}")


def certificate(file: Path) -> x509.Certificate:
    """The certificate in a PEM file; raises ``ConfigError``."""
    try:
        return x509.load_pem_x509_certificate(_read(file))
    except ValueError as error:
        raise ConfigError(f"{file}: not a certificate: {error}") from None


def private(file: Path) -> Key:
    """The private key in a file, PEM or OpenSSH; raises ``ConfigError``, also if others may read the file."""
    raw = _read(file)
    if file.stat().st_mode & 0o077:
        raise ConfigError(f"{file}: mode {file.stat().st_mode & 0o777:o} is not allowed: a private key is for its owner alone, 600")
    ssh = raw.startswith(b"-----BEGIN OPENSSH")
    try:
        key = serialization.load_ssh_private_key(raw, None) if ssh else serialization.load_pem_private_key(raw, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{file}: not a private key without a password: {error}") from None
    if not isinstance(key, Key) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{file}: not a key of the curve P-384")
    return key


def _dated(subject: x509.Name, issuer: x509.Name, key: Key, days: float, now: datetime) -> x509.CertificateBuilder:
    if days <= 0:
        raise ConfigError(f"days: {days:g} is not allowed: a certificate lasts for more than 0 days")
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - EARLY).not_valid_after(now + timedelta(days=days))


def _usage(signs: bool) -> x509.KeyUsage:
    """What a certificate's key is for: signing certificates, or greeting clients."""
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _named(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise ConfigError(f"names: {name!r} is not allowed: a host name in plain letters, or an IP address") from None


def in_time(made: x509.Certificate, file: Path, now: datetime) -> None:
    """Raise ``ConfigError`` unless a certificate, that of ``file``, is valid ``now``."""
    if now > made.not_valid_after_utc:
        raise ConfigError(f"{file}: expired on {made.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    if now < made.not_valid_before_utc:
        raise ConfigError(f"{file}: not valid before {made.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; is the clock right?")


def _fits(made: x509.Certificate, key: Key, file: Path, key_file: Path) -> None:
    if made.public_key() != key.public_key():
        raise ConfigError(f"{key_file}: not the key of {file}")


def _save(stem: Path, key: Key, made: x509.Certificate) -> None:
    pem = serialization.Encoding.PEM
    raw = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(stem.with_suffix(".key"), raw, private=True)
    _write(stem.with_suffix(".pem"), made.public_bytes(pem), private=False)


def _write(file: Path, raw: bytes, private: bool) -> None:
    """A new file, with its final mode from its first moment on."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644), "wb") as out:
            out.write(raw)
    except FileExistsError:
        raise ConfigError(f"{file}: there already; keys are never written over") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}") from None


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
