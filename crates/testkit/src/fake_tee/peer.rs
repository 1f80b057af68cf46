//! Measures the process at the other end of a Unix socket from what the kernel says about it: executable, arguments,
//! environment, and the file named by `--config`. Nothing the peer sends takes part.
//!
//! The kernel names the process that connected. Everything is then read through one handle on its `/proc` directory,
//! which never comes to mean another process, and a connection whose other end is gone is refused, so that a number
//! given to a new process is noticed. What this cannot see: a socket that the peer passed to somebody else, memory
//! that was changed after the program started (a debugger, a rewritten environment), and shared libraries.

use std::ffi::CStr;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use casemate_attest::measure::{FileDigest, Measurement, Process, Register};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{
    FileType, Mode, OFlags, ResolveFlags, fstat, open, openat, openat2, readlinkat, stat,
};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{PidfdFlags, pidfd_open};

/// The kernel's own limit on arguments and environment is 6 MiB with the usual stack size.
const MAX_STRINGS: u64 = 6 * 1024 * 1024;
const MAX_EXECUTABLE: u64 = 4 * 1024 * 1024 * 1024;
const MAX_CONFIG: u64 = 1024 * 1024;

/// A measured process.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its process number, for people.
    pub pid: i32,
    /// Where its executable lay, for people; the measurement covers contents, not places.
    pub executable: PathBuf,
    /// What it is.
    pub measurement: Measurement,
}

/// What of a process could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Who connected.
    Credentials,
    /// Its entry under `/proc`.
    Process,
    /// The executable file.
    Executable,
    /// Command line.
    Arguments,
    /// Environment as given at start.
    Environment,
    /// The file after `--config`.
    Config,
}

/// Why a peer was not measured.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// A part could not be read.
    #[error("cannot read the peer's {part}: {source}")]
    Io {
        /// Which part.
        part: Part,
        /// What the system said.
        source: io::Error,
    },
    /// A part is larger than any honest peer's.
    #[error("the peer's {0} is too large")]
    TooLarge(Part),
    /// A part does not have the expected form.
    #[error("the peer's {0} is malformed")]
    Malformed(Part),
    /// `--config` appears more than once.
    #[error("the peer names more than one configuration")]
    TwoConfigs,
    /// A relative configuration path under another root directory.
    #[error("a peer with another root directory must name its configuration by an absolute path")]
    ForeignRelativeConfig,
    /// The peer ended or closed the connection.
    #[error("the peer is gone")]
    Gone,
    /// The peer became another program while it was being measured.
    #[error("the peer changed while it was measured")]
    Changed,
}

impl fmt::Display for Part {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Part::Credentials => "credentials",
            Part::Process => "process entry",
            Part::Executable => "executable",
            Part::Arguments => "arguments",
            Part::Environment => "environment",
            Part::Config => "configuration",
        })
    }
}

/// Who is at the other end.
pub fn peer_pid(stream: &UnixStream) -> Result<i32, PeerError> {
    let credentials = socket_peercred(stream).map_err(io_error(Part::Credentials))?;
    Ok(credentials.pid.as_raw_nonzero().get())
}

/// Measures the process at the other end.
pub fn measure_peer(stream: &UnixStream) -> Result<Peer, PeerError> {
    let pid = socket_peercred(stream)
        .map_err(io_error(Part::Credentials))?
        .pid;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(gone_or(Part::Process))?;
    let raw = pid.as_raw_nonzero().get();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let process =
        open(format!("/proc/{raw}"), flags, Mode::empty()).map_err(gone_or(Part::Process))?;

    let first = Snapshot::take(&process)?;
    let (executable_path, executable) = executable(&process)?;
    let arguments = c_strings(&first.arguments, Part::Arguments)?;
    let environment = c_strings(&first.environment, Part::Environment)?;
    // An empty command line is that of a process which has ended.
    let arguments = arguments.get(1..).ok_or(PeerError::Gone)?;
    let config = match config_argument(arguments)? {
        Some(path) => Some(config_digest(&process, path)?),
        None => None,
    };
    let measurement = Measurement::of_process(&Process {
        executable,
        arguments,
        environment: &environment,
        config,
    });

    if Snapshot::take(&process)? != first {
        return Err(PeerError::Changed);
    }
    if is_ready(&pidfd, PollFlags::IN)? || is_ready(stream, PollFlags::RDHUP | PollFlags::HUP)? {
        return Err(PeerError::Gone);
    }
    Ok(Peer {
        pid: raw,
        executable: executable_path,
        measurement,
    })
}

