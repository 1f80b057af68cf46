//! Evidence collection in the guest: configfs-tsm and quoting services on a Unix socket.

#![forbid(unsafe_code)]
