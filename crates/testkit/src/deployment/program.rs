//! One of our programs as a child process: logs in files, readiness by the line `listening on ADDR`, ended when
//! dropped.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::DeploymentError;

/// How long a program may take to end after it was asked to.
const GRACE: Duration = Duration::from_secs(5);
/// How much of a log a failure shows.
const SHOWN_LOG: u64 = 4096;
const LISTENING: &str = "listening on ";
/// An enclave says it before the other.
const ATTESTED_TLS: &str = "attested TLS on ";

/// A running program.
pub struct Program {
    name: &'static str,
    child: Child,
    log: PathBuf,
    address: String,
    attested_tls: Option<String>,
}

/// How a program is started.
pub struct Launch {
    /// Name for people and log files.
    pub name: &'static str,
    /// The executable.
    pub executable: PathBuf,
    /// Arguments.
    pub arguments: Vec<OsString>,
    /// The whole environment.
    pub environment: Vec<(OsString, OsString)>,
}

impl Launch {
    /// A program with an empty environment.
    pub fn new(name: &'static str, executable: PathBuf) -> Launch {
        Launch {
            name,
            executable,
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl Into<OsString>) -> Launch {
        self.arguments.push(argument.into());
        self
    }

    /// Adds an argument that follows its option.
    pub fn option(self, option: &str, value: impl Into<OsString>) -> Launch {
        self.arg(option).arg(value)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.executable);
        command
            .args(&self.arguments)
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        command
    }

    /// Runs to the end and returns what it printed. Its standard error goes to the log, or to ours when `shown`.
    pub fn run(&self, logs: &Path, shown: bool) -> Result<String, DeploymentError> {
        let log = logs.join(format!("{}.log", self.name));
        let file = append(&log)?;
        let mut command = self.command();
        command.stderr(if shown {
            Stdio::inherit()
        } else {
            Stdio::from(file)
        });
        let output = command
            .output()
            .map_err(|source| self.cannot_start(source))?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut file = append(&log)?;
        write_log(&mut file, &log, printed.as_bytes())?;
        if output.status.success() {
            Ok(printed)
        } else {
            Err(ended(self.name, output.status, &log))
        }
    }

    /// Starts a server that does not say when it listens; who starts it has to find out.
    pub fn start(&self, logs: &Path) -> Result<Program, DeploymentError> {
        let log = logs.join(format!("{}.log", self.name));
        let mut command = self.command();
        command.stdout(append(&log)?).stderr(append(&log)?);
        let child = command
            .spawn()
            .map_err(|source| self.cannot_start(source))?;
        Ok(Program {
            name: self.name,
            child,
            log,
            address: String::new(),
            attested_tls: None,
        })
    }

    /// Starts a server and waits until it says where it listens.
    pub fn serve(&self, logs: &Path, patience: Duration) -> Result<Program, DeploymentError> {
        let log = logs.join(format!("{}.log", self.name));
        let mut command = self.command();
        command.stdout(Stdio::piped()).stderr(append(&log)?);
        let mut child = command
            .spawn()
            .map_err(|source| self.cannot_start(source))?;
        let lines = child.stdout.take().map(|out| follow(out, append(&log)));
        // From here on the child ends with this value, however the start goes.
        let mut program = Program {
            name: self.name,
            child,
            log,
            address: String::new(),
            attested_tls: None,
        };
        let lines = lines.ok_or(DeploymentError::Silent { program: self.name })?;
        program.address = program.await_address(&lines?, patience)?;
        Ok(program)
    }

    fn cannot_start(&self, source: std::io::Error) -> DeploymentError {
        DeploymentError::Io {
            path: self.executable.clone(),
            source,
        }
    }
}

impl Program {
    /// Where it listens, as it said; empty if it does not say.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where it serves attested TLS, if it said so.
    pub fn attested_tls(&self) -> Option<&str> {
        self.attested_tls.as_deref()
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything it wrote.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Fails if it has ended.
    pub fn check(&mut self) -> Result<(), DeploymentError> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(ended(self.name, status, &self.log)),
            Err(source) => Err(DeploymentError::Io {
                path: self.log.clone(),
                source,
            }),
        }
    }

    /// Waits until `ready` holds, asking several times a second, while the program lives.
    pub fn wait_until(
        &mut self,
        what: &'static str,
        patience: Duration,
        mut ready: impl FnMut() -> bool,
    ) -> Result<(), DeploymentError> {
        let deadline = Instant::now() + patience;
        while !ready() {
            self.check()?;
            if Instant::now() >= deadline {
                return Err(self.timed_out(what));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Asks it to end and waits for that, briefly.
    pub fn stop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
            // Between the two lines the child cannot be anybody else: nobody but us waits for it.
            let asked = pid.is_some_and(|pid| kill_process(pid, Signal::TERM).is_ok());
            let deadline = Instant::now() + GRACE;
            while asked && Instant::now() < deadline {
                if !matches!(self.child.try_wait(), Ok(None)) {
                    return;
                }
                thread::sleep(Duration::from_millis(10));
            }
        }
        self.kill();
    }

    /// Ends it at once, as a crash would.
    pub fn kill(&mut self) {
        // Fails only for a process that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn await_address(
        &mut self,
        lines: &Receiver<String>,
        patience: Duration,
    ) -> Result<String, DeploymentError> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match lines.recv_timeout(left) {
                Ok(line) => {
                    if let Some(address) = line.strip_prefix(LISTENING) {
                        return Ok(address.to_owned());
                    }
                    if let Some(address) = line.strip_prefix(ATTESTED_TLS) {
                        self.attested_tls = Some(address.to_owned());
                    }
                }
                Err(RecvTimeoutError::Timeout) => return Err(self.timed_out("its address")),
                Err(RecvTimeoutError::Disconnected) => {
                    // It closed its output, which programs do by ending.
                    let _ = self.wait_until("its end", GRACE, || false);
                    self.check()?;
                    return Err(DeploymentError::Silent { program: self.name });
                }
            }
        }
    }

    fn timed_out(&self, what: &'static str) -> DeploymentError {
        DeploymentError::TimedOut {
            program: self.name,
            what,
            log: tail(&self.log),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Copies lines into the log and passes them on for as long as somebody listens.
fn follow(
    out: impl Read + Send + 'static,
    log: Result<File, DeploymentError>,
) -> Result<Receiver<String>, DeploymentError> {
    let mut log = log?;
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            // The log is for people; a full disk shows elsewhere.
            let _ = writeln!(log, "{line}");
            let _ = sender.send(line);
        }
    });
    Ok(receiver)
}

