//! The state directory: which files it holds, how they are made, read and locked.
//!
//! | file | mode | holds |
//! |---|---|---|
//! | `issuer.pem` | 0600 | Ed25519 key that signs credentials and log heads |
//! | `issuer.pub` | 0644 | its public half in hex, for users' policies |
//! | `provider.pub` | 0644 | optional: the provider's public key in hex, under which rollbacks verify |
//! | `token.p8` | 0600 | Ed25519 key that signs attestation results tokens |
//! | `storage.key` | 0600 | 32 bytes under which resources are encrypted in the database |
//! | `broker.sqlite3` | 0600 | policies, resources, decision log |
//! | `lock` | 0600 | held by the serving process |
//!
//! The directory is 0700. The two keys beside the database protect a copied or leaked database; they do
//! not protect against somebody who can read the whole directory, so it belongs on an encrypted disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::signature::Ed25519KeyPair;
use casemate_attest::UnixTime;
use casemate_container::KeyFileError;
use casemate_container::signing::{SigningKey, VerifyingKey};
use casemate_release::random::Random;
use zeroize::Zeroizing;

use crate::store::{StorageKey, Store, StoreError};
use crate::token::TokenKey;

/// Why a state directory cannot be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// There is no such directory.
    #[error("{0} is not a state directory: run `casemate-broker init --state {0}` first")]
    Missing(PathBuf),
    /// `init` on a directory that has a state already.
    #[error("{0} already holds a broker's state; it is never overwritten")]
    Exists(PathBuf),
    /// Others may read a secret.
    #[error("{path} has mode {mode:o}: nobody but its owner may have access")]
    Exposed {
        /// The file or directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A key file with other content than expected.
    #[error("{0} does not hold the key it should")]
    Key(PathBuf),
    /// Another process serves this state.
    #[error("another casemate-broker is serving {0}")]
    Locked(PathBuf),
    /// The issuer's key file.
    #[error(transparent)]
    KeyFile(#[from] KeyFileError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The random generator.
    #[error(transparent)]
    Random(#[from] casemate_release::ReleaseError),
}

/// An opened and locked state directory.
pub struct State {
    /// Signs credentials and log heads.
    pub issuer: Arc<SigningKey>,
    /// Signs grants and rollbacks; none where `init` was not told.
    pub provider: Option<VerifyingKey>,
    /// Signs tokens.
    pub token: TokenKey,
    /// Policies, resources, log.
    pub store: Store,
    /// The database's path, for readers beside the store.
    pub database: PathBuf,
    /// Held for as long as the state is used.
    pub lock: File,
}

/// Path of the database in a state directory.
pub fn database(directory: &Path) -> PathBuf {
    directory.join("broker.sqlite3")
}

/// Path of the issuer's public key in a state directory.
pub fn issuer_public_key(directory: &Path) -> PathBuf {
    directory.join("issuer.pub")
}

/// Path of the provider's public key in a state directory.
pub fn provider_public_key(directory: &Path) -> PathBuf {
    directory.join("provider.pub")
}

impl State {
    /// Creates the directory with fresh keys and an empty database. Without a provider, no rollback of the policy will
    /// be accepted.
    ///
    /// # Errors
    /// [`StateError`]; an existing state is never touched.
    pub fn init(
        directory: &Path,
        provider: Option<VerifyingKey>,
        random: Arc<dyn Random>,
        now: UnixTime,
    ) -> Result<Self, StateError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| StateError::File { path, source }
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(at(directory))?;
        check_private(directory)?;
        if fs::read_dir(directory)
            .map_err(at(directory))?
            .next()
            .is_some()
        {
            return Err(StateError::Exists(directory.into()));
        }
        let lock = lock(directory)?;

        let issuer = SigningKey::generate();
        issuer.write_file(&directory.join("issuer.pem"), false)?;
        let public = format!("{}\n", issuer.verifying_key());
        write_new(&issuer_public_key(directory), public.as_bytes(), 0o644)?;

        if let Some(provider) = provider {
            let text = format!("{provider}\n");
            write_new(&provider_public_key(directory), text.as_bytes(), 0o644)?;
        }

        let token = Ed25519KeyPair::generate()
            .and_then(|key| {
                key.to_pkcs8v1()
                    .map(|pkcs8| Zeroizing::new(pkcs8.as_ref().to_vec()))
            })
            .map_err(|_| {
                StateError::Random(casemate_release::ReleaseError::Crypto("key generation"))
            })?;
        write_new(&directory.join("token.p8"), &token, 0o600)?;
        let token = TokenKey::from_pkcs8(&token)
            .ok_or_else(|| StateError::Key(directory.join("token.p8")))?;

        let mut storage_key = Zeroizing::new([0u8; 32]);
        random.fill(&mut storage_key[..])?;
        write_new(&directory.join("storage.key"), &storage_key[..], 0o600)?;

        // SQLite gives its journal files the mode of the database.
        write_new(&database(directory), &[], 0o600)?;
        let issuer = Arc::new(issuer);
        let store = Store::create(
            &database(directory),
            StorageKey::new(storage_key),
            issuer.clone(),
            random,
            now,
        )?;
        File::open(directory)
            .and_then(|dir| dir.sync_all())
            .map_err(at(directory))?;
        Ok(Self {
            issuer,
            provider,
            token,
            store,
            database: database(directory),
            lock,
        })
    }

    /// Opens an existing state and locks it against a second broker.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open(directory: &Path, random: Arc<dyn Random>) -> Result<Self, StateError> {
        if !database(directory).is_file() {
            return Err(StateError::Missing(directory.into()));
        }
        check_private(directory)?;
        let lock = lock(directory)?;
        let issuer = Arc::new(SigningKey::read_file(&directory.join("issuer.pem"))?);
        let provider = read_provider(&provider_public_key(directory))?;
        let token_path = directory.join("token.p8");
        let token =
            TokenKey::from_pkcs8(&read_secret(&token_path)?).ok_or(StateError::Key(token_path))?;
        let storage_path = directory.join("storage.key");
        let storage_key = read_secret(&storage_path)?;
        let storage_key: [u8; 32] = storage_key[..]
            .try_into()
            .map_err(|_| StateError::Key(storage_path))?;
        let storage_key = StorageKey::new(Zeroizing::new(storage_key));
        let store = Store::open(&database(directory), storage_key, issuer.clone(), random)?;
        Ok(Self {
            issuer,
            provider,
            token,
            store,
            database: database(directory),
            lock,
        })
    }
}

