//! Files that appear whole or not at all: written beside their place, flushed to the disk, then renamed.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use aws_lc_rs::rand;
use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

/// Who may read the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 0600.
    OwnerOnly,
    /// 0644, less the process's umask.
    Readable,
}

/// What may already stand where the file is to appear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replace {
    /// Nothing: `AlreadyExists` otherwise, also when it appears while this file is being written.
    Nothing,
    /// A file, which stays as it is until the new one is complete.
    Existing,
}

/// A file in the making. Dropped before [`Self::commit`], it leaves no trace.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    replace: Replace,
    committed: bool,
}

impl AtomicFile {
    /// Begins to write beside `target`.
    ///
    /// # Errors
    /// When the directory cannot be written, or `target` exists and must not be replaced.
    pub fn create(target: &Path, replace: Replace, mode: Mode) -> io::Result<Self> {
        // Early, so that nobody waits for minutes of sealing to learn it; `commit` decides.
        if replace == Replace::Nothing && fs::symlink_metadata(target).is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let name = target.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let mut suffix = [0; 8];
        rand::fill(&mut suffix).expect("the system provides randomness");
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.tmp", hex::encode(suffix)));
        let temporary = target.with_file_name(hidden);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(match mode {
                Mode::OwnerOnly => 0o600,
                Mode::Readable => 0o644,
            })
            .open(&temporary)?;
        Ok(AtomicFile {
            file,
            temporary,
            target: target.to_owned(),
            replace,
            committed: false,
        })
    }

    /// Writes at an offset.
    ///
    /// # Errors
    /// When the system cannot.
    pub fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Flushes, renames into place and flushes the directory.
    ///
    /// # Errors
    /// When the system cannot, or when something must not be replaced and has appeared meanwhile.
    pub fn commit(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        match self.replace {
            Replace::Existing => fs::rename(&self.temporary, &self.target)?,
            Replace::Nothing => rename_to_nothing(&self.temporary, &self.target)?,
        }
        self.committed = true;
        let directory = match self.target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(directory)?.sync_all()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing better can be done about a failure here than to leave the (encrypted) remains.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

fn rename_to_nothing(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Some file systems know no such flag; a hard link refuses an existing name just as atomically.
        Err(Errno::INVAL | Errno::NOSYS) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        done => done.map_err(io::Error::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn nothing_appears_before_commit_and_nothing_remains_without_it() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a");
        let file = AtomicFile::create(&target, Replace::Nothing, Mode::Readable).unwrap();
        file.write_all_at(b"half", 0).unwrap();
        assert!(!target.exists());
        drop(file);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn an_existing_file_stays_whole_until_commit() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a");
        fs::write(&target, "old").unwrap();
        let file = AtomicFile::create(&target, Replace::Existing, Mode::Readable).unwrap();
        file.write_all_at(b"new", 0).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"old");
        file.commit().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn a_file_that_appears_meanwhile_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a");
        let file = AtomicFile::create(&target, Replace::Nothing, Mode::Readable).unwrap();
        fs::write(&target, "somebody else's").unwrap();
        let refused = file.commit().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&target).unwrap(), b"somebody else's");
        assert_eq!(names(dir.path()), ["a"]);
    }
}