/// What tells one program in a process from the next.
#[derive(PartialEq, Eq)]
struct Snapshot {
    started: Vec<u8>,
    executable: (u64, u64),
    arguments: Vec<u8>,
    environment: Vec<u8>,
}

impl Snapshot {
    fn take(process: &OwnedFd) -> Result<Snapshot, PeerError> {
        let stat = read_part(
            open_part(process, "stat", Part::Process)?,
            4096,
            Part::Process,
        )?;
        let file = open_part(process, "exe", Part::Executable)?;
        let status = fstat(&file).map_err(io_error(Part::Executable))?;
        let read = |name, part| read_part(open_part(process, name, part)?, MAX_STRINGS, part);
        Ok(Snapshot {
            started: start_time(&stat)
                .ok_or(PeerError::Malformed(Part::Process))?
                .to_vec(),
            executable: (status.st_dev, status.st_ino),
            arguments: read("cmdline", Part::Arguments)?,
            environment: read("environ", Part::Environment)?,
        })
    }
}

/// Field 22 of `/proc/<pid>/stat`; the name in field 2 may hold anything, so fields count from its last bracket.
fn start_time(stat: &[u8]) -> Option<&[u8]> {
    let after_name = stat.iter().rposition(|&byte| byte == b')')?;
    stat.get(after_name + 1..)?
        .split(|&byte| byte == b' ')
        .filter(|field| !field.is_empty())
        .nth(19)
}

fn executable(process: &OwnedFd) -> Result<(PathBuf, Register), PeerError> {
    let part = Part::Executable;
    let link = readlinkat(process, "exe", Vec::new()).map_err(gone_or(part))?;
    let path = PathBuf::from(std::ffi::OsString::from_vec(link.into_bytes()));
    let digest = digest_file(open_part(process, "exe", part)?, MAX_EXECUTABLE, part)?;
    Ok((path, digest))
}

fn config_argument<'a>(arguments: &[&'a CStr]) -> Result<Option<&'a [u8]>, PeerError> {
    let mut found = None;
    let mut rest = arguments.iter().map(|argument| argument.to_bytes());
    while let Some(argument) = rest.next() {
        let value = if argument == b"--config" {
            rest.next()
        } else {
            argument.strip_prefix(b"--config=")
        };
        if value.is_some() && std::mem::replace(&mut found, value).is_some() {
            return Err(PeerError::TwoConfigs);
        }
    }
    Ok(found)
}

/// Reads the file that the peer itself would open under this path.
fn config_digest(process: &OwnedFd, path: &[u8]) -> Result<Register, PeerError> {
    let part = Part::Config;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(process, "root", directory, Mode::empty()).map_err(gone_or(part))?;
    let (theirs, ours) = (
        fstat(&root).map_err(io_error(part))?,
        stat("/").map_err(io_error(part))?,
    );
    let file = if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino) {
        let cwd = openat(process, "cwd", directory, Mode::empty()).map_err(gone_or(part))?;
        openat(&cwd, path, flags, Mode::empty())
    } else if path.first() == Some(&b'/') {
        openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
    } else {
        return Err(PeerError::ForeignRelativeConfig);
    };
    let file = file.map_err(io_error(part))?;
    let status = fstat(&file).map_err(io_error(part))?;
    if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
        return Err(PeerError::Malformed(part));
    }
    digest_file(File::from(file), MAX_CONFIG, part)
}

