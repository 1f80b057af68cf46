//! Key release: RCAR messages, JWE, signed key grants, deployment credentials; no sockets.

#![forbid(unsafe_code)]
