#!/usr/bin/env python3
"""Makes and checks docs/vectors/receipt.json without casemate-channel.

    python3 -m venv venv && venv/bin/pip install cbor2==6.2.1 cryptography
    venv/bin/python receipt.py ../../docs/vectors/receipt.json           # checks
    venv/bin/python receipt.py --make ../../docs/vectors/receipt.json    # writes it anew

The receipts are built here from docs/receipts.md alone: deterministic CBOR by cbor2, hashes by hashlib, signatures by
cryptography. The checks recompute all of it, and that one changed byte breaks each.
"""

import hashlib
import json
import sys

import cbor2
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

DOMAIN = b"casemate receipt v1\0"
SEED, REQUEST_SALT, ANSWER_SALT = b"\x66" * 32, b"\x71" * 32, b"\x72" * 32
METHOD, TARGET = b"POST", b"/v1/chat/completions"
REQUEST = b'{"model":"smollm2","messages":[{"role":"user","content":"Hello"}]}'
ANSWER = b'data: {"one":1}\n\ndata: [DONE]\n\n'
# What steered the complete answer, and then that of each further receipt: keys 10 to 13 of the parameters.
STEERED = {10: [3, 100.0], 12: [2, None, True], 13: 2}
FURTHER = [{11: 1}, {10: [1, 0.0], 11: 2}, {12: [2, 1, False]}, {12: [1, 2, False]}, {12: [7, 4, True]},
           {12: [1, 5, True]}, {12: [1, 3, True], 13: 4}]


def single(value: float) -> float:
    """The single-precision number nearest to a decimal; services compute in single precision."""
    import struct

    return struct.unpack("<f", struct.pack("<f", value))[0]


def request_hash(salt: bytes, method: bytes, target: bytes, body: bytes) -> bytes:
    framed = b"".join(len(part).to_bytes(8, "big") + part for part in (method, target))
    return hashlib.sha256(b"casemate receipt request v1\0" + salt + framed + body).digest()


def answer_hash(salt: bytes, body: bytes) -> bytes:
    return hashlib.sha256(b"casemate receipt answer v1\0" + salt + body).digest()


def body(complete: bool, steering: dict | None = None) -> dict:
    parameters = {
        0: single(0.7), 1: 1.0, 2: 40, 3: 0.0, 4: -0.5, 5: 0.0, 6: single(1.1), 7: 2**64 - 1, 8: 2,
    }
    value = {
        0: 2, 1: "chatcmpl-" + "ab" * 16, 2: 7, 3: b"\x61" * 32, 4: b"\x62" * 32, 5: b"\x63" * 32, 6: 4,
        7: [b"\x64" * 32, b"\x65" * 32] if complete else [], 8: "int8-g32", 9: parameters,
        10: request_hash(REQUEST_SALT, METHOD, TARGET, REQUEST), 11: 200, 12: answer_hash(ANSWER_SALT, ANSWER),
        14: 1780000000,
    }
    if complete:
        parameters[9] = 64
        parameters |= STEERED
        value[13] = [12, 34]
    parameters |= steering or {}
    return value


def adapted() -> dict:
    """The complete receipt, of an answer that the second of the two loaded adapters gave."""
    return body(True) | {15: b"\x65" * 32}


def envelope(value: dict) -> bytes:
    encoded = cbor2.dumps(value, canonical=True)
    signature = Ed25519PrivateKey.from_private_bytes(SEED).sign(DOMAIN + encoded)
    return cbor2.dumps({0: encoded, 1: signature}, canonical=True)


def make() -> dict:
    return {
        "receipt_key_seed": SEED.hex(),
        "receipt_key": Ed25519PrivateKey.from_private_bytes(SEED).public_key().public_bytes_raw().hex(),
        "request_salt": REQUEST_SALT.hex(),
        "answer_salt": ANSWER_SALT.hex(),
        "request": {"method": METHOD.decode(), "target": TARGET.decode(), "body": REQUEST.hex()},
        "answer": {"status": 200, "body": ANSWER.hex()},
        "receipt": envelope(body(True)).hex(),
        "incomplete": envelope(body(False)).hex(),
        "steered": [envelope(body(False, steering)).hex() for steering in FURTHER],
        "adapted": envelope(adapted()).hex(),
    }


def decode(data: bytes):
    value = cbor2.loads(data)
    assert cbor2.dumps(value, canonical=True) == data, "not deterministic"
    return value


def check(vectors: dict) -> None:
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(vectors["receipt_key"]))
    request, answer = vectors["request"], vectors["answer"]
    request_body, answer_body = bytes.fromhex(request["body"]), bytes.fromhex(answer["body"])
    salts = bytes.fromhex(vectors["request_salt"]), bytes.fromhex(vectors["answer_salt"])
    receipts = [("receipt", vectors["receipt"], body(True)), ("incomplete", vectors["incomplete"], body(False))]
    assert len(vectors["steered"]) == len(FURTHER)
    receipts += [("steered", found, body(False, steering)) for found, steering in zip(vectors["steered"], FURTHER)]
    receipts.append(("adapted", vectors["adapted"], adapted()))
    for name, found, expected in receipts:
        outer = decode(bytes.fromhex(found))
        key.verify(outer[1], DOMAIN + outer[0])
        try:
            key.verify(outer[1], DOMAIN + outer[0][:-1] + bytes([outer[0][-1] ^ 1]))
            raise AssertionError("a changed body verifies")
        except InvalidSignature:
            pass
        value = decode(outer[0])
        assert value == expected, name
        hashed = request_hash(salts[0], request["method"].encode(), request["target"].encode(), request_body)
        assert value[10] == hashed
        assert value[10] != request_hash(salts[1], request["method"].encode(), request["target"].encode(), request_body)
        assert value[11] == answer["status"] and value[12] == answer_hash(salts[1], answer_body)
        assert value[12] != answer_hash(salts[1], answer_body[:-1])


def main() -> int:
    if sys.argv[1] == "--make":
        with open(sys.argv[2], "w", encoding="utf-8") as file:
            json.dump(make(), file, indent=2)
            file.write("\n")
        return 0
    with open(sys.argv[1], encoding="utf-8") as file:
        check(json.load(file))
    print(f"all {3 + len(FURTHER)} receipts verify, and nothing near them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
