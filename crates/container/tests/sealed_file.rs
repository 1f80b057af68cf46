//! Sealing and opening through the public interface: what comes back, what is refused, what is left on the disk.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use casemate_container::signing::SigningKey;
use casemate_container::{
    Access, DType, DataKey, Family, Malformed, ManifestError, Model, ModelConfig, ModelSource,
    NotAuthentic, OpenError, RopeLayout, RopeScaling, SealError, SealOptions, SealedFile, Silent,
    SourceError, SourceTensor, seal,
};
use proptest::prelude::*;

fn config() -> ModelConfig {
    ModelConfig {
        family: Family::Qwen2,
        hidden: 64,
        layers: 2,
        heads: 8,
        kv_heads: 4,
        head_dim: 8,
        ffn: 172,
        vocab: 512,
        context: 512,
        norm_eps: 1e-6,
        rope_theta: 500_000.0,
        rope_scaling: RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        },
        rope_layout: RopeLayout::Interleaved,
        sliding_window: Some(4096),
        tied_embeddings: false,
        qkv_bias: true,
        bos: None,
        eos: vec![2, 511],
        add_bos: false,
    }
}

/// A source in memory that can be told to misbehave.
#[derive(Debug)]
struct Source {
    config: ModelConfig,
    tensors: Vec<SourceTensor>,
    bytes: Vec<Vec<u8>>,
    assets: Vec<(String, Vec<u8>)>,
    reads: AtomicUsize,
    /// From this read on, reading fails.
    fails_from: usize,
    /// From this read on, the bytes are others.
    changes_from: usize,
}

impl Source {
    fn new(tensors: &[(&str, DType, &[u64])], assets: &[(&str, &[u8])]) -> Self {
        let tensors: Vec<_> = tensors
            .iter()
            .map(|&(name, dtype, shape)| SourceTensor {
                name: name.to_owned(),
                dtype,
                shape: shape.to_vec(),
                size: dtype.bytes_for(shape).unwrap(),
            })
            .collect();
        let bytes = tensors
            .iter()
            .enumerate()
            .map(|(t, tensor)| {
                (0..tensor.size)
                    .map(|i| (i * 13 + i / 256 + t as u64) as u8)
                    .collect()
            })
            .collect();
        Source {
            config: config(),
            tensors,
            bytes,
            assets: assets
                .iter()
                .map(|(n, b)| ((*n).to_owned(), b.to_vec()))
                .collect(),
            reads: AtomicUsize::new(0),
            fails_from: usize::MAX,
            changes_from: usize::MAX,
        }
    }

    fn small() -> Self {
        Source::new(
            &[
                ("token_embd.weight", DType::F32, &[2, 4]),
                ("output_norm.weight", DType::F32, &[4]),
            ],
            &[("tokenizer.json", b"{\"a tokenizer\": true}")],
        )
    }
}