fn read_provider(path: &Path) -> Result<Option<VerifyingKey>, StateError> {
    match fs::read_to_string(path) {
        Ok(text) => match text.trim().parse() {
            Ok(key) => Ok(Some(key)),
            Err(_) => Err(StateError::Key(path.into())),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(StateError::File {
            path: path.into(),
            source,
        }),
    }
}

fn lock(directory: &Path) -> Result<File, StateError> {
    let path = directory.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(|source| StateError::File { path, source })?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(_) => Err(StateError::Locked(directory.into())),
    }
}

fn check_private(path: &Path) -> Result<(), StateError> {
    let metadata = fs::metadata(path).map_err(|source| StateError::File {
        path: path.into(),
        source,
    })?;
    let mode = metadata.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(StateError::Exposed {
            path: path.into(),
            mode,
        });
    }
    Ok(())
}

fn read_secret(path: &Path) -> Result<Zeroizing<Vec<u8>>, StateError> {
    const MAX_KEY_BYTES: usize = 16 * 1024;
    check_private(path)?;
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_KEY_BYTES));
    let file = File::open(path).map_err(|source| StateError::File {
        path: path.into(),
        source,
    })?;
    file.take(MAX_KEY_BYTES as u64)
        .read_to_end(&mut bytes)
        .map_err(|source| StateError::File {
            path: path.into(),
            source,
        })?;
    Ok(bytes)
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), StateError> {
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|source| StateError::File {
        path: path.into(),
        source,
    })
}
