#!/usr/bin/env python3
"""Checks the signed objects of docs/vectors/key-release.json without casemate-release.

    python3 -m venv venv && venv/bin/pip install cbor2==6.2.1 cryptography
    venv/bin/python signed.py ../../docs/vectors/key-release.json

Verifies the Ed25519 signatures over domain || 0x00 || body, that bodies are the deterministic encoding of their
values, and the hash chain and signed head of the log.
"""

import hashlib
import json
import sys

import cbor2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def public(seed: str):
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seed)).public_key()
    return key, key.public_bytes_raw().hex()


def decode(data: bytes):
    value = cbor2.loads(data)
    assert cbor2.dumps(value, canonical=True) == data, "not deterministic"
    return value


def main() -> int:
    with open(sys.argv[1], encoding="utf-8") as file:
        vectors = json.load(file)

    grant = vectors["grant"]
    key, text = public(grant["provider_seed"])
    assert text == grant["provider"]
    envelope = decode(bytes.fromhex(grant["envelope"]))
    assert envelope[1].hex() == grant["provider"]
    key.verify(envelope[2], b"casemate key grant v1\0" + envelope[0])
    body = {0: 1, 1: b"\x22" * 32, 2: "smollm2", 3: 3, 4: b"\x33" * 32, 5: 0}
    assert decode(envelope[0]) == body
    envelope = decode(bytes.fromhex(grant["envelope_with_api_keys"]))
    key.verify(envelope[2], b"casemate key grant v1\0" + envelope[0])
    alice, bob = (hashlib.sha256(b"cm-" + digits * 32).digest() for digits in (b"65", b"66"))
    body[5] = 1
    body[6] = [{0: "alice", 1: alice, 2: 60, 3: 100000, 4: 4}, {0: "bob", 1: bob}]
    assert decode(envelope[0]) == body

    received = vectors["received"]
    data = bytes.fromhex(received["cbor"])
    assert decode(data) == [["default/model/smollm2", b"\x61" * 32], ["default/model/bills", b"\x62" * 32]]
    assert hashlib.sha256(b"casemate received resources v1\0" + data).hexdigest() == received["digest"]

    credential = vectors["credential"]
    key, text = public(credential["issuer_seed"])
    assert text == credential["issuer"]
    envelope = decode(bytes.fromhex(credential["envelope"]))
    key.verify(envelope[1], b"casemate deployment credential v1\0" + envelope[0])
    assert decode(envelope[0]) == {
        0: 1, 1: bytes.fromhex(text), 2: b"\x51" * 32, 3: b"\x52" * 32, 4: b"\x22" * 32, 5: 4,
        6: [b"\x53" * 32, b"\x54" * 32], 7: "smollm2", 8: 7, 9: 12, 10: b"\x55" * 32,
        11: 1780000000, 12: 1780000900,
    }

    rollback = vectors["rollback"]
    key, text = public(rollback["provider_seed"])
    shared = {
        0: 1, 1: bytes.fromhex(credential["issuer"]), 3: 5, 4: 3, 5: hashlib.sha256(b"the older grant").digest(),
        6: 1780003600,
    }
    for kind, rest in [("policy", {2: 0}), ("model", {2: 1, 7: "default/model/smollm2", 8: "smollm2"})]:
        envelope = decode(bytes.fromhex(rollback[kind]))
        assert envelope[1].hex() == rollback["provider"] == text
        key.verify(envelope[2], b"casemate rollback v1\0" + envelope[0])
        assert decode(envelope[0]) == {**shared, **rest}

    log = vectors["log"]
    key, text = public(log["issuer_seed"])
    previous = bytes(32)
    for position, entry in enumerate(log["entries"]):
        data = bytes.fromhex(entry["entry"])
        value = decode(data)
        assert (value[0], value[1], value[2]) == (1, position, previous)
        previous = hashlib.sha256(b"casemate decision log entry v1\0" + data).digest()
        assert previous.hex() == entry["hash"]
    size = len(log["entries"]).to_bytes(8, "big")
    key.verify(bytes.fromhex(log["head_signature"]), b"casemate decision log head v1\0" + size + previous)
    print("grant, received, credential, rollbacks and log verify")
    return 0


if __name__ == "__main__":
    sys.exit(main())
