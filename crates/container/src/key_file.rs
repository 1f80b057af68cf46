//! Key files: PEM, secret ones readable by their owner only, replaced never by accident and never by halves.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::atomic_file::{AtomicFile, Mode, Replace};

/// No key file is longer; refuses to read a model that was named by mistake.
const LARGEST_KEY_FILE: u64 = 16 * 1024;

/// A key file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file is missing or cannot be read or written.
    #[error("key file {}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// The file to be written exists already.
    #[error("{} exists already and was left as it is", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Other users may read a secret key file.
    #[error("{} is open to other users (mode {mode:04o}); a secret key must be 0600 (chmod 600)", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file holds something else.
    #[error("{} is not a PEM file with one \"{label}\"", path.display())]
    NotAKey {
        /// The file.
        path: PathBuf,
        /// The PEM label that was expected.
        label: &'static str,
    },
}

impl KeyFileError {
    pub(crate) fn not_a(label: &'static str, path: &Path) -> Self {
        KeyFileError::NotAKey {
            path: path.to_owned(),
            label,
        }
    }
}

/// Reads a file that only its owner may read and that holds exactly one PEM block with this label.
pub(crate) fn read_secret(
    path: &Path,
    label: &'static str,
) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    let io = |error| KeyFileError::Io {
        path: path.to_owned(),
        error,
    };
    let file = File::open(path).map_err(io)?;
    let mode = file.metadata().map_err(io)?.mode() & 0o7777;
    let contents = read_pem(file, path, label)?;
    // After the contents: for a public key given by mistake, chmod would be the wrong advice.
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    Ok(contents)
}

/// Reads a file that holds exactly one PEM block with this label.
pub(crate) fn read_public(path: &Path, label: &'static str) -> Result<Vec<u8>, KeyFileError> {
    let file = File::open(path).map_err(|error| KeyFileError::Io {
        path: path.to_owned(),
        error,
    })?;
    read_pem(file, path, label).map(|bytes| bytes.to_vec())
}

fn read_pem(
    file: File,
    path: &Path,
    label: &'static str,
) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    // Reserved at once: growing would leave copies of a secret behind.
    let mut text = Zeroizing::new(Vec::with_capacity(LARGEST_KEY_FILE as usize + 1));
    file.take(LARGEST_KEY_FILE + 1)
        .read_to_end(&mut text)
        .map_err(|error| KeyFileError::Io {
            path: path.to_owned(),
            error,
        })?;
    if text.len() as u64 > LARGEST_KEY_FILE {
        return Err(KeyFileError::not_a(label, path));
    }
    let mut blocks = pem::parse_many(text.as_slice())
        .map_err(|_| KeyFileError::not_a(label, path))?
        .into_iter()
        .map(|block| (block.tag() == label, Zeroizing::new(block.into_contents())));
    match (blocks.next(), blocks.next()) {
        (Some((true, contents)), None) => Ok(contents),
        _ => Err(KeyFileError::not_a(label, path)),
    }
}

/// Writes one PEM block, mode 0600.
pub(crate) fn write_secret(
    path: &Path,
    label: &'static str,
    contents: &[u8],
    overwrite: bool,
) -> Result<(), KeyFileError> {
    write_pem(path, label, contents, overwrite, Mode::OwnerOnly)
}

/// Writes one PEM block that anybody may read.
pub(crate) fn write_public(
    path: &Path,
    label: &'static str,
    contents: &[u8],
    overwrite: bool,
) -> Result<(), KeyFileError> {
    write_pem(path, label, contents, overwrite, Mode::Readable)
}

fn write_pem(
    path: &Path,
    label: &'static str,
    contents: &[u8],
    overwrite: bool,
    mode: Mode,
) -> Result<(), KeyFileError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AlreadyExists => KeyFileError::Exists {
            path: path.to_owned(),
        },
        _ => KeyFileError::Io {
            path: path.to_owned(),
            error,
        },
    };
    let replace = if overwrite {
        Replace::Existing
    } else {
        Replace::Nothing
    };
    let block = pem::Pem::new(label, contents);
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    let text = Zeroizing::new(pem::encode_config(&block, config));
    let _erased = Zeroizing::new(block.into_contents());
    let file = AtomicFile::create(path, replace, mode).map_err(failed)?;
    file.write_all_at(text.as_bytes(), 0).map_err(failed)?;
    file.commit().map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::data_key::DataKey;
    use crate::signing::{SigningKey, VerifyingKey};

    #[test]
    fn keys_written_are_the_keys_read_and_only_the_owner_may_read_secrets() {
        let dir = tempfile::tempdir().unwrap();
        let (data, signing, public) = (
            dir.path().join("d.key"),
            dir.path().join("s.pem"),
            dir.path().join("s.pub.pem"),
        );
        let data_key = DataKey::generate();
        let signing_key = SigningKey::generate();
        data_key.write_file(&data, false).unwrap();
        signing_key.write_file(&signing, false).unwrap();
        signing_key
            .verifying_key()
            .write_file(&public, false)
            .unwrap();

        assert!(DataKey::read_file(&data).unwrap().matches(&data_key));
        let reread = SigningKey::read_file(&signing).unwrap();
        assert_eq!(reread.verifying_key(), signing_key.verifying_key());
        assert_eq!(
            VerifyingKey::read_file(&public).unwrap(),
            signing_key.verifying_key()
        );
        for secret in [&data, &signing] {
            assert_eq!(fs::metadata(secret).unwrap().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn refuses_a_secret_that_others_may_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.key");
        DataKey::generate().write_file(&path, false).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let refused = DataKey::read_file(&path).err().unwrap();
        assert!(
            matches!(refused, KeyFileError::Exposed { mode: 0o640, .. }),
            "{refused}"
        );
    }

    #[test]
    fn never_overwrites_unless_told_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.key");
        let (first, second) = (DataKey::generate(), DataKey::generate());
        first.write_file(&path, false).unwrap();
        let refused = second.write_file(&path, false).unwrap_err();
        assert!(matches!(refused, KeyFileError::Exists { .. }), "{refused}");
        assert!(DataKey::read_file(&path).unwrap().matches(&first));
        second.write_file(&path, true).unwrap();
        assert!(DataKey::read_file(&path).unwrap().matches(&second));
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no temporary file is left"
        );
    }

    #[test]
    fn refuses_what_is_no_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.key");
        let missing = DataKey::read_file(&path).err().unwrap();
        assert!(matches!(missing, KeyFileError::Io { .. }), "{missing}");

        let other = SigningKey::generate();
        other.write_file(&path, false).unwrap();
        let wrong_label = DataKey::read_file(&path).err().unwrap();
        assert!(
            matches!(wrong_label, KeyFileError::NotAKey { .. }),
            "{wrong_label}"
        );

        let one = pem::encode(&pem::Pem::new("CASEMATE DATA KEY", [7; 32]));
        let short = pem::encode(&pem::Pem::new("CASEMATE DATA KEY", [7; 31]));
        for text in [
            String::new(),
            "garbage".into(),
            short,
            format!("{one}{one}"),
            "x".repeat(20_000),
        ] {
            fs::write(&path, &text).unwrap();
            let refused = DataKey::read_file(&path).err().unwrap();
            assert!(
                matches!(refused, KeyFileError::NotAKey { .. }),
                "{text}: {refused}"
            );
        }
    }
}
