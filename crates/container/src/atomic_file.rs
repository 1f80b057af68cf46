//! Files that appear whole or not at all: written without a name, flushed to the disk, then linked into place. A program
//! that is killed leaves nothing, since nothing had a name. File systems that know no files without names get a hidden
//! one beside the place, which is removed unless the program dies.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use aws_lc_rs::rand;
use rustix::fs::{AtFlags, CWD, Mode as FileMode, OFlags, RenameFlags};
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
    /// None while the file has no name.
    temporary: Option<PathBuf>,
    target: PathBuf,
    replace: Replace,
    committed: bool,
}

impl AtomicFile {
    /// Begins to write in the directory of `target`.
    ///
    /// # Errors
    /// When the directory cannot be written, or `target` exists and must not be replaced.
    pub fn create(target: &Path, replace: Replace, mode: Mode) -> io::Result<Self> {
        // Early, so that nobody waits for minutes of sealing to learn it; `commit` decides.
        if replace == Replace::Nothing && fs::symlink_metadata(target).is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let bits = match mode {
            Mode::OwnerOnly => 0o600,
            Mode::Readable => 0o644,
        };
        let (file, temporary) = match nameless(target, bits)? {
            Some(file) => (file, None),
            None => {
                let temporary = beside(target)?;
                let file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(bits)
                    .open(&temporary)?;
                (file, Some(temporary))
            }
        };
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

    /// Flushes, puts into place and flushes the directory.
    ///
    /// # Errors
    /// When the system cannot, or when something must not be replaced and has appeared meanwhile.
    pub fn commit(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        let temporary = match (self.temporary.take(), self.replace) {
            (Some(temporary), _) => temporary,
            (None, Replace::Nothing) => {
                link(&self.file, &self.target)?;
                return self.committed();
            }
            // A link never replaces; a name for a moment, which can.
            (None, Replace::Existing) => {
                let temporary = beside(&self.target)?;
                link(&self.file, &temporary)?;
                temporary
            }
        };
        let temporary = self.temporary.insert(temporary);
        match self.replace {
            Replace::Existing => fs::rename(temporary, &self.target)?,
            Replace::Nothing => rename_to_nothing(temporary, &self.target)?,
        }
        self.committed()
    }

    fn committed(&mut self) -> io::Result<()> {
        self.committed = true;
        File::open(directory_of(&self.target))?.sync_all()
    }
}

fn directory_of(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A hidden name in the target's directory that nobody else uses.
fn beside(target: &Path) -> io::Result<PathBuf> {
    let name = target.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut suffix = [0; 8];
    rand::fill(&mut suffix).expect("the system provides randomness");
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}.tmp", hex::encode(suffix)));
    Ok(target.with_file_name(hidden))
}

/// A file without a name on the target's file system, if that and the system have such.
fn nameless(target: &Path, bits: u32) -> io::Result<Option<File>> {
    target.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = match rustix::fs::open(directory_of(target), flags, FileMode::from_raw_mode(bits)) {
        Ok(file) => File::from(file),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    // It is linked through /proc, which a container may lack.
    Ok(proc_path(&file).exists().then_some(file))
}

fn proc_path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn link(file: &File, to: &Path) -> io::Result<()> {
    let from = proc_path(file);
    rustix::fs::linkat(CWD, &from, CWD, to, AtFlags::SYMLINK_FOLLOW).map_err(io::Error::from)
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(temporary) = self.temporary.as_ref().filter(|_| !self.committed) {
            // Nothing better can be done about a failure here than to leave the (encrypted) remains.
            let _ = fs::remove_file(temporary);
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
    fn a_file_in_the_making_has_no_name_that_a_killed_program_could_leave() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a");
        let file = AtomicFile::create(&target, Replace::Nothing, Mode::OwnerOnly).unwrap();
        file.write_all_at(b"whole", 0).unwrap();
        if file.temporary.is_none() {
            assert!(names(dir.path()).is_empty());
        } else {
            println!(
                "skipped: {} has no files without names",
                dir.path().display()
            );
        }
        file.commit().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"whole");
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&target).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_file_with_a_hidden_name_takes_the_same_way() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a");
        for replace in [Replace::Nothing, Replace::Existing] {
            let temporary = beside(&target).unwrap();
            let file = File::create(&temporary).unwrap();
            let file = AtomicFile {
                file,
                temporary: Some(temporary),
                target: target.clone(),
                replace,
                committed: false,
            };
            file.write_all_at(b"whole", 0).unwrap();
            file.commit().unwrap();
            assert_eq!(names(dir.path()), ["a"]);
        }
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