fn append(path: &Path) -> Result<File, DeploymentError> {
    File::options()
        .append(true)
        .create(true)
        .open(path)
        .map_err(|source| DeploymentError::Io {
            path: path.to_path_buf(),
            source,
        })
}

fn write_log(file: &mut File, path: &Path, bytes: &[u8]) -> Result<(), DeploymentError> {
    file.write_all(bytes).map_err(|source| DeploymentError::Io {
        path: path.to_path_buf(),
        source,
    })
}

fn ended(program: &'static str, status: ExitStatus, log: &Path) -> DeploymentError {
    DeploymentError::Ended {
        program,
        status,
        log: tail(log),
    }
}

/// The end of a log, for an error message.
fn tail(path: &Path) -> String {
    let read = || {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(SHOWN_LOG)))?;
        let mut bytes = Vec::new();
        file.take(SHOWN_LOG).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_else(|error| format!("(the log {} cannot be read: {error})", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn shell(script: &str) -> Launch {
        Launch::new("script", "/bin/sh".into()).option("-c", script)
    }

    fn alive(pid: u32) -> bool {
        Path::new(&format!("/proc/{pid}")).exists()
    }

    #[test]
    fn waits_for_the_address_and_ends_with_its_value() {
        let logs = tempfile::tempdir().unwrap();
        let script = "echo starting; echo attested TLS on 127.0.0.1:8; echo listening on 127.0.0.1:7; echo warning >&2; exec sleep 60";
        let program = shell(script).serve(logs.path(), PATIENCE).unwrap();
        assert_eq!(program.address(), "127.0.0.1:7");
        assert_eq!(program.attested_tls(), Some("127.0.0.1:8"));
        let pid = program.pid();
        assert!(alive(pid));
        drop(program);
        assert!(!alive(pid));
        let log = std::fs::read_to_string(logs.path().join("script.log")).unwrap();
        assert!(
            log.contains("starting\n") && log.contains("warning\n"),
            "{log}"
        );
    }

    #[test]
    fn a_program_that_ends_or_says_nothing_is_an_error_with_its_log() {
        let logs = tempfile::tempdir().unwrap();
        let ended = shell("echo no port >&2; exit 3")
            .serve(logs.path(), PATIENCE)
            .err()
            .unwrap();
        assert!(
            matches!(&ended, DeploymentError::Ended { status, log, .. }
                if status.code() == Some(3) && log.contains("no port")),
            "{ended}"
        );
        let silent = shell("exec sleep 60").serve(logs.path(), Duration::from_millis(100));
        assert!(matches!(
            silent.err(),
            Some(DeploymentError::TimedOut { .. })
        ));
    }

    #[test]
    fn a_program_that_ignores_the_request_to_end_is_killed() {
        let logs = tempfile::tempdir().unwrap();
        let script = "trap '' TERM; echo listening on x; while :; do sleep 1; done";
        let program = shell(script).serve(logs.path(), PATIENCE).unwrap();
        let pid = program.pid();
        drop(program);
        assert!(!alive(pid));
    }

    #[test]
    fn a_command_gives_its_output_in_an_empty_environment() {
        let logs = tempfile::tempdir().unwrap();
        let printed = shell("echo ${HOME-none} $0")
            .run(logs.path(), false)
            .unwrap();
        assert_eq!(printed, "none /bin/sh\n");
        let failed = shell("echo why >&2; exit 20")
            .run(logs.path(), false)
            .err()
            .unwrap();
        assert!(
            matches!(&failed, DeploymentError::Ended { status, log, .. }
                if status.code() == Some(20) && log.contains("why")),
            "{failed}"
        );
    }

    #[test]
    fn waiting_ends_when_the_program_does() {
        let logs = tempfile::tempdir().unwrap();
        let mut program = shell("echo listening on x; exit 4")
            .serve(logs.path(), PATIENCE)
            .unwrap();
        let error = program.wait_until("never", PATIENCE, || false).unwrap_err();
        assert!(matches!(error, DeploymentError::Ended { .. }), "{error}");
    }
}
