#!/usr/bin/env python3
"""Computes the `runtime_data` vector of docs/vectors/key-release.json without casemate-release.

    python3 -m venv venv && venv/bin/pip install jwcrypto==1.6.1
    venv/bin/python runtime_data.py

The guest's private scalar is the bytes 00 01 .. 1f, the nonce 32 bytes 07. Members hold nothing but ASCII
strings, for which sorted keys without spaces are RFC 8785.
"""

import base64
import hashlib
import json

from jwe import recipient

key = json.loads(recipient().export_public())
data = {
    "tee-pubkey": {"kty": "EC", "crv": "P-256", "alg": "ECDH-ES+A256KW", "x": key["x"], "y": key["y"]},
    "nonce": base64.b64encode(bytes([7] * 32)).decode(),
    "additional-evidence": "",
}
canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
report_data = {
    name: hashlib.new(name, canonical.encode()).digest().ljust(64, b"\0").hex()
    for name in ("sha256", "sha384", "sha512")
}
print(json.dumps({"canonical": canonical, "report_data": report_data}, indent=2))