fn open_part(process: &OwnedFd, name: &str, part: Part) -> Result<File, PeerError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(File::from(
        openat(process, name, flags, Mode::empty()).map_err(gone_or(part))?,
    ))
}

fn read_part(file: File, limit: u64, part: Part) -> Result<Vec<u8>, PeerError> {
    let mut bytes = Vec::new();
    // One byte more than allowed, so that the limit is noticed.
    match file.take(limit + 1).read_to_end(&mut bytes) {
        Ok(read) if read as u64 > limit => Err(PeerError::TooLarge(part)),
        Ok(_) => Ok(bytes),
        Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {
            Err(PeerError::Gone)
        }
        Err(source) => Err(PeerError::Io { part, source }),
    }
}

fn digest_file(mut file: File, limit: u64, part: Part) -> Result<Register, PeerError> {
    let mut digest = FileDigest::default();
    let mut buffer = vec![0; 1 << 16];
    let mut total = 0u64;
    loop {
        let read = match file.read(&mut buffer) {
            Ok(0) => return Ok(digest.finish()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(PeerError::Io { part, source }),
        };
        total += read as u64;
        if total > limit {
            return Err(PeerError::TooLarge(part));
        }
        digest.update(&buffer[..read]);
    }
}

/// Splits strings that each end with NUL.
fn c_strings(bytes: &[u8], part: Part) -> Result<Vec<&CStr>, PeerError> {
    bytes
        .split_inclusive(|&byte| byte == 0)
        .map(|string| CStr::from_bytes_with_nul(string).map_err(|_| PeerError::Malformed(part)))
        .collect()
}

fn is_ready(fd: impl AsFd, events: PollFlags) -> Result<bool, PeerError> {
    let mut fds = [PollFd::new(&fd, events)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let ready = poll(&mut fds, Some(&now)).map_err(io_error(Part::Process))?;
    Ok(ready > 0)
}

fn io_error(part: Part) -> impl Fn(Errno) -> PeerError {
    move |errno| PeerError::Io {
        part,
        source: errno.into(),
    }
}

/// A vanished process shows as a missing entry or a missing process.
fn gone_or(part: Part) -> impl Fn(Errno) -> PeerError {
    move |errno| match errno {
        Errno::NOENT | Errno::SRCH => PeerError::Gone,
        errno => PeerError::Io {
            part,
            source: errno.into(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_is_found_behind_a_name_with_brackets_and_spaces() {
        let stat = b"7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20\n";
        assert_eq!(start_time(stat), Some(&b"4242"[..]));
        assert_eq!(start_time(b"7 (a) S 1 2"), None);
    }

    #[test]
    fn finds_the_configuration_in_both_spellings_and_refuses_two() {
        assert_eq!(
            config_argument(&[c"x", c"--config", c"a"]).unwrap(),
            Some(&b"a"[..])
        );
        assert_eq!(config_argument(&[c"--config=b"]).unwrap(), Some(&b"b"[..]));
        assert_eq!(config_argument(&[c"--configuration", c"a"]).unwrap(), None);
        assert_eq!(config_argument(&[c"--config"]).unwrap(), None);
        for two in [
            &[c"--config", c"a", c"--config=b"][..],
            &[c"--config=a", c"--config", c"a"],
        ] {
            assert!(matches!(config_argument(two), Err(PeerError::TwoConfigs)));
        }
    }

    #[test]
    fn a_string_without_its_end_is_malformed() {
        assert_eq!(
            c_strings(b"a\0\0b\0", Part::Arguments).unwrap(),
            [c"a", c"", c"b"]
        );
        assert!(c_strings(b"", Part::Arguments).unwrap().is_empty());
        assert!(matches!(
            c_strings(b"a\0b", Part::Arguments),
            Err(PeerError::Malformed(_))
        ));
    }
}
