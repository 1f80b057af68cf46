//! Quotes from the kernel, through configfs-tsm (Documentation/ABI/testing/configfs-tsm-report of Linux).
//!
//! A report entry is a directory: making it creates its attributes, removing it frees them. Writing 64 bytes to `inblob`
//! and reading `outblob` yields a quote; `generation` grows by one with each write, so that a reader can tell
//! whether the quote answers its own write.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use casemate_attest::{Collateral, Evidence, MAX_EVIDENCE_JSON, MAX_QUOTE, ReportData, TeeKind};

use crate::{QuoteProvider, TeeError};

/// Where the kernel keeps report entries.
const REPORTS: &str = "/sys/kernel/config/tsm/report";
/// The kernel's name of the one provider whose quotes this room labels.
const PROVIDER: &str = "tdx_guest";
/// Names tried before giving up; an entry left behind by a killed program occupies one.
const NAMES: u32 = 64;

/// The TD's quotes as the guest kernel hands them out.
pub struct ConfigfsTsm {
    directory: PathBuf,
    collateral: Option<PathBuf>,
    attempts: AtomicU64,
}

impl ConfigfsTsm {
    /// The running kernel's interface. `collateral` names a file with Intel's collateral in JSON, read anew for each
    /// quote; without it evidence carries none, and whoever appraises it has to bring its own.
    pub fn new(collateral: Option<PathBuf>) -> ConfigfsTsm {
        ConfigfsTsm::at(REPORTS.into(), collateral)
    }

    /// The same interface at another place.
    pub fn at(directory: PathBuf, collateral: Option<PathBuf>) -> ConfigfsTsm {
        ConfigfsTsm {
            directory,
            collateral,
            attempts: AtomicU64::new(0),
        }
    }

    fn read_collateral(&self, path: &Path) -> Result<Collateral, TeeError> {
        let unavailable = |source| TeeError::Unavailable {
            path: path.to_path_buf(),
            source,
        };
        let what = "the collateral file";
        let bytes = File::open(path)
            .and_then(|file| read_up_to(file, MAX_EVIDENCE_JSON))
            .map_err(unavailable)?
            .ok_or(TeeError::TooLarge {
                what,
                limit: MAX_EVIDENCE_JSON,
            })?;
        let collateral: Collateral =
            serde_json::from_slice(&bytes).map_err(|_| TeeError::Malformed { what })?;
        Ok(collateral)
    }

    fn quote_through(
        &self,
        reports: &impl Reports,
        report_data: &ReportData,
    ) -> Result<Vec<u8>, TeeError> {
        let entry = self.new_entry(reports)?;
        let provider = entry.text("provider")?;
        if provider != PROVIDER {
            return Err(TeeError::OtherProvider { found: provider });
        }
        let before = entry.generation()?;
        reports
            .write(&entry.name, "inblob", report_data.as_bytes())
            .map_err(|source| entry.unavailable("inblob", source))?;
        let quote = entry.attribute("outblob", MAX_QUOTE)?;
        let found = entry.generation()?;
        let expected = before.wrapping_add(1);
        if found != expected {
            return Err(TeeError::Interference { found, expected });
        }
        Ok(quote)
    }

    fn new_entry<'a, R: Reports>(&'a self, reports: &'a R) -> Result<Entry<'a, R>, TeeError> {
        let mut last = io::Error::from(io::ErrorKind::AlreadyExists);
        for _ in 0..NAMES {
            let attempt = self.attempts.fetch_add(1, Ordering::Relaxed);
            let name = format!("casemate-{}-{attempt}", process::id());
            match reports.create(&name) {
                Ok(()) => {
                    return Ok(Entry {
                        reports,
                        directory: &self.directory,
                        name,
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => last = error,
                Err(error) => {
                    last = error;
                    break;
                }
            }
        }
        Err(TeeError::Unavailable {
            path: self.directory.clone(),
            source: last,
        })
    }
}

impl QuoteProvider for ConfigfsTsm {
    fn name(&self) -> &'static str {
        "configfs-tsm"
    }

    fn quote(&self, report_data: &ReportData) -> Result<Evidence, TeeError> {
        let collateral = match &self.collateral {
            Some(path) => Some(self.read_collateral(path)?),
            None => None,
        };
        let quote = self.quote_through(&Directory(&self.directory), report_data)?;
        let evidence = Evidence {
            tee: TeeKind::Tdx,
            quote,
            collateral,
        };
        evidence.check_limits()?;
        Ok(evidence)
    }
}

/// What the kernel offers. A trait, because a directory entry that fills itself when made, and vanishes with its
/// contents, cannot be imitated on an ordinary file system.
trait Reports {
    fn create(&self, name: &str) -> io::Result<()>;
    /// `None` when longer than `limit`.
    fn read(&self, name: &str, attribute: &str, limit: usize) -> io::Result<Option<Vec<u8>>>;
    /// In one piece: each write is a request of its own.
    fn write(&self, name: &str, attribute: &str, value: &[u8]) -> io::Result<()>;
    fn remove(&self, name: &str) -> io::Result<()>;
}

struct Directory<'a>(&'a Path);

impl Reports for Directory<'_> {
    fn create(&self, name: &str) -> io::Result<()> {
        std::fs::create_dir(self.0.join(name))
    }

    fn read(&self, name: &str, attribute: &str, limit: usize) -> io::Result<Option<Vec<u8>>> {
        read_up_to(File::open(self.0.join(name).join(attribute))?, limit)
    }

    fn write(&self, name: &str, attribute: &str, value: &[u8]) -> io::Result<()> {
        let mut file = File::options()
            .write(true)
            .open(self.0.join(name).join(attribute))?;
        if file.write(value)? == value.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_dir(self.0.join(name))
    }
}

/// A report entry, removed when dropped.
struct Entry<'a, R: Reports> {
    reports: &'a R,
    directory: &'a Path,
    name: String,
}

impl<R: Reports> Entry<'_, R> {
    fn attribute(&self, attribute: &'static str, limit: usize) -> Result<Vec<u8>, TeeError> {
        self.reports
            .read(&self.name, attribute, limit)
            .map_err(|source| self.unavailable(attribute, source))?
            .ok_or(TeeError::TooLarge {
                what: attribute,
                limit,
            })
    }

    fn text(&self, attribute: &'static str) -> Result<String, TeeError> {
        let text = String::from_utf8(self.attribute(attribute, 4096)?)
            .map_err(|_| TeeError::Malformed { what: attribute })?;
        Ok(text.trim_end_matches('\n').to_owned())
    }

    fn generation(&self) -> Result<u64, TeeError> {
        self.text("generation")?
            .parse()
            .map_err(|_| TeeError::Malformed { what: "generation" })
    }

    fn unavailable(&self, attribute: &str, source: io::Error) -> TeeError {
        let path = self.directory.join(&self.name).join(attribute);
        TeeError::Unavailable { path, source }
    }
}

impl<R: Reports> Drop for Entry<'_, R> {
    fn drop(&mut self) {
        // The quote, or the error that ended the attempt, matters more than an entry left behind.
        let _ = self.reports.remove(&self.name);
    }
}

fn read_up_to(file: impl Read, limit: usize) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() <= limit).then_some(bytes))
}

#[cfg(test)]
mod tests;