impl ModelSource for Source {
    fn name(&self) -> &str {
        "from the source"
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn read_tensor(&self, index: usize, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        let read = self.reads.fetch_add(1, Ordering::Relaxed);
        if read >= self.fails_from {
            return Err(SourceError::Short {
                tensor: self.tensors[index].name.clone(),
            });
        }
        let start = offset as usize;
        out.copy_from_slice(&self.bytes[index][start..start + out.len()]);
        if read >= self.changes_from {
            out[0] ^= 1;
        }
        Ok(())
    }

    fn assets(&self) -> &[(String, Vec<u8>)] {
        &self.assets
    }
}

struct Place {
    dir: tempfile::TempDir,
    data_key: DataKey,
    provider: SigningKey,
}

impl Place {
    fn new() -> Self {
        Place {
            dir: tempfile::tempdir().unwrap(),
            data_key: DataKey::generate(),
            provider: SigningKey::generate(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn seal_with(
        &self,
        source: &Source,
        options: &SealOptions,
        name: &str,
    ) -> Result<PathBuf, SealError> {
        let path = self.path(name);
        seal(
            source,
            options,
            &self.data_key,
            &self.provider,
            &path,
            &Silent,
        )?;
        Ok(path)
    }

    fn seal(&self, source: &Source, name: &str) -> PathBuf {
        self.seal_with(
            source,
            &SealOptions {
                version: 3,
                ..SealOptions::default()
            },
            name,
        )
        .unwrap()
    }

    fn open(&self, path: &Path) -> Result<Model, OpenError> {
        SealedFile::open(path)?
            .unlock(&self.data_key, &self.provider.verifying_key())?
            .load(2, &Silent)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn assert_holds(model: &Model, source: &Source) {
    assert_eq!(model.config(), &source.config);
    assert_eq!(model.manifest().tensors().len(), source.tensors.len());
    for (tensor, bytes) in source.tensors.iter().zip(&source.bytes) {
        let found = model.tensor(&tensor.name).unwrap();
        assert_eq!(
            (found.entry.dtype, &found.entry.shape),
            (tensor.dtype, &tensor.shape)
        );
        assert!(found.bytes == bytes, "{}", tensor.name);
        assert_eq!(found.bytes.as_ptr() as usize % 64, 0, "{}", tensor.name);
    }
    assert_eq!(model.manifest().assets().len(), source.assets.len());
    for (name, bytes) in &source.assets {
        assert!(model.asset(name).unwrap() == bytes, "{name}");
    }
}

fn any_source() -> impl Strategy<Value = Source> {
    let dtype = proptest::sample::select(DType::ALL.to_vec());
    let tensor = (dtype, 1u64..40, 1u64..5);
    let assets = proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..3000), 0..4);
    (proptest::collection::vec(tensor, 1..12), assets).prop_map(|(tensors, assets)| {
        let mut source = Source::new(&[], &[]);
        for (i, (dtype, rows, blocks)) in tensors.into_iter().enumerate() {
            // Some of several megabytes, so that they span chunks.
            let rows = if i == 3 { rows * 600 } else { rows };
            let shape = vec![rows, blocks * dtype.block_len()];
            let size = dtype.bytes_for(&shape).unwrap();
            // Descending names: the order of a source is not the order in the file.
            source.tensors.push(SourceTensor {
                name: format!("t{:02}", 99 - i),
                dtype,
                shape,
                size,
            });
            source.bytes.push(
                (0..size)
                    .map(|j| (j * 7 + j / 256 + i as u64) as u8)
                    .collect(),
            );
        }
        source.assets = assets
            .into_iter()
            .enumerate()
            .map(|(i, b)| (format!("a{}", 9 - i), b))
            .collect();
        source
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_was_sealed_is_what_is_opened(source in any_source(), threads in 1usize..5) {
        let place = Place::new();
        let path = place.seal(&source, "m");
        let unlock = || SealedFile::open(&path).unwrap()
            .unlock(&place.data_key, &place.provider.verifying_key()).unwrap();
        let model = unlock().load(threads, &Silent).unwrap();
        assert_holds(&model, &source);
        unlock().check(threads, &Silent).unwrap();
    }

    #[test]
    fn random_damage_is_refused(at in any::<usize>(), bits in 1u8.., cut in any::<usize>(), tail in 1usize..100) {
        let place = Place::new();
        let path = place.seal(&Source::small(), "m");
        let good = fs::read(&path).unwrap();
        let mut bent = good.clone();
        bent[at % good.len()] ^= bits;
        let short = good[..cut % good.len()].to_vec();
        let mut long = good.clone();
        long.resize(good.len() + tail, bits);
        for bad in [bent, short, long] {
            fs::write(&path, &bad).unwrap();
            prop_assert!(place.open(&path).is_err());
        }
    }
}

#[test]
fn every_single_byte_that_changes_is_noticed() {
    let place = Place::new();
    let path = place.seal(&Source::small(), "m");
    let mut bytes = fs::read(&path).unwrap();
    for i in 0..bytes.len() {
        for bit in [0x01, 0x80] {
            bytes[i] ^= bit;
            fs::write(&path, &bytes).unwrap();
            let refused = place
                .open(&path)
                .err()
                .unwrap_or_else(|| panic!("byte {i} opened"));
            assert!(
                matches!(
                    refused,
                    OpenError::Malformed(_) | OpenError::NotAuthentic(_)
                ),
                "byte {i}: {refused}"
            );
            bytes[i] ^= bit;
        }
    }
    fs::write(&path, &bytes).unwrap();
    place.open(&path).unwrap();
}

#[test]
fn every_truncation_is_noticed_as_one() {
    let place = Place::new();
    let path = place.seal(&Source::small(), "m");
    let bytes = fs::read(&path).unwrap();
    for length in 0..bytes.len() {
        fs::write(&path, &bytes[..length]).unwrap();
        let refused = place.open(&path).err().unwrap();
        match (length, refused) {
            (0..8, OpenError::Malformed(Malformed::NotAContainer)) => {}
            (8.., OpenError::Malformed(Malformed::Truncated { found, .. })) => {
                assert_eq!(found, length as u64);
            }
            (_, other) => panic!("{length} bytes: {other}"),
        }
    }
}

#[test]
fn a_model_has_one_digest_and_each_file_its_own_salt() {
    let place = Place::new();
    let source = Source::small();
    let files: Vec<_> = (0..4)
        .map(|i| place.seal(&source, &format!("m{i}")))
        .collect();
    let mut seen = HashSet::new();
    let mut digests = HashSet::new();
    for path in &files {
        digests.insert(place.open(path).unwrap().digest());
        let bytes = fs::read(path).unwrap();
        // File id, salt, commitment, manifest section, tail: all of it differs from file to file.
        for part in [
            &bytes[24..40],
            &bytes[40..72],
            &bytes[72..104],
            &bytes[104..136],
            &bytes[bytes.len() - 32..],
        ] {
            assert!(seen.insert(part.to_vec()));
        }
    }
    assert_eq!(digests.len(), 1);

    // A reordered source is the same model; another version or one other bit is another.
    let mut reordered = Source::small();
    reordered.tensors.reverse();
    reordered.bytes.reverse();
    assert!(digests.contains(&place.open(&place.seal(&reordered, "r")).unwrap().digest()));
    let mut other = Source::small();
    other.bytes[0][0] ^= 1;
    assert!(!digests.contains(&place.open(&place.seal(&other, "o")).unwrap().digest()));
    let options = SealOptions {
        version: 4,
        ..SealOptions::default()
    };
    let raised = place.seal_with(&source, &options, "v").unwrap();
    assert!(!digests.contains(&place.open(&raised).unwrap().digest()));
}

#[test]
fn nothing_of_the_model_is_readable_in_the_file() {
    let place = Place::new();
    let mut source = Source::small();
    let marker = b"a weight that nobody may read!!!";
    source.bytes[0].copy_from_slice(marker);
    let options = SealOptions {
        name: Some("a secret name".into()),
        ..SealOptions::default()
    };
    let path = place.seal_with(&source, &options, "m").unwrap();
    let bytes = fs::read(&path).unwrap();
    let digest = place.open(&path).unwrap().digest();
    let provider = place.provider.verifying_key();
    let secrets: [&[u8]; 6] = [
        &marker[..8],
        b"token_embd",
        b"a tokenizer",
        b"a secret name",
        &digest.as_bytes()[..8],
        &provider.as_bytes()[..8],
    ];
    for secret in secrets {
        assert!(
            !bytes.windows(secret.len()).any(|w| w == secret),
            "{}",
            secret.escape_ascii()
        );
    }
}

#[test]
fn another_key_or_signer_is_refused_as_such() {
    let place = Place::new();
    let path = place.seal(&Source::small(), "m");
    let provider = place.provider.verifying_key();
    let wrong = SealedFile::open(&path)
        .unwrap()
        .unlock(&DataKey::generate(), &provider);
    assert!(matches!(
        wrong.err(),
        Some(OpenError::NotAuthentic(NotAuthentic::WrongKey))
    ));

    let stranger = SigningKey::generate().verifying_key();
    match SealedFile::open(&path)
        .unwrap()
        .unlock(&place.data_key, &stranger)
        .err()
    {
        Some(OpenError::NotAuthentic(NotAuthentic::WrongSigner { expected, found })) => {
            assert_eq!((expected, found), (stranger, provider));
        }
        other => panic!("{other:?}"),
    }

    let inspected = SealedFile::open(&path)
        .unwrap()
        .inspect(&place.data_key)
        .unwrap();
    assert_eq!(inspected.signer(), provider);
    assert_eq!(inspected.digest(), place.open(&path).unwrap().digest());
    let wrong = SealedFile::open(&path)
        .unwrap()
        .inspect(&DataKey::generate());
    assert!(matches!(
        wrong.err(),
        Some(OpenError::NotAuthentic(NotAuthentic::WrongKey))
    ));
}

#[test]
fn a_failed_sealing_leaves_nothing_behind_and_nothing_changed() {
    let place = Place::new();
    let overwrite = SealOptions {
        overwrite: true,
        ..SealOptions::default()
    };
    fs::write(place.path("m"), "precious").unwrap();
    let check = |refused: Result<PathBuf, SealError>| {
        assert_eq!(fs::read(place.path("m")).unwrap(), b"precious");
        assert_eq!(place.names(), ["m"]);
        refused.unwrap_err()
    };

    let refused = check(place.seal_with(&Source::small(), &SealOptions::default(), "m"));
    assert!(matches!(refused, SealError::Exists { .. }), "{refused}");

    // Two tensors are read twice each: the first failure is in the second pass.
    let source = Source {
        fails_from: 3,
        ..Source::small()
    };
    let refused = check(place.seal_with(&source, &overwrite, "m"));
    assert!(
        matches!(refused, SealError::Source(SourceError::Short { .. })),
        "{refused}"
    );

    let source = Source {
        changes_from: 3,
        ..Source::small()
    };
    let refused = check(place.seal_with(&source, &overwrite, "m"));
    assert!(
        matches!(&refused, SealError::SourceChanged { name } if name == "token_embd.weight"),
        "{refused}"
    );

    let options = SealOptions {
        public_tensors: vec!["no.such.*".into()],
        ..overwrite.clone()
    };
    let refused = check(place.seal_with(&Source::small(), &options, "m"));
    assert!(
        matches!(&refused, SealError::NothingPublic { pattern } if pattern == "no.such.*"),
        "{refused}"
    );

    let mut source = Source::small();
    source.tensors[0].shape = vec![3, 4];
    let refused = check(place.seal_with(&source, &overwrite, "m"));
    assert!(
        matches!(refused, SealError::Manifest(ManifestError::Size { .. })),
        "{refused}"
    );

    let mut source = Source::small();
    source.tensors[1].name = source.tensors[0].name.clone();
    let refused = check(place.seal_with(&source, &overwrite, "m"));
    assert!(
        matches!(refused, SealError::Manifest(ManifestError::Order { .. })),
        "{refused}"
    );

    place.seal_with(&Source::small(), &overwrite, "m").unwrap();
    assert_holds(&place.open(&place.path("m")).unwrap(), &Source::small());
    assert_eq!(place.names(), ["m"]);

    let refused = place
        .seal_with(&Source::small(), &overwrite, "no/such/directory/m")
        .unwrap_err();
    assert!(matches!(refused, SealError::Io { .. }), "{refused}");
}

#[test]
fn tensors_are_private_unless_a_pattern_says_otherwise() {
    let place = Place::new();
    let options = SealOptions {
        public_tensors: vec!["*_norm.weight".into()],
        ..SealOptions::default()
    };
    let path = place.path("m");
    let source = Source::small();
    let sealed = seal(
        &source,
        &options,
        &place.data_key,
        &place.provider,
        &path,
        &Silent,
    )
    .unwrap();
    assert_eq!((sealed.tensors, sealed.public_tensors), (2, 1));
    assert_eq!(sealed.file_len, fs::metadata(&path).unwrap().len());
    let model = place.open(&path).unwrap();
    assert_eq!(sealed.digest, model.digest());
    assert_eq!(model.manifest().name(), "from the source");
    let access = |name| model.manifest().tensor(name).unwrap().access;
    assert_eq!(access("output_norm.weight"), Access::Public);
    assert_eq!(access("token_embd.weight"), Access::Private);
}

#[test]
fn a_released_tensor_is_gone_and_its_neighbours_are_not() {
    let place = Place::new();
    let source = Source::new(
        &[
            ("a", DType::F32, &[1000]),
            ("b", DType::F32, &[64, 1024]),
            ("c", DType::F32, &[1000]),
        ],
        &[("tokenizer.json", b"{}")],
    );
    let mut model = place.open(&place.seal(&source, "m")).unwrap();
    let freed = model.release("b");
    assert!((256 * 1024 - 8192..=256 * 1024).contains(&freed), "{freed}");
    assert!(model.tensor("b").is_none());
    assert_eq!(model.release("b"), 0);
    assert_eq!(model.release("no such tensor"), 0);
    assert!(model.tensor("a").unwrap().bytes == source.bytes[0]);
    assert!(model.tensor("c").unwrap().bytes == source.bytes[2]);
    assert_eq!(model.asset("tokenizer.json").unwrap(), b"{}");
}

#[test]
fn what_is_no_file_or_no_container_is_said_to_be_so() {
    let place = Place::new();
    let missing = SealedFile::open(&place.path("nowhere")).err().unwrap();
    assert!(matches!(missing, OpenError::Io { .. }), "{missing}");
    let directory = SealedFile::open(place.dir.path()).err().unwrap();
    assert!(matches!(directory, OpenError::Io { .. }), "{directory}");
    for other in [
        "",
        "GGUF",
        "{\"a\": 1}",
        "-----BEGIN CASEMATE DATA KEY-----",
    ] {
        fs::write(place.path("x"), other).unwrap();
        let refused = SealedFile::open(&place.path("x")).err().unwrap();
        assert!(
            matches!(refused, OpenError::Malformed(Malformed::NotAContainer)),
            "{refused}"
        );
    }
}
