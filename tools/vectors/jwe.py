#!/usr/bin/env python3
"""Makes and checks JWE vectors with jwcrypto, an implementation independent of casemate-release.

    python3 -m venv venv && venv/bin/pip install jwcrypto==1.6.1
    venv/bin/python jwe.py make            # prints a JWE made by jwcrypto, for `foreign` in the vectors
    venv/bin/python jwe.py check FILE      # decrypts `jwe` and `foreign` of docs/vectors/key-release.json

The recipient's private scalar is the bytes 00 01 .. 1f; the payload of `foreign` is ASCII text.
"""

import base64
import json
import sys

from cryptography.hazmat.primitives.asymmetric import ec
from jwcrypto import jwe, jwk

SCALAR = bytes(range(32))
PAYLOAD = b"made by jwcrypto"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def recipient() -> jwk.JWK:
    numbers = ec.derive_private_key(int.from_bytes(SCALAR, "big"), ec.SECP256R1()).public_key().public_numbers()
    x, y = numbers.x.to_bytes(32, "big"), numbers.y.to_bytes(32, "big")
    return jwk.JWK(kty="EC", crv="P-256", d=b64(SCALAR), x=b64(x), y=b64(y))


def decrypt(message: dict) -> bytes:
    token = jwe.JWE(algs=["ECDH-ES+A256KW", "A256GCM"])
    token.deserialize(json.dumps(message), recipient())
    return token.payload


def main() -> int:
    if sys.argv[1:] == ["make"]:
        token = jwe.JWE(PAYLOAD, json.dumps({"alg": "ECDH-ES+A256KW", "enc": "A256GCM"}))
        token.add_recipient(recipient())
        # Only the compact form has all parameters in the protected header.
        members = ["protected", "encrypted_key", "iv", "ciphertext", "tag"]
        message = dict(zip(members, token.serialize(compact=True).split("."), strict=True))
        assert decrypt(message) == PAYLOAD
        print(json.dumps(message, indent=2))
        return 0
    if len(sys.argv) == 3 and sys.argv[1] == "check":
        with open(sys.argv[2], encoding="utf-8") as file:
            vectors = json.load(file)
        assert decrypt(vectors["foreign"]["jwe"]) == PAYLOAD
        assert decrypt(vectors["jwe"]["message"]).hex() == vectors["jwe"]["payload"]
        print("both JWEs decrypt to their payloads")
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
